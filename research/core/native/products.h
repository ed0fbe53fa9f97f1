// Inputs times a weight where it lies, for any number of rows: x [rows, k] W^T with W [n, k], sums in float32.
//
// Whatever the number of rows, a result is made by the same additions in the same order, so a row's results do not depend,
// in any bit, on the other rows of the batch. There are two kernels here, and one for matrix tiles in tiles.h:
// - With a product of bfloat16 pairs (AVX512_BF16), a tile of ROWS inputs and COLUMNS weight rows runs along k with one
//   register of partial sums for each result, which is summed at the end.
// - Everywhere else weight rows are turned, and widened to float, a piece of k at a time: a register holds one k of LANES
//   weight rows and is multiplied by each input's k, one after another. Turning costs less than reading from memory.
#pragma once
#include <vector>

#include "turned.h"

constexpr int STEP = 2 * LANES;  // inputs are padded with zeros to a multiple of it
constexpr int PANEL = 2 * LANES;  // weight rows that are worked on together

static inline int64_t whole_steps(int64_t k) { return (k + STEP - 1) / STEP * STEP; }

// What inputs of a product are stored as: values of T.
template <class T>
struct InputOf {
    typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct InputOf<bf16> {
    typedef bf16 type;
};
#endif

// --- turned panels ----------------------------------------------------------------------------------------------

constexpr int64_t DEPTH = 128;  // of a panel in k: it stays in the first cache with the inputs that meet it
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int HIGH = 12;  // rows of inputs a tile takes: 24 sums of 32 registers
#else
constexpr int HIGH = 6;  // 12 of 16
#endif

// sums [ROWS][PANEL] += x [ROWS][depth] times VECS registers of each row of panel [depth][PANEL]
template <int ROWS, int VECS>
static void meet(int64_t depth, const float* panel, const float* x, int64_t x_stride, float* sums) {
    vf total[ROWS][VECS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) total[r][v] = load(sums + r * PANEL + v * LANES);
    for (int64_t i = 0; i < depth; i++) {
        vf weights[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) weights[v] = load(panel + i * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const vf value = splat(x[r * x_stride + i]);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) total[r][v] = multiply_add(weights[v], value, total[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) store(sums + r * PANEL + v * LANES, total[r][v]);
}

template <int VECS>
static void meet(int64_t rows, int64_t depth, const float* panel, const float* x, int64_t x_stride, float* sums) {
    for (int64_t r = 0; r < rows; r += HIGH) {
        const float* from = x + r * x_stride;
        float* to = sums + r * PANEL;
        switch (rows - r < HIGH ? rows - r : HIGH) {
#define CASE(R)                                               \
    case R:                                                   \
        meet<R, VECS>(depth, panel, from, x_stride, to);      \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined(__AVX512F__) || defined(__aarch64__)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
        }
    }
}

// What a thread keeps between products.
template <class T>
struct ProductScratch {
    typedef typename InputOf<T>::type Input;
    std::vector<float> panel;
    std::vector<float> results;  // [matrices][rows][PANEL]
#if defined(__AVX512BF16__)
    std::vector<T> tails;  // of the weight rows, where k is no whole number of steps
    std::vector<vf> sums;
    std::vector<float> tile_sums;
#endif
};

// Few rows meet the columns as they are turned; nothing is written in between. PARTS registers of weight rows.
template <class T, int ROWS, int PARTS>
static void meet_turned(int64_t k, const T* w, int64_t count, const float* x, int64_t x_stride, const T* next, float* results) {
    vf total[PARTS][ROWS] = {};
    Fetch fetch{(const char*)next};
    int64_t d = 0;
    const auto one = [&](int part, auto turn_some) {
        const auto row = [=](int64_t i) { return w + (part * LANES + i) * k; };
        turn_some(row, count - part * LANES, [&](int64_t at, vf column) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) total[part][r] = multiply_add(column, splat(x[r * x_stride + at]), total[part][r]);
        });
    };
    for (; d + columns<T>() <= k; d += columns<T>())
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
            one(part, [=](auto row, int64_t rows, auto to) __attribute__((always_inline)) { turn_block<T>(row, rows, d, to); });
            fetch();
        }
    for (int part = 0; part < PARTS; part++)
        one(part, [=](auto row, int64_t rows, auto to) { turn_rest<T>(row, rows, d, k, to); });
    for (int r = 0; r < ROWS; r++)
        for (int part = 0; part < PARTS; part++) store(results + r * PANEL + part * LANES, total[part][r]);
}

