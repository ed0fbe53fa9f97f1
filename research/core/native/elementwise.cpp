// RMSNorm, SwiGLU, rotary positions and softmax cross-entropy: one pass over memory each, float32 inside. Forward
// results are rounded where torch's separate operators round them (this file is compiled without contraction to
// multiply-add), so forward results are mostly bit-equal to theirs.
#include "vec.h"

namespace {

template <class T>
void norm_forward(int64_t rows, int64_t width, float eps, const T* x, const T* weight, T* y, float* scale,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * width;
        vf squares{};
        for_vectors(width, [&](int64_t i, auto get, auto) {
            vf a = get(row + i);
            squares += a * a;
        });
        const float s = 1.f / std::sqrt(sum(squares) / width + eps);
        if (scale) scale[r] = s;
        for_vectors(width, [&](int64_t i, auto get, auto put) {
            put(y + r * width + i, get(weight + i) * rounded(get(row + i) * s, row));
        });
    }
}

// grad_weight, where wanted, is [threads, width]: one row of partial sums per thread, zero at the start.
template <class T>
void norm_backward(int64_t rows, int64_t width, const T* x, const T* weight, const float* scale, const T* grad,
                   T* grad_x, float* grad_weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float* partial = grad_weight ? grad_weight + t * width : nullptr;
        for (int64_t r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const T *row = x + r * width, *g = grad + r * width;
            const float s = scale[r];
            vf dot{};
            for_vectors(width, [&](int64_t i, auto get, auto) { dot += get(g + i) * get(weight + i) * get(row + i); });
            const float mean = sum(dot) * s * s / width;
            for_vectors(width, [&](int64_t i, auto get, auto put) {
                vf a = get(row + i), b = get(g + i);
                put(grad_x + r * width + i, (b * get(weight + i) - a * mean) * s);
                if (partial) put(partial + i, get(partial + i) + b * a * s);
            });
        }
    }
}

constexpr int64_t PIECE = 4096;  // elements that one iteration of a flat loop handles

template <class T>
void swiglu_forward(int64_t n, const T* gate, const T* up, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < n; p += PIECE)
        for_vectors(n - p < PIECE ? n - p : PIECE, [&](int64_t i, auto get, auto put) {
            vf a = get(gate + p + i);
            put(out + p + i, rounded(a / (1.f + exp(-a)), gate) * get(up + p + i));
        });
}

template <class T>
void swiglu_backward(int64_t n, const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < n; p += PIECE)
        for_vectors(n - p < PIECE ? n - p : PIECE, [&](int64_t i, auto get, auto put) {
            vf a = get(gate + p + i), g = get(grad + p + i);
            vf s = 1.f / (1.f + exp(-a));
            vf b = get(up + p + i);  // read before a result may take its place
            put(grad_gate + p + i, g * b * s * (1.f + a * (1.f - s)));
            put(grad_up + p + i, g * a * s);
        });
}

// Pairs (i, i + dim / 2) turned by the table's row of their token; `direction` -1 turns back.
template <class T, class Table>
void rotary(int64_t tokens, int64_t heads, int64_t dim, int64_t table_rows, const T* x, const Table* cos,
            const Table* sin, T* out, float direction, int threads) {
    const int64_t part = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const Table *c = cos + t % table_rows * part, *s = sin + t % table_rows * part;
        // float32 tables keep the products in float32, tables in T round them, as torch's operators do
        auto keep = [](vf product) { return rounded(product, (const Table*)nullptr); };
        for (int64_t h = 0; h < heads; h++) {
            const T* from = x + (t * heads + h) * dim;
            T* to = out + (t * heads + h) * dim;
            for_vectors(part, [&](int64_t i, auto get, auto put) {
                vf a = get(from + i), b = get(from + part + i), u = get(c + i), w = get(s + i) * direction;
                put(to + i, keep(a * u) - keep(b * w));
                put(to + part + i, keep(b * u) + keep(a * w));
            });
        }
    }
}

