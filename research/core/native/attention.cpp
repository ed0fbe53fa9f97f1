// Causal or full attention over documents that are runs of tokens, forward and backward, float32 inside
// (FlashAttention-2, arXiv 2307.08691: blocks of 64 x 64, running softmax, scores computed again in backward).
//
// Tensors are [tokens, heads, dim], contiguous; `begins` and `lengths` say where the documents lie. dim must be a
// multiple of LANES. One task is one key/value head of one document with all query heads that share it, so nothing
// is summed across threads and the result does not depend on their number.
#include "attention.h"

namespace {

template <class T>
void read_rows(const T* from, int64_t stride, int64_t rows, int64_t dim, float factor, float* to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d += LANES) store(to + r * dim + d, load(from + r * stride + d) * factor);
}

// Rows to blocks of [dim][BLOCK]; places past the end become zero.
template <class T>
void read_columns(const T* from, int64_t stride, int64_t rows, int64_t dim, float* to) {
    memset(to, 0, blocks(rows) * BLOCK * dim * sizeof(float));
    float row[1024];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t d = 0; d < dim; d += LANES) store(row + d, load(from + r * stride + d));
        float* block = to + r / BLOCK * BLOCK * dim + r % BLOCK;
        for (int64_t d = 0; d < dim; d++) block[d * BLOCK] = row[d];
    }
}

template <class T>
void forward_task(const Shapes& s, int64_t document, int64_t kv, const T* q, const T* k, const T* v, T* out,
                  float* lse, std::vector<float>& scratch) {
    const int64_t begin = s.begins[document], length = s.lengths[document], dim = s.dim, share = s.heads / s.kv_heads;
    const int64_t padded = blocks(length) * BLOCK, q_stride = s.heads * dim, kv_stride = s.kv_heads * dim;
    scratch.resize(2 * padded * dim + 2 * BLOCK * dim + BLOCK * BLOCK + 2 * BLOCK);
    float *keys = scratch.data(), *values = keys + padded * dim, *query = values + padded * dim;
    float *sum_v = query + BLOCK * dim, *scores = sum_v + BLOCK * dim, *top = scores + BLOCK * BLOCK;
    float* weight = top + BLOCK;
    read_columns(k + begin * kv_stride + kv * dim, kv_stride, length, dim, keys);
    read_rows(v + begin * kv_stride + kv * dim, kv_stride, length, dim, 1.f, values);
    memset(values + length * dim, 0, (padded - length) * dim * sizeof(float));

    for (int64_t head = kv * share; head < (kv + 1) * share; head++)
        for (int64_t i = 0; i < blocks(length); i++) {
            const int64_t rows = length - i * BLOCK < BLOCK ? length - i * BLOCK : BLOCK;
            read_rows(q + (begin + i * BLOCK) * q_stride + head * dim, q_stride, rows, dim, s.scale, query);
            for (int64_t r = 0; r < rows; r++) top[r] = -INFINITY, weight[r] = 0;
            for (int64_t j = 0; j <= (s.causal ? i : blocks(length) - 1); j++) {
                const bool diagonal = s.causal && i == j;
                const int64_t left = length - j * BLOCK < BLOCK ? length - j * BLOCK : BLOCK;
                product(rows, BLOCK, dim, diagonal ? LOWER_C : FULL, query, dim, 1, keys + j * BLOCK * dim, BLOCK,
                        scores, BLOCK, false);
                if (diagonal || left < BLOCK) hide(scores, rows, left, diagonal);
                for (int64_t r = 0; r < rows; r++) {
                    float* row = scores + r * BLOCK;
                    vf m = load(row);
                    for (int64_t c = LANES; c < BLOCK; c += LANES) m = max(m, load(row + c));
                    float high = largest(m);
                    high = high > top[r] ? high : top[r];
                    vf total{};
                    for (int64_t c = 0; c < BLOCK; c += LANES) {
                        vf p = exp(load(row + c) - high);
                        total += p;
                        store(row + c, p);
                    }
                    const float keep = std::exp(top[r] - high);
                    weight[r] = weight[r] * keep + sum(total);
                    if (j > 0 && keep != 1.f)
                        for (int64_t d = 0; d < dim; d += LANES)
                            store(sum_v + r * dim + d, load(sum_v + r * dim + d) * keep);
                    top[r] = high;
                }
                product(rows, dim, BLOCK, diagonal ? LOWER_A : FULL, scores, BLOCK, 1, values + j * BLOCK * dim, dim,
                        sum_v, dim, j > 0);
            }
            for (int64_t r = 0; r < rows; r++) {
                const int64_t token = begin + i * BLOCK + r;
                for (int64_t d = 0; d < dim; d += LANES)
                    store(out + token * q_stride + head * dim + d, load(sum_v + r * dim + d) * (1.f / weight[r]));
                if (lse) lse[token * s.heads + head] = top[r] + std::log(weight[r]);
            }
        }
}

