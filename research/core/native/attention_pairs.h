// The attention tasks for bfloat16 with the processor's product of bfloat16 pairs: two neighbours along the summed axis lie
// in one 32-bit word. Probabilities and their gradients are rounded to bfloat16 before they meet values and keys, as in
// torch's kernel; every sum is float32. To be included behind the general tasks, which it specialises.
#pragma once
#if defined(__AVX512BF16__)

namespace {

typedef uint32_t pair;
typedef uint32_t vu_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// C[m][n] (+)= sum over k of A[m * am + k * ak] . B[k * ldb + n], words of two products each.
template <int ROWS, int VECS>
void pair_tile(int64_t k0, int64_t k1, const pair* a, int64_t am, int64_t ak, const pair* b, int64_t ldb, float* c,
               int64_t ldc, bool add) {
    __m512 acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++)
            acc[m][v] = add ? _mm512_loadu_ps(c + m * ldc + v * LANES) : _mm512_setzero_ps();
    for (int64_t k = k0; k < k1; k++) {
        __m512i row[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) row[v] = _mm512_loadu_si512(b + k * ldb + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            const __m512bh s = (__m512bh)_mm512_set1_epi32((int)a[m * am + k * ak]);
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], s, (__m512bh)row[v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) _mm512_storeu_ps(c + m * ldc + v * LANES, acc[m][v]);
}

template <int ROWS>
void pair_strip(int64_t m, int64_t n, int64_t k, Shape shape, const pair* a, int64_t am, int64_t ak, const pair* b,
                int64_t ldb, float* c, int64_t ldc, bool add) {
    const int64_t k0 = shape == UPPER_A ? m / 2 : 0, reach = (m + ROWS + 1) / 2;
    const int64_t k1 = shape == LOWER_A && reach < k ? reach : k;
    const int64_t end = shape == LOWER_C && m + ROWS < n ? (m + ROWS + LANES - 1) / LANES * LANES : n;
    int64_t j = 0;
    for (; j + TILE_VECS * LANES <= end; j += TILE_VECS * LANES)
        pair_tile<ROWS, TILE_VECS>(k0, k1, a, am, ak, b + j, ldb, c + j, ldc, add);
    for (; j < end; j += LANES) pair_tile<ROWS, 1>(k0, k1, a, am, ak, b + j, ldb, c + j, ldc, add);
}

// m rows; k counts words; shapes speak of rows and single elements, as in product().
void pair_product(int64_t m, int64_t n, int64_t k, Shape shape, const pair* a, int64_t am, int64_t ak, const pair* b,
                  int64_t ldb, float* c, int64_t ldc, bool add) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        pair_strip<TILE_ROWS>(i, n, k, shape, a + i * am, am, ak, b, ldb, c + i * ldc, ldc, add);
    for (; i < m; i++) pair_strip<1>(i, n, k, shape, a + i * am, am, ak, b, ldb, c + i * ldc, ldc, add);
}

// Words along the rows' own axis, turned: [dim / 2][BLOCK] per block of rows; places past the end become zero.
void turned(const bf16* from, int64_t stride, int64_t rows, int64_t dim, pair* to) {
    for (int64_t r = 0; r < blocks(rows) * BLOCK; r++) {
        pair* block = to + r / BLOCK * BLOCK * dim / 2 + r % BLOCK;
        if (r < rows)
            for (int64_t d = 0; d < dim / 2; d++) memcpy(block + d * BLOCK, from + r * stride + 2 * d, sizeof(pair));
        else
            for (int64_t d = 0; d < dim / 2; d++) block[d * BLOCK] = 0;
    }
}

// Words of two rows each: [rows / 2][dim], zero past the end; `rows` is rounded up to `padded`.
void woven(const bf16* from, int64_t stride, int64_t rows, int64_t padded, int64_t dim, pair* to) {
    for (int64_t r = 0; r < padded; r += 2)
        for (int64_t d = 0; d < dim; d += LANES) {
            vu even{}, odd{};
            if (r < rows) even = __builtin_convertvector(*(const vh_any*)(from + r * stride + d), vu);
            if (r + 1 < rows) odd = __builtin_convertvector(*(const vh_any*)(from + (r + 1) * stride + d), vu);
            *(vu_any*)(to + r / 2 * dim + d) = even | odd << 16;
        }
}

// A row of values, rounded (for products over columns).
void put_row(bf16* to, vf x) { store(to, x); }

// The values of two rows as words (for products over rows).
void put_pair(pair* to, vf even, vf odd) {
    *(vu_any*)to = __builtin_convertvector(to_bf16(even), vu) | __builtin_convertvector(to_bf16(odd), vu) << 16;
}

