// Inputs times a weight where it lies, for any number of rows: x [rows, k] W^T with W [n, k], sums in float32.
//
// A tile of ROWS inputs and COLUMNS weight rows runs along k with one register of partial sums for each result. The order
// of the additions that make a result is the same in every tile, so a row's results do not depend, in any bit, on the
// other rows of the batch. bfloat16 is multiplied by the processor's own product of pairs where it has one, and otherwise
// widened in registers: the even and the odd elements of a word are one operation each (a shift, a mask).
#pragma once
#include <vector>

#include "vec.h"

typedef uint32_t vu_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

constexpr int STEP = 2 * LANES;  // elements of k that one step of a tile takes, whatever the type
constexpr int MOST_TILE_ROWS = 8;
constexpr int MOST_COLUMNS = 48;  // weight rows that are worked on together
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int columns_of(int rows) { return rows <= 3 ? 1 : rows == 4 ? 2 : 3; }  // 24 sums of 32 registers
constexpr int HIGH_TILE = 8;
#else
constexpr int columns_of(int rows) { return rows <= 3 ? 1 : 2; }  // 8 sums of 16 registers
constexpr int HIGH_TILE = 4;
#endif

// How a tile takes weights of a type: W a register of them, X one of inputs; a step has PARTS of them.
template <class T>
struct Taken {  // float
    typedef float Input;
    static constexpr int PARTS = 2;
    template <int PART>
    static vf weight(const T* p) { return load(p + PART * LANES); }
    template <int PART>
    static vf input(const Input* p) { return load(p + PART * LANES); }
    static vf add(vf sum, vf w, vf x) { return multiply_add(w, x, sum); }
    static void expand(const float* from, Input* to) {
        store(to, load(from));
        store(to + LANES, load(from + LANES));
    }
};

#if defined(__AVX512BF16__)
template <>
struct Taken<bf16> {
    typedef bf16 Input;
    static constexpr int PARTS = 1;
    template <int PART>
    static __m512i weight(const bf16* p) { return _mm512_loadu_si512(p); }
    template <int PART>
    static __m512i input(const bf16* p) { return _mm512_loadu_si512(p); }
    static vf add(vf sum, __m512i w, __m512i x) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
    }
    static void expand(const bf16* from, Input* to) { memcpy((void*)to, from, STEP * sizeof(bf16)); }
};
constexpr bool WIDENS = false;
#else
template <>
struct Taken<bf16> {  // inputs are expanded once to floats, even elements of a step before odd ones
    typedef float Input;
    static constexpr int PARTS = 2;
    template <int PART>
    static vf weight(const bf16* p) {
        const vu words = *(const vu_any*)p;
        return PART == 0 ? (vf)(words << 16) : (vf)(words & 0xffff0000u);
    }
    template <int PART>
    static vf input(const Input* p) { return load(p + PART * LANES); }
    static vf add(vf sum, vf w, vf x) { return multiply_add(w, x, sum); }
    static void expand(const bf16* from, Input* to) {
        store(to, weight<0>(from));
        store(to + LANES, weight<1>(from));
    }
};
constexpr bool WIDENS = true;
#endif

static inline int64_t whole_steps(int64_t k) { return (k + STEP - 1) / STEP * STEP; }

template <class L, class T, int ROWS, int COLUMNS, int PART>
static inline __attribute__((always_inline)) void part_of_step(vf (&sums)[ROWS][COLUMNS], const T* w, int64_t w_stride,
                                                                const typename L::Input* x, int64_t x_stride) {
    decltype(L::template weight<PART>(w)) weights[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; c++) weights[c] = L::template weight<PART>(w + c * w_stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const auto input = L::template input<PART>(x + r * x_stride);
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = L::add(sums[r][c], weights[c], input);
    }
}