template <class T>
void backward_task(const Shapes& s, int64_t document, int64_t kv, const T* q, const T* k, const T* v, const T* out,
                   const float* lse, const T* grad, T* grad_q, T* grad_k, T* grad_v, std::vector<float>& scratch) {
    const int64_t begin = s.begins[document], length = s.lengths[document], dim = s.dim, share = s.heads / s.kv_heads;
    const int64_t padded = blocks(length) * BLOCK, q_stride = s.heads * dim, kv_stride = s.kv_heads * dim;
    scratch.resize(5 * padded * dim + 3 * BLOCK * dim + 2 * BLOCK * BLOCK + BLOCK);
    float *keys_t = scratch.data(), *values_t = keys_t + padded * dim, *keys = values_t + padded * dim;
    float *sum_k = keys + padded * dim, *sum_v = sum_k + padded * dim, *query = sum_v + padded * dim;
    float *from = query + BLOCK * dim, *sum_q = from + BLOCK * dim, *p = sum_q + BLOCK * dim;
    float *ds = p + BLOCK * BLOCK, *delta = ds + BLOCK * BLOCK;
    read_columns(k + begin * kv_stride + kv * dim, kv_stride, length, dim, keys_t);
    read_columns(v + begin * kv_stride + kv * dim, kv_stride, length, dim, values_t);
    read_rows(k + begin * kv_stride + kv * dim, kv_stride, length, dim, 1.f, keys);
    memset(keys + length * dim, 0, (padded - length) * dim * sizeof(float));
    memset(sum_k, 0, 2 * padded * dim * sizeof(float));

    for (int64_t head = kv * share; head < (kv + 1) * share; head++)
        for (int64_t i = 0; i < blocks(length); i++) {
            const int64_t rows = length - i * BLOCK < BLOCK ? length - i * BLOCK : BLOCK;
            const int64_t first = (begin + i * BLOCK) * q_stride + head * dim;
            read_rows(q + first, q_stride, rows, dim, s.scale, query);
            read_rows(grad + first, q_stride, rows, dim, 1.f, from);
            for (int64_t r = 0; r < rows; r++) {
                vf dot{};
                for (int64_t d = 0; d < dim; d += LANES)
                    dot += load(from + r * dim + d) * load(out + first + r * q_stride + d);
                delta[r] = sum(dot);
            }
            for (int64_t j = 0; j <= (s.causal ? i : blocks(length) - 1); j++) {
                const bool diagonal = s.causal && i == j;
                const Shape lower_c = diagonal ? LOWER_C : FULL;
                const int64_t left = length - j * BLOCK < BLOCK ? length - j * BLOCK : BLOCK;
                product(rows, BLOCK, dim, lower_c, query, dim, 1, keys_t + j * BLOCK * dim, BLOCK, p, BLOCK, false);
                product(rows, BLOCK, dim, lower_c, from, dim, 1, values_t + j * BLOCK * dim, BLOCK, ds, BLOCK, false);
                if (diagonal || left < BLOCK) hide(p, rows, left, diagonal);
                for (int64_t r = 0; r < rows; r++) {
                    const float log_sum = lse[(begin + i * BLOCK + r) * s.heads + head];
                    // Scores that the product left out are -inf here: their weight is 0, whatever ds holds.
                    const int64_t end = diagonal ? (r / LANES + 1) * LANES : BLOCK;
                    for (int64_t c = 0; c < end; c += LANES) {
                        vf w = exp(load(p + r * BLOCK + c) - log_sum);
                        store(p + r * BLOCK + c, w);
                        store(ds + r * BLOCK + c, w * (load(ds + r * BLOCK + c) - delta[r]));
                    }
                    for (int64_t c = end; c < BLOCK; c++) p[r * BLOCK + c] = ds[r * BLOCK + c] = 0;
                }
                const Shape upper_a = diagonal ? UPPER_A : FULL;
                product(left, dim, rows, upper_a, p, 1, BLOCK, from, dim, sum_v + j * BLOCK * dim, dim, true);
                product(left, dim, rows, upper_a, ds, 1, BLOCK, query, dim, sum_k + j * BLOCK * dim, dim, true);
                product(rows, dim, BLOCK, diagonal ? LOWER_A : FULL, ds, BLOCK, 1, keys + j * BLOCK * dim, dim, sum_q,
                        dim, j > 0);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < dim; d += LANES)
                    store(grad_q + first + r * q_stride + d, load(sum_q + r * dim + d) * s.scale);
        }
    for (int64_t r = 0; r < length; r++)
        for (int64_t d = 0; d < dim; d += LANES) {
            const int64_t place = (begin + r) * kv_stride + kv * dim + d;
            store(grad_k + place, load(sum_k + r * dim + d));
            store(grad_v + place, load(sum_v + r * dim + d));
        }
}

}  // namespace