template <>
void forward_task(const Shapes& s, int64_t document, int64_t kv, const bf16* q, const bf16* k, const bf16* v,
                  bf16* out, float* lse, std::vector<float>& scratch) {
    const int64_t begin = s.begins[document], length = s.lengths[document], dim = s.dim, share = s.heads / s.kv_heads;
    const int64_t padded = blocks(length) * BLOCK, q_stride = s.heads * dim, kv_stride = s.kv_heads * dim;
    scratch.resize(padded * dim + BLOCK * dim + BLOCK * BLOCK * 3 / 2 + 2 * BLOCK);
    pair *keys = (pair*)scratch.data(), *values = keys + padded * dim / 2;
    float *sum_v = scratch.data() + padded * dim, *scores = sum_v + BLOCK * dim, *top = scores + BLOCK * BLOCK;
    float* weight = top + BLOCK;
    bf16* p = (bf16*)(weight + BLOCK);
    turned(k + begin * kv_stride + kv * dim, kv_stride, length, dim, keys);
    woven(v + begin * kv_stride + kv * dim, kv_stride, length, padded, dim, values);

    for (int64_t head = kv * share; head < (kv + 1) * share; head++)
        for (int64_t i = 0; i < blocks(length); i++) {
            const int64_t rows = length - i * BLOCK < BLOCK ? length - i * BLOCK : BLOCK;
            const pair* query = (const pair*)(q + (begin + i * BLOCK) * q_stride + head * dim);
            for (int64_t r = 0; r < rows; r++) top[r] = -INFINITY, weight[r] = 0;
            for (int64_t j = 0; j <= (s.causal ? i : blocks(length) - 1); j++) {
                const bool diagonal = s.causal && i == j;
                const int64_t left = length - j * BLOCK < BLOCK ? length - j * BLOCK : BLOCK;
                pair_product(rows, BLOCK, dim / 2, diagonal ? LOWER_C : FULL, query, q_stride / 2, 1,
                             keys + j * BLOCK * dim / 2, BLOCK, scores, BLOCK, false);
                if (diagonal || left < BLOCK) hide(scores, rows, left, diagonal);
                for (int64_t r = 0; r < rows; r++) {
                    const float* row = scores + r * BLOCK;
                    const int64_t end = diagonal ? (r / LANES + 1) * LANES : BLOCK;
                    vf m = load(row);
                    for (int64_t c = LANES; c < end; c += LANES) m = max(m, load(row + c));
                    float high = largest(m) * s.scale;
                    high = high > top[r] ? high : top[r];
                    vf total{};
                    for (int64_t c = 0; c < end; c += LANES) {
                        vf w = exp(load(row + c) * s.scale - high);
                        total += w;
                        store(p + r * BLOCK + c, w);
                    }
                    for (int64_t c = end; c < BLOCK; c += LANES) store(p + r * BLOCK + c, vf{});
                    const float keep = std::exp(top[r] - high);
                    weight[r] = weight[r] * keep + sum(total);
                    if (j > 0 && keep != 1.f)
                        for (int64_t d = 0; d < dim; d += LANES)
                            store(sum_v + r * dim + d, load(sum_v + r * dim + d) * keep);
                    top[r] = high;
                }
                pair_product(rows, dim, BLOCK / 2, diagonal ? LOWER_A : FULL, (const pair*)p, BLOCK / 2, 1,
                             values + j * BLOCK / 2 * dim, dim, sum_v, dim, j > 0);
            }
            for (int64_t r = 0; r < rows; r++) {
                const int64_t token = begin + i * BLOCK + r;
                for (int64_t d = 0; d < dim; d += LANES)
                    store(out + token * q_stride + head * dim + d, load(sum_v + r * dim + d) * (1.f / weight[r]));
                if (lse) lse[token * s.heads + head] = top[r] + std::log(weight[r]);
            }
        }
}