// One task: inputs x [rows, stride] times `count` <= PANEL rows of each of the matrices w [.., k]. Returns the results,
// [matrices][rows][PANEL]. `next`: where the thread's next task will read as much, or null.
template <class T, int WEIGHTS>
static const float* product_task(int64_t rows, int64_t k, const float* x, int64_t x_stride, const T* const (&w)[WEIGHTS],
                                 const T* const (&next)[WEIGHTS], int64_t count, ProductScratch<T>& scratch) {
    scratch.results.assign(WEIGHTS * rows * PANEL, 0.f);
    if (rows <= 2) {
        for (int m = 0; m < WEIGHTS; m++) {
            float* results = scratch.results.data() + m * rows * PANEL;
            if (rows == 1 && count > LANES) meet_turned<T, 1, 2>(k, w[m], count, x, x_stride, next[m], results);
            else if (rows == 1) meet_turned<T, 1, 1>(k, w[m], count, x, x_stride, next[m], results);
            else if (count > LANES) meet_turned<T, 2, 2>(k, w[m], count, x, x_stride, next[m], results);
            else meet_turned<T, 2, 1>(k, w[m], count, x, x_stride, next[m], results);
        }
        return scratch.results.data();
    }
    scratch.panel.resize(DEPTH * PANEL);
    for (int64_t begin = 0; begin < k; begin += DEPTH) {
        const int64_t depth = k - begin < DEPTH ? k - begin : DEPTH;
        for (int m = 0; m < WEIGHTS; m++) {
            float* results = scratch.results.data() + m * rows * PANEL;
            for (int64_t part = 0; part < count; part += LANES) {
                const T* ahead = next[m] ? next[m] + begin * count + part * depth : nullptr;
                turn(w[m] + part * k + begin, k, count - part, depth, scratch.panel.data() + part, PANEL, ahead);
            }
            if (count > LANES) meet<2>(rows, depth, scratch.panel.data(), x + begin, x_stride, results);
            else meet<1>(rows, depth, scratch.panel.data(), x + begin, x_stride, results);
        }
    }
    return scratch.results.data();
}

// --- tiles of bfloat16 pairs ------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

constexpr int TILE_HEIGHT = 8;
constexpr int64_t PIECE = 1024;  // of k, after which another tile of inputs comes

template <int ROWS, int COLUMNS>
static void pairs_tile(int64_t steps, const bf16* w, int64_t w_stride, const bf16* x, int64_t x_stride, vf* to, bool anew) {
    __m512 sums[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = anew ? _mm512_setzero_ps() : (__m512)to[r * PANEL + c];
    for (int64_t s = 0; s < steps; s++, w += STEP, x += STEP) {
        __m512bh weights[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) weights[c] = (__m512bh)_mm512_loadu_si512(w + c * w_stride);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512bh input = (__m512bh)_mm512_loadu_si512(x + r * x_stride);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], weights[c], input);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) to[r * PANEL + c] = (vf)sums[r][c];
}

template <int ROWS>
static void pairs_columns(int64_t steps, int64_t count, const bf16* w, int64_t w_stride, const bf16* x, int64_t x_stride,
                          vf* sums, bool anew) {
    constexpr int COLUMNS = ROWS <= 3 ? 1 : ROWS == 4 ? 2 : 3;  // few rows: one stream of weights at a time
    int64_t c = 0;
    for (; c + COLUMNS <= count; c += COLUMNS)
        pairs_tile<ROWS, COLUMNS>(steps, w + c * w_stride, w_stride, x, x_stride, sums + c, anew);
    for (; c < count; c++) pairs_tile<ROWS, 1>(steps, w + c * w_stride, w_stride, x, x_stride, sums + c, anew);
}

static inline void pairs_columns(int rows, int64_t steps, int64_t count, const bf16* w, int64_t w_stride, const bf16* x,
                                 int64_t x_stride, vf* sums, bool anew) {
    switch (rows) {
#define CASE(R)                                                                          \
    case R:                                                                              \
        pairs_columns<R>(steps, count, w, w_stride, x, x_stride, sums, anew);            \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

// The sums of 16 registers, one after another in one register; each is made in one fixed order.
static inline vf sums_of(const vf* v) {
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
}

template <class T, int WEIGHTS>
static const float* product_task(int64_t rows, int64_t k, const bf16* x, int64_t x_stride,
                                 const bf16* const (&w)[WEIGHTS], const bf16* const (&)[WEIGHTS], int64_t count,
                                 ProductScratch<T>& scratch) {
    const int64_t whole = k / STEP * STEP;
    scratch.sums.resize(TILE_HEIGHT * PANEL);
    scratch.tails.resize(PANEL * STEP);
    scratch.results.resize(WEIGHTS * rows * PANEL);
    for (int m = 0; m < WEIGHTS; m++) {
        if (whole < k)
            for (int64_t c = 0; c < count; c++) {
                bf16* tail = scratch.tails.data() + c * STEP;
                memset((void*)tail, 0, STEP * sizeof(bf16));
                memcpy((void*)tail, w[m] + c * k + whole, (k - whole) * sizeof(bf16));
            }
        for (int64_t first = 0; first < rows; first += TILE_HEIGHT) {
            const int64_t height = rows - first < TILE_HEIGHT ? rows - first : TILE_HEIGHT;
            const bf16* from = x + first * x_stride;
            vf* sums = scratch.sums.data();
            for (int64_t begin = 0; begin < whole; begin += PIECE) {
                const int64_t end = begin + PIECE < whole ? begin + PIECE : whole;
                pairs_columns(height, (end - begin) / STEP, count, w[m] + begin, k, from + begin, x_stride, sums, begin == 0);
            }
            if (whole < k)
                pairs_columns(height, 1, count, scratch.tails.data(), STEP, from + whole, x_stride, sums, whole == 0);
            for (int64_t r = 0; r < height; r++)
                for (int64_t c = 0; c < count; c += LANES)
                    store(scratch.results.data() + (m * rows + first + r) * PANEL + c, sums_of(sums + r * PANEL + c));
        }
    }
    return scratch.results.data();
}

#endif