// loss[r] = logsumexp(row) - row[target]; with `grad` the row becomes softmax - one_hot.
template <class T>
void cross_entropy(int64_t rows, int64_t width, T* logits, const int64_t* targets, float* loss, bool grad,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* row = logits + r * width;
        vf top = splat(-INFINITY), total{};
        int64_t whole = width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES) top = max(top, load(row + i));
        float high = largest(top);
        T scalar[LANES];
        store(scalar, splat(-INFINITY));
        memcpy((void*)scalar, row + whole, (width - whole) * sizeof(T));
        const float rest = largest(load(scalar));
        high = rest > high ? rest : high;
        for (int64_t i = 0; i < whole; i += LANES) total += exp(load(row + i) - high);
        const float log_sum = high + std::log(sum(total) + sum(exp(load(scalar) - high)));
        store(scalar, vf{});
        scalar[0] = row[targets[r]];
        loss[r] = log_sum - load(scalar)[0];
        if (!grad) continue;
        for_vectors(width, [&](int64_t i, auto get, auto put) { put(row + i, exp(get(row + i) - log_sum)); });
        scalar[0] = row[targets[r]];
        store_part(row + targets[r], load(scalar) - 1.f, 1);
    }
}

}  // namespace


extern "C" {

void rms_norm_forward(int half, int64_t rows, int64_t width, float eps, const void* x, const void* weight, void* y,
                      float* scale, int threads) {
    if (half)
        norm_forward(rows, width, eps, (const bf16*)x, (const bf16*)weight, (bf16*)y, scale, threads);
    else
        norm_forward(rows, width, eps, (const float*)x, (const float*)weight, (float*)y, scale, threads);
}

void rms_norm_backward(int half, int64_t rows, int64_t width, const void* x, const void* weight, const float* scale,
                       const void* grad, void* grad_x, float* grad_weight, int threads) {
    if (half)
        norm_backward(rows, width, (const bf16*)x, (const bf16*)weight, scale, (const bf16*)grad, (bf16*)grad_x,
                      grad_weight, threads);
    else
        norm_backward(rows, width, (const float*)x, (const float*)weight, scale, (const float*)grad, (float*)grad_x,
                      grad_weight, threads);
}

void swiglu_forward(int half, int64_t n, const void* gate, const void* up, void* out, int threads) {
    if (half)
        swiglu_forward(n, (const bf16*)gate, (const bf16*)up, (bf16*)out, threads);
    else
        swiglu_forward(n, (const float*)gate, (const float*)up, (float*)out, threads);
}

void swiglu_backward(int half, int64_t n, const void* gate, const void* up, const void* grad, void* grad_gate,
                     void* grad_up, int threads) {
    if (half)
        swiglu_backward(n, (const bf16*)gate, (const bf16*)up, (const bf16*)grad, (bf16*)grad_gate, (bf16*)grad_up,
                        threads);
    else
        swiglu_backward(n, (const float*)gate, (const float*)up, (const float*)grad, (float*)grad_gate,
                        (float*)grad_up, threads);
}

void rotary(int half, int half_tables, int64_t tokens, int64_t heads, int64_t dim, int64_t table_rows, const void* x,
            const void* cos, const void* sin, void* out, float direction, int threads) {
    if (half && half_tables)
        rotary(tokens, heads, dim, table_rows, (const bf16*)x, (const bf16*)cos, (const bf16*)sin, (bf16*)out,
               direction, threads);
    else if (half)
        rotary(tokens, heads, dim, table_rows, (const bf16*)x, (const float*)cos, (const float*)sin, (bf16*)out,
               direction, threads);
    else
        rotary(tokens, heads, dim, table_rows, (const float*)x, (const float*)cos, (const float*)sin, (float*)out,
               direction, threads);
}

void cross_entropy(int half, int64_t rows, int64_t width, void* logits, const int64_t* targets, float* loss, int grad,
                   int threads) {
    if (half)
        cross_entropy(rows, width, (bf16*)logits, targets, loss, grad, threads);
    else
        cross_entropy(rows, width, (float*)logits, targets, loss, grad, threads);
}

}  // extern "C"