template <>
void backward_task(const Shapes& s, int64_t document, int64_t kv, const bf16* q, const bf16* k, const bf16* v,
                   const bf16* out, const float* lse, const bf16* grad, bf16* grad_q, bf16* grad_k, bf16* grad_v,
                   std::vector<float>& scratch) {
    const int64_t begin = s.begins[document], length = s.lengths[document], dim = s.dim, share = s.heads / s.kv_heads;
    const int64_t padded = blocks(length) * BLOCK, q_stride = s.heads * dim, kv_stride = s.kv_heads * dim;
    scratch.resize(padded * dim * 7 / 2 + 2 * BLOCK * dim + 2 * BLOCK * BLOCK + 3 * BLOCK * BLOCK / 2);
    float *sum_k = scratch.data(), *sum_v = sum_k + padded * dim, *sum_q = sum_v + padded * dim;
    float *scores = sum_q + BLOCK * dim, *ds = scores + BLOCK * BLOCK;
    pair *keys_turned = (pair*)(ds + BLOCK * BLOCK), *values_turned = keys_turned + padded * dim / 2;
    pair *keys_woven = values_turned + padded * dim / 2, *query_woven = keys_woven + padded * dim / 2;
    pair *from_woven = query_woven + BLOCK * dim / 2, *p_woven = from_woven + BLOCK * dim / 2;
    pair* ds_woven = p_woven + BLOCK * BLOCK / 2;
    bf16* ds_rows = (bf16*)(ds_woven + BLOCK * BLOCK / 2);
    turned(k + begin * kv_stride + kv * dim, kv_stride, length, dim, keys_turned);
    turned(v + begin * kv_stride + kv * dim, kv_stride, length, dim, values_turned);
    woven(k + begin * kv_stride + kv * dim, kv_stride, length, padded, dim, keys_woven);
    memset(sum_k, 0, 2 * padded * dim * sizeof(float));

    for (int64_t head = kv * share; head < (kv + 1) * share; head++)
        for (int64_t i = 0; i < blocks(length); i++) {
            const int64_t rows = length - i * BLOCK < BLOCK ? length - i * BLOCK : BLOCK, pairs = (rows + 1) / 2;
            const int64_t first = (begin + i * BLOCK) * q_stride + head * dim;
            const pair *query = (const pair*)(q + first), *from = (const pair*)(grad + first);
            woven(q + first, q_stride, rows, 2 * pairs, dim, query_woven);
            woven(grad + first, q_stride, rows, 2 * pairs, dim, from_woven);
            float delta[BLOCK];
            for (int64_t r = 0; r < rows; r++) {
                vf dot{};
                for (int64_t d = 0; d < dim; d += LANES)
                    dot += load(grad + first + r * q_stride + d) * load(out + first + r * q_stride + d);
                delta[r] = sum(dot);
            }
            for (int64_t j = 0; j <= (s.causal ? i : blocks(length) - 1); j++) {
                const bool diagonal = s.causal && i == j;
                const Shape lower_c = diagonal ? LOWER_C : FULL, upper_a = diagonal ? UPPER_A : FULL;
                const int64_t left = length - j * BLOCK < BLOCK ? length - j * BLOCK : BLOCK;
                pair_product(rows, BLOCK, dim / 2, lower_c, query, q_stride / 2, 1, keys_turned + j * BLOCK * dim / 2,
                             BLOCK, scores, BLOCK, false);
                pair_product(rows, BLOCK, dim / 2, lower_c, from, q_stride / 2, 1,
                             values_turned + j * BLOCK * dim / 2, BLOCK, ds, BLOCK, false);
                if (diagonal || left < BLOCK) hide(scores, rows, left, diagonal);
                for (int64_t r = 0; r < rows; r += 2) {
                    // Scores that the product left out are -inf: their weight is 0, whatever ds holds.
                    const int64_t end = diagonal ? (r / LANES + 1) * LANES : BLOCK;
                    for (int64_t c = 0; c < BLOCK; c += LANES) {
                        vf w[2] = {}, g[2] = {};
                        for (int64_t m = 0; m < 2 && r + m < rows && c < end; m++) {
                            const float log_sum = lse[(begin + i * BLOCK + r + m) * s.heads + head];
                            w[m] = exp(load(scores + (r + m) * BLOCK + c) * s.scale - log_sum);
                            g[m] = w[m] * (load(ds + (r + m) * BLOCK + c) - delta[r + m]);
                            put_row(ds_rows + (r + m) * BLOCK + c, g[m]);
                        }
                        if (c >= end)
                            for (int64_t m = 0; m < 2; m++) put_row(ds_rows + (r + m) * BLOCK + c, vf{});
                        put_pair(p_woven + r / 2 * BLOCK + c, w[0], w[1]);
                        put_pair(ds_woven + r / 2 * BLOCK + c, g[0], g[1]);
                    }
                }
                pair_product(left, dim, pairs, upper_a, p_woven, 1, BLOCK, from_woven, dim, sum_v + j * BLOCK * dim,
                             dim, true);
                pair_product(left, dim, pairs, upper_a, ds_woven, 1, BLOCK, query_woven, dim,
                             sum_k + j * BLOCK * dim, dim, true);
                pair_product(rows, dim, BLOCK / 2, diagonal ? LOWER_A : FULL, (const pair*)ds_rows, BLOCK / 2, 1,
                             keys_woven + j * BLOCK / 2 * dim, dim, sum_q, dim, j > 0);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t d = 0; d < dim; d += LANES)
                    store(grad_q + first + r * q_stride + d, load(sum_q + r * dim + d) * s.scale);
        }
    for (int64_t r = 0; r < length; r++)
        for (int64_t d = 0; d < dim; d += LANES) {
            const int64_t place = (begin + r) * kv_stride + kv * dim + d;
            store(grad_k + place, load(sum_k + r * dim + d) * s.scale);
            store(grad_v + place, load(sum_v + r * dim + d));
        }
}

}  // namespace

#endif
