// Portable SIMD on GCC's vector extension: one register of floats, loads and stores for float and bfloat16, exp,
// and the small matrix product that the attention kernel is made of. Compiled with -march=native on the machine
// that runs it; the register width follows the instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 6, TILE_VECS = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 4, TILE_VECS = 2;
#else
constexpr int LANES = 4, TILE_ROWS = 4, TILE_VECS = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef uint16_t vh_any __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline vf load(const bf16* p) {
    vh h = *(const vh_any*)p;
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

// Round to nearest even; NaN stays NaN.
static inline vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu nan = (u >> 16) | 0x40;
    vi is_nan = x != x;
    return __builtin_convertvector((vu)((is_nan & (vi)nan) | (~is_nan & (vi)rounded)), vh);
#endif
}

static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline void store(bf16* p, vf x) { *(vh_any*)p = to_bf16(x); }

// What the value becomes when a tensor of type T holds it.
static inline vf rounded(vf x, const float*) { return x; }
static inline vf rounded(vf x, const bf16*) { return (vf)(__builtin_convertvector(to_bf16(x), vu) << 16); }

// The first n < LANES elements; the others are zero.
template <class T>
static inline vf load_part(const T* p, int64_t n) {
    T part[LANES];
    memset((void*)part, 0, sizeof part);
    memcpy((void*)part, p, n * sizeof(T));
    return load(part);
}
template <class T>
static inline void store_part(T* p, vf x, int64_t n) {
    T part[LANES];
    store(part, x);
    memcpy((void*)p, part, n * sizeof(T));
}

// body(offset, load function, store function) over n elements, the rest shorter than a register included.
template <class Body>
static inline void for_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        body(
            i, [](auto* p) { return load(p); }, [](auto* p, vf x) { store(p, x); });
    if (i < n) {
        int64_t rest = n - i;
        body(
            i, [rest](auto* p) { return load_part(p, rest); }, [rest](auto* p, vf x) { store_part(p, x, rest); });
    }
}

static inline float sum(vf x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}
static inline float largest(vf x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }

// a * b + c with one rounding where the processor has it, whatever the file's flags say about contraction.
static inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

constexpr float COEFFICIENTS[] = {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};

// exp to 2 units in the last place: 2^n * p(r), p the Taylor series on |r| <= ln(2) / 2. exp(-inf) is 0.
static inline vf exp(vf x) {
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = multiply_add(n, splat(-0.693145752f), x);
    r = multiply_add(n, splat(-1.42860677e-6f), r);
    vf p = splat(1.f / 720);
    for (float c : COEFFICIENTS) p = multiply_add(p, r, splat(c));
    // infinities leave NaN in r; the smallest and largest results are those of the bounds
    vf out = (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
    out = x < -104.f ? splat(0) : out;
    return x > 89.f ? splat(INFINITY) : out;
#else
    vi is_nan = x != x;
    vf c = x < -87.3f ? splat(-87.3f) : x;
    c = c > 88.7f ? splat(88.7f) : c;
    vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    vf n = (c * 1.44269504f + magic) - magic;
    vf r = c - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = splat(1.f / 720);
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    vf scale = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    vf out = x < -87.3f ? splat(0) : p * scale;
    return is_nan ? x : out;
#endif
}

// C[m][n] (+)= sum over k in [first(m), last(m)) of A[m * am + k * ak] * B[k * ldb + n], for one tile.
template <int ROWS, int VECS>
static inline void tile(int64_t k0, int64_t k1, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                        float* c, int64_t ldc, bool add) {
    vf acc[ROWS][VECS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) acc[m][v] = add ? load(c + m * ldc + v * LANES) : vf{};
    for (int64_t k = k0; k < k1; k++) {
        vf row[VECS];
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) row[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            float s = a[m * am + k * ak];
#pragma GCC unroll 8
            for (int v = 0; v < VECS; v++) acc[m][v] += s * row[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; v++) store(c + m * ldc + v * LANES, acc[m][v]);
}

// Which part of the product a causal mask leaves: all of it; C above the diagonal is not needed (scores); A is zero
// above the diagonal (probabilities); A is zero below it (their transpose).
enum Shape { FULL, LOWER_C, LOWER_A, UPPER_A };

template <int ROWS>
static inline void strip(int64_t m, int64_t n, int64_t k, Shape shape, const float* a, int64_t am, int64_t ak,
                         const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    int64_t k0 = shape == UPPER_A ? m : 0, k1 = shape == LOWER_A && m + ROWS < k ? m + ROWS : k;
    int64_t end = shape == LOWER_C && m + ROWS < n ? (m + ROWS + LANES - 1) / LANES * LANES : n;
    int64_t j = 0;
    for (; j + TILE_VECS * LANES <= end; j += TILE_VECS * LANES)
        tile<ROWS, TILE_VECS>(k0, k1, a, am, ak, b + j, ldb, c + j, ldc, add);
    for (; j < end; j += LANES) tile<ROWS, 1>(k0, k1, a, am, ak, b + j, ldb, c + j, ldc, add);
}

// The product for m rows; n must be a multiple of LANES.
static inline void product(int64_t m, int64_t n, int64_t k, Shape shape, const float* a, int64_t am, int64_t ak,
                           const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        strip<TILE_ROWS>(i, n, k, shape, a + i * am, am, ak, b, ldb, c + i * ldc, ldc, add);
    for (; i < m; i++) strip<1>(i, n, k, shape, a + i * am, am, ak, b, ldb, c + i * ldc, ldc, add);
}
