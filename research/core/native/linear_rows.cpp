// y = x W^T + b for few rows of x: the weight is streamed once, row after row, at the speed of the memory. For many rows:
// the weight in panels (products.h), for processors on which torch multiplies bfloat16 slowly.
#include <algorithm>
#include <vector>

#include "dots.h"
#include "products.h"

namespace {

template <class T, int ROWS>
void linear(int64_t n, int64_t k, const typename Dot<T>::X* x, int64_t x_stride, const T* weight, const T* bias, T* y,
            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + LANES - 1) / LANES; block++) {
        const int64_t first = block * LANES, count = n - first < LANES ? n - first : LANES;
        float out[LANES][8] = {}, column[LANES];
        for (int64_t c = 0; c < count; c++)
            dots<T, ROWS>(k, weight + (first + c) * k, x, x_stride, out[c]);
        vf shift = bias ? load_part(bias + first, count < LANES ? count : LANES) : vf{};
        for (int r = 0; r < ROWS; r++) {
            for (int64_t c = 0; c < LANES; c++) column[c] = out[c][r];
            store_part(y + r * n + first, load(column) + shift, count);
        }
    }
}

template <class T>
void linear_rows(int64_t rows, int64_t n, int64_t k, const T* x, const T* weight, const T* bias, T* y, int threads) {
    typedef typename Dot<T>::X X;
    const int64_t stride = (k + Dot<T>::STEP - 1) / Dot<T>::STEP * Dot<T>::STEP;
    std::vector<X> padded(rows * stride, X{});
    for (int64_t r = 0; r < rows; r++)
        if constexpr (sizeof(X) == sizeof(T))
            memcpy((void*)(padded.data() + r * stride), x + r * k, k * sizeof(T));
        else
            for_vectors(k, [&](int64_t i, auto get, auto put) { put(padded.data() + r * stride + i, get(x + r * k + i)); });
    switch (rows) {
#define CASE(R)                                                                     \
    case R:                                                                         \
        linear<T, R>(n, k, padded.data(), stride, weight, bias, y, threads); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

template <class T>
void linear_panels(int64_t rows, int64_t n, int64_t k, const T* x, const T* weight, const T* bias, T* y, int threads) {
    typedef typename InputOf<T>::type Input;
    constexpr int64_t HEIGHT = 144;
    const int64_t stride = whole_steps(k), heights = (rows + HEIGHT - 1) / HEIGHT, across = (n + PANEL - 1) / PANEL;
    std::vector<Input> inputs(rows * stride, Input{});
#pragma omp parallel num_threads(threads)
    {
        ProductScratch<T> scratch;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            for_vectors(k, [&](int64_t i, auto get, auto put) { put(inputs.data() + r * stride + i, get(x + r * k + i)); });
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < across * heights; task++) {
            const int64_t first = task / heights * PANEL, top = task % heights * HEIGHT;
            const int64_t count = std::min<int64_t>(PANEL, n - first), height = std::min(HEIGHT, rows - top);
            const T *w[1] = {weight + first * k}, *next[1] = {};
            const float* results = product_task<T, 1>(height, k, inputs.data() + top * stride, stride, w, next, count, scratch);
            for (int64_t r = 0; r < height; r++)
                for_vectors(count, [&](int64_t i, auto get, auto put) {
                    const vf sum = get(results + r * PANEL + i);
                    put(y + (top + r) * n + first + i, bias ? sum + get(bias + first + i) : sum);
                });
        }
    }
}

}  // namespace

extern "C" {

// Any number of rows; bias may be null. All tensors have one type.
void linear_panels(int half, int64_t rows, int64_t n, int64_t k, const void* x, const void* weight, const void* bias,
                   void* y, int threads) {
    if (half)
        linear_panels(rows, n, k, (const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)y, threads);
    else
        linear_panels(rows, n, k, (const float*)x, (const float*)weight, (const float*)bias, (float*)y, threads);
}

// 1 to 8 rows; bias may be null. All tensors have one type.
void linear_rows(int half, int64_t rows, int64_t n, int64_t k, const void* x, const void* weight, const void* bias,
                 void* y, int threads) {
    if (half)
        linear_rows(rows, n, k, (const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)y, threads);
    else
        linear_rows(rows, n, k, (const float*)x, (const float*)weight, (const float*)bias, (float*)y, threads);
}

}  // extern "C"