#include "attention_pairs.h"

namespace {

template <class T>
void forward(const Shapes& s, const void* q, const void* k, const void* v, void* out, float* lse, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.documents * s.kv_heads; task++)
            forward_task(s, task / s.kv_heads, task % s.kv_heads, (const T*)q, (const T*)k, (const T*)v, (T*)out, lse,
                         scratch);
    }
}

template <class T>
void backward(const Shapes& s, const void* q, const void* k, const void* v, const void* out, const float* lse,
              const void* grad, void* grad_q, void* grad_k, void* grad_v, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.documents * s.kv_heads; task++)
            backward_task(s, task / s.kv_heads, task % s.kv_heads, (const T*)q, (const T*)k, (const T*)v,
                          (const T*)out, lse, (const T*)grad, (T*)grad_q, (T*)grad_k, (T*)grad_v, scratch);
    }
}

}  // namespace

extern "C" {

void attention_forward(int half, int64_t documents, int64_t heads, int64_t kv_heads, int64_t dim,
                       const int64_t* begins, const int64_t* lengths, int causal, float scale, const void* q,
                       const void* k, const void* v, void* out, float* lse, int threads) {
    Shapes s{documents, heads, kv_heads, dim, begins, lengths, (bool)causal, scale};
    (half ? forward<bf16> : forward<float>)(s, q, k, v, out, lse, threads);
}

void attention_backward(int half, int64_t documents, int64_t heads, int64_t kv_heads, int64_t dim,
                        const int64_t* begins, const int64_t* lengths, int causal, float scale, const void* q,
                        const void* k, const void* v, const void* out, const float* lse, const void* grad,
                        void* grad_q, void* grad_k, void* grad_v, int threads) {
    Shapes s{documents, heads, kv_heads, dim, begins, lengths, (bool)causal, scale};
    (half ? backward<bf16> : backward<float>)(s, q, k, v, out, lse, grad, grad_q, grad_k, grad_v, threads);
}

}  // extern "C"
