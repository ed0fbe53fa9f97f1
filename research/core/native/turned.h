// Rows of numbers turned to columns, widened to float.
#pragma once
#include "vec.h"

static inline float value_of(float x) { return x; }
static inline float value_of(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#if defined(__AVX512F__)
static inline void turn_square(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // 128-bit parts of rows i, i + 4, i + 8, i + 12 make the columns i, 4 + i, 8 + i, 12 + i
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}
#endif


constexpr int64_t SQUARE = LANES * LANES * 4;  // bytes of the numbers that are turned at one time

// What columns d .. d + columns<T>() - 1 of LANES rows hold, in to(column, register); row i is at from(i), rows at and past
// `count` are zero.
template <class T>
constexpr int64_t columns() { return LANES * 4 / sizeof(T); }

template <class T, class From, class To>
static inline __attribute__((always_inline)) void turn_block(From from, int64_t count, int64_t d, To to) {
#if defined(__AVX512F__)
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = i < count ? _mm512_loadu_si512(from(i) + d) : _mm512_setzero_si512();
    turn_square(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if constexpr (sizeof(T) == 4) {
            to(d + i, (vf)r[i]);
        } else {  // words of two elements
            to(d + 2 * i, (vf)_mm512_slli_epi32(r[i], 16));
            to(d + 2 * i + 1, (vf)_mm512_and_si512(r[i], _mm512_set1_epi32((int)0xffff0000u)));
        }
#else
    for (int64_t e = d; e < d + columns<T>(); e++) {
        vf column{};
        for (int i = 0; i < LANES && i < count; i++) column[i] = value_of(from(i)[e]);
        to(e, column);
    }
#endif
}

// The columns from d on that make no whole block.
template <class T, class From, class To>
static inline void turn_rest(From from, int64_t count, int64_t d, int64_t depth, To to) {
    for (; d < depth; d++) {
        vf column{};
        for (int i = 0; i < LANES && i < count; i++) column[i] = value_of(from(i)[d]);
        to(d, column);
    }
}

// LANES rows of `depth` elements -> floats to[depth][stride]. after() is called behind each block.
template <class T, class From, class After>
static inline void turn_rows(From from, int64_t count, int64_t depth, float* to, int64_t stride, After after) {
    const auto put = [=](int64_t d, vf column) { store(to + d * stride, column); };
    int64_t d = 0;
    for (; d + columns<T>() <= depth; d += columns<T>()) {
        turn_block<T>(from, count, d, put);
        after();
    }
    turn_rest<T>(from, count, d, depth, put);
}

// Fetches from memory what comes `ahead` (null: nothing), a block at each call.
struct Fetch {
    const char* ahead;
    void operator()() {
        if (!ahead) return;
#pragma GCC unroll 16
        for (int64_t line = 0; line < SQUARE; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        ahead += SQUARE;
    }
};

// Rows `row_stride` apart.
template <class T>
static inline void turn(const T* from, int64_t row_stride, int64_t count, int64_t depth, float* to, int64_t stride,
                        const T* ahead) {
    turn_rows<T>([=](int64_t i) { return from + i * row_stride; }, count, depth, to, stride, Fetch{(const char*)ahead});
}

// Rows anywhere.
template <class T>
static inline void turn(const T* const* from, int64_t count, int64_t depth, float* to, int64_t stride) {
    turn_rows<T>([=](int64_t i) { return from[i]; }, count, depth, to, stride, [] {});
}
