// The products of one row of a weight with a few inputs, at the speed at which the row can be read.
#pragma once
#include "vec.h"

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
template <class T, int ROWS, int UNROLL = (ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1)>
static inline void dots(int64_t k, const T* w, const typename Dot<T>::X* x, int64_t x_stride, float* out) {
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