// `to` [ROWS][to_stride]: the registers of partial sums, begun anew or gone on with.
template <class L, class T, int ROWS, int COLUMNS>
static void tile_of_product(int64_t steps, const T* w, int64_t w_stride, const typename L::Input* x, int64_t x_stride,
                            vf* to, int64_t to_stride, bool anew) {
    vf sums[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = anew ? vf{} : to[r * to_stride + c];
    for (int64_t s = 0; s < steps; s++) {
        part_of_step<L, T, ROWS, COLUMNS, 0>(sums, w, w_stride, x, x_stride);
        if constexpr (L::PARTS == 2) part_of_step<L, T, ROWS, COLUMNS, 1>(sums, w, w_stride, x, x_stride);
        w += STEP;
        x += STEP;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) to[r * to_stride + c] = sums[r][c];
}

// The sums of LANES registers, one after another in one register; each is made in one fixed order.
static inline vf sums_of(const vf* v) {
#if defined(__AVX512F__)
    __m512 t[16];
    for (int i = 0; i < 16; i++) t[i] = (__m512)v[i];
    for (int i = 0; i < 8; i++) {
        const __m512 a = t[2 * i], b = t[2 * i + 1];
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        t[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    for (int count = 2; count >= 1; count--)
        for (int i = 0; i < count; i++) {
            const __m512 a = t[2 * i], b = t[2 * i + 1];
            t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
    return (vf)t[0];
#else
    vf out;
    for (int i = 0; i < LANES; i++) out[i] = sum(v[i]);
    return out;
#endif
}

// What a thread keeps between products.
template <class T>
struct ProductScratch {
    typedef typename Taken<T>::Input Input;
    std::vector<Input> inputs;  // [blocks of k][MOST_TILE_ROWS][elements of a block]
    std::vector<T> tails;       // of the weight rows, where k is no whole number of steps: [MOST_COLUMNS][STEP]
    std::vector<float> wide;    // widened weight rows [MOST_COLUMNS][k]
    std::vector<vf> sums;       // [MOST_TILE_ROWS][MOST_COLUMNS]
    const void* expanded = nullptr;  // the inputs that `inputs` has
    void forget() { expanded = nullptr; }
};

template <class L, class T, int ROWS>
static void columns_of_product(int64_t steps, int64_t count, const T* w, int64_t w_stride,
                               const typename L::Input* x, int64_t x_stride, vf* sums, bool anew) {
    constexpr int COLUMNS = columns_of(ROWS);
    int64_t c = 0;
    for (; c + COLUMNS <= count; c += COLUMNS)
        tile_of_product<L, T, ROWS, COLUMNS>(steps, w + c * w_stride, w_stride, x, x_stride, sums + c, MOST_COLUMNS,
                                             anew);
    for (; c < count; c++)
        tile_of_product<L, T, ROWS, 1>(steps, w + c * w_stride, w_stride, x, x_stride, sums + c, MOST_COLUMNS, anew);
}

template <class L, class T>
static void columns_of_product(int rows, int64_t steps, int64_t count, const T* w, int64_t w_stride,
                               const typename L::Input* x, int64_t x_stride, vf* sums, bool anew) {
    switch (rows) {
#define CASE(R)                                                                               \
    case R:                                                                                   \
        columns_of_product<L, T, R>(steps, count, w, w_stride, x, x_stride, sums, anew);      \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

// One task: `rows` inputs [rows, stride] times `count` <= MOST_COLUMNS weight rows w [count, k], for each of the WEIGHTS
// matrices. Calls done(first, rows <= 8, results) for runs of rows; results[matrix] is [rows][MOST_COLUMNS].
template <class T, int WEIGHTS, class Done>
static void product_task(int64_t rows, int64_t k, const T* x, int64_t x_stride, const T* const (&w)[WEIGHTS],
                         int64_t count, ProductScratch<T>& scratch, Done done) {
    typedef Taken<T> L;
    typedef typename L::Input Input;
    const int64_t whole = k / STEP * STEP, padded = whole_steps(k);
    const int64_t pieces = (padded + 511) / 512, piece = whole_steps((padded + pieces - 1) / pieces);
    const bool widen = WIDENS && sizeof(T) == 2 && rows >= 48;
    scratch.sums.resize(MOST_TILE_ROWS * MOST_COLUMNS);
    scratch.inputs.resize(pieces * MOST_TILE_ROWS * piece);
    scratch.tails.resize(WEIGHTS * MOST_COLUMNS * STEP);
    if (whole < k)
        for (int m = 0; m < WEIGHTS; m++)
            for (int64_t c = 0; c < count; c++) {
                T* tail = scratch.tails.data() + (m * MOST_COLUMNS + c) * STEP;
                memset((void*)tail, 0, STEP * sizeof(T));
                memcpy((void*)tail, w[m] + c * k + whole, (k - whole) * sizeof(T));
            }
    if constexpr (WIDENS && sizeof(T) == 2)
        if (widen) {
            scratch.wide.resize(WEIGHTS * MOST_COLUMNS * padded);
            for (int m = 0; m < WEIGHTS; m++)
                for (int64_t c = 0; c < count; c++) {
                    float* to = scratch.wide.data() + (m * MOST_COLUMNS + c) * padded;
                    for (int64_t i = 0; i < whole; i += STEP) L::expand(w[m] + c * k + i, to + i);
                    if (whole < k) L::expand(scratch.tails.data() + (m * MOST_COLUMNS + c) * STEP, to + whole);
                }
        }
    const bool have = rows <= HIGH_TILE && scratch.expanded == x;
    scratch.expanded = rows <= HIGH_TILE ? x : nullptr;
    alignas(64) float results[WEIGHTS][MOST_TILE_ROWS * MOST_COLUMNS];
    for (int64_t first = 0; first < rows; first += HIGH_TILE) {
        const int64_t height = rows - first < HIGH_TILE ? rows - first : HIGH_TILE;
        for (int m = 0; m < WEIGHTS; m++) {
            vf* sums = scratch.sums.data();
            for (int64_t begin = 0; begin < padded; begin += piece) {
                const int64_t end = begin + piece < padded ? begin + piece : padded;
                Input* block = scratch.inputs.data() + begin * MOST_TILE_ROWS;
                if (!have && m == 0)
                    for (int64_t r = 0; r < height; r++)
                        for (int64_t i = begin; i < end; i += STEP)
                            L::expand(x + (first + r) * x_stride + i, block + r * piece + i - begin);
                const int64_t inner = (end < whole ? end : whole) - begin;
                if constexpr (WIDENS && sizeof(T) == 2)
                    if (widen) {
                        const float* wide = scratch.wide.data() + m * MOST_COLUMNS * padded + begin;
                        columns_of_product<Taken<float>, float>(height, (end - begin) / STEP, count, wide, padded, block,
                                                                piece, sums, begin == 0);
                        continue;
                    }
                if (inner > 0)
                    columns_of_product<L, T>(height, inner / STEP, count, w[m] + begin, k, block, piece, sums,
                                             begin == 0);
                if (end > whole)
                    columns_of_product<L, T>(height, 1, count, scratch.tails.data() + m * MOST_COLUMNS * STEP, STEP,
                                             block + whole - begin, piece, sums, whole == 0);
            }
            for (int64_t r = 0; r < height; r++)
                for (int64_t c = 0; c < count; c += LANES)
                    store(results[m] + r * MOST_COLUMNS + c, sums_of(sums + r * MOST_COLUMNS + c));
        }
        done(first, height, results);
    }
}
