// y = x W^T + b for few rows of x: the weight is streamed once, row after row, at the speed of the memory.
#include <vector>

#include "vec.h"

namespace {

template <class T>
struct Dot {
    static constexpr int STEP = LANES;
    typedef vf Acc;
    static vf add(vf acc, vf w, const float* x) { return acc + w * load(x); }
    static vf weight(const T* p) { return load(p); }
    typedef float X;
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16> {  // pairs of bfloat16 products are summed in float32
    static constexpr int STEP = 32;
    static vf add(vf acc, __m512i w, const bf16* x) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
    }
    static __m512i weight(const bf16* p) { return _mm512_loadu_si512(p); }
    typedef bf16 X;
};
#endif

// UNROLL independent sums per row of x hide the latency of the multiply-add.
template <class T, int ROWS, int UNROLL>
void dots(int64_t k, const T* w, const typename Dot<T>::X* x, int64_t x_stride, float* out) {
    constexpr int STEP = Dot<T>::STEP;
    vf acc[ROWS][UNROLL];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; u++) acc[r][u] = vf{};
    int64_t i = 0;
    for (; i + UNROLL * STEP <= k; i += UNROLL * STEP)
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; u++) {
            auto weight = Dot<T>::weight(w + i + u * STEP);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) acc[r][u] = Dot<T>::add(acc[r][u], weight, x + r * x_stride + i + u * STEP);
        }
    for (; i < k; i += STEP) {  // x is padded with zeros to a multiple of STEP; the weight must not be read past k
        T part[STEP];
        const T* from = w + i;
        if (i + STEP > k) {
            memset((void*)part, 0, sizeof part);
            memcpy((void*)part, from, (k - i) * sizeof(T));
            from = part;
        }
        auto weight = Dot<T>::weight(from);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) acc[r][0] = Dot<T>::add(acc[r][0], weight, x + r * x_stride + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        vf total = acc[r][0];
#pragma GCC unroll 8
        for (int u = 1; u < UNROLL; u++) total += acc[r][u];
        out[r] = sum(total);
    }
}

template <class T, int ROWS>
void linear(int64_t n, int64_t k, const typename Dot<T>::X* x, int64_t x_stride, const T* weight, const T* bias, T* y,
            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + LANES - 1) / LANES; block++) {
        const int64_t first = block * LANES, count = n - first < LANES ? n - first : LANES;
        float out[LANES][8] = {}, column[LANES];
        for (int64_t c = 0; c < count; c++)
            dots<T, ROWS, (ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1)>(k, weight + (first + c) * k, x, x_stride, out[c]);
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

}  // namespace

extern "C" {

// 1 to 8 rows; bias may be null. All tensors have one type.
void linear_rows(int half, int64_t rows, int64_t n, int64_t k, const void* x, const void* weight, const void* bias,
                 void* y, int threads) {
    if (half)
        linear_rows(rows, n, k, (const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)y, threads);
    else
        linear_rows(rows, n, k, (const float*)x, (const float*)weight, (const float*)bias, (float*)y, threads);
}

}  // extern "C"
