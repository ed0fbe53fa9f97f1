// Products of bfloat16 on the processor's matrix tiles (AMX: Intel's Software Developer's Manual, volume 1, chapter 18).
//
// A tile has 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 values by 32 rows of 16: tiles of weight rows are
// read as they lie, inputs are arranged beforehand, for all weights that meet them. Sums are float32 and made in the same
// order whatever the number of inputs.
#pragma once
#include "products.h"

// Without tiles, or for other types.
template <class X>
static void arrange_inputs(X*, int64_t, std::vector<X>&) {}
template <class T, int WEIGHTS, class X>
static const float* tiles_task(int64_t, int64_t, const X*, int64_t, const T* const (&)[WEIGHTS], const T* const (&)[WEIGHTS],
                               int64_t, ProductScratch<T>&) {
    return nullptr;
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

// Whether this process may use tiles: Linux wants to be asked, because they make the state of a thread 8 KB larger.
static inline bool may_use_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = [] {
        const char* chosen = getenv("QWEN_AMX");
        return !(chosen && !strcmp(chosen, "0")) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return may;
}

// A thread's use of tiles, from its making to its end: all eight with 16 rows of 64 bytes.
class Tiles {
   public:
    explicit Tiles(bool used) : used_(used) {
        if (!used_) return;
        // In read-only memory: GCC 12 does not tell its optimiser that all of it is read.
        static const struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } layout;
        static_assert(sizeof layout == 64);
        _tile_loadconfig(&layout);
    }
    ~Tiles() {
        if (used_) _tile_release();
    }
    Tiles(const Tiles&) = delete;

   private:
    const bool used_;
};

// Sixteen inputs [16][stride] in place to [stride / 2][16][2]: 32 values of each are a tile, its rows are pairs of values.
static void arrange_inputs(bf16* x, int64_t stride, std::vector<bf16>& scratch) {
    scratch.resize(LANES * stride);
    memcpy((void*)scratch.data(), x, LANES * stride * sizeof(bf16));
    for (int64_t d = 0; d < stride; d += STEP) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(scratch.data() + i * stride + d);
        turn_square(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(x + d * LANES + i * STEP, r[i]);
    }
}

// sums [1 or 2 groups of inputs][2 panels][16 weight rows][16 inputs] (+)= one or two panels of 16 weight rows times the
// groups, over `steps` times 32 values.
template <bool TWO_PANELS, bool TWO_GROUPS>
static void meet_tiles(int64_t steps, const bf16* w, int64_t w_stride, const bf16* x, int64_t x_stride, float* sums, bool anew,
                       const bf16* next) {
    constexpr int64_t SUMS = LANES * LANES, ROW = LANES * sizeof(float);
    asm volatile("" ::: "memory");  // what is loaded below is stored by now: GCC 12's loads do not say that they read memory
    if (anew) {
        _tile_zero(0);
        if (TWO_PANELS) _tile_zero(1);
        if (TWO_GROUPS) _tile_zero(2);
        if (TWO_PANELS && TWO_GROUPS) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, ROW);
        if (TWO_PANELS) _tile_loadd(1, sums + SUMS, ROW);
        if (TWO_GROUPS) _tile_loadd(2, sums + 2 * SUMS, ROW);
        if (TWO_PANELS && TWO_GROUPS) _tile_loadd(3, sums + 3 * SUMS, ROW);
    }
    Fetch fetch{(const char*)next};
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, w + s * STEP, w_stride * sizeof(bf16));
        _tile_loadd(6, x + s * STEP * LANES, ROW);
        _tile_dpbf16ps(0, 4, 6);
        fetch();
        if (TWO_PANELS) {
            _tile_loadd(5, w + LANES * w_stride + s * STEP, w_stride * sizeof(bf16));
            _tile_dpbf16ps(1, 5, 6);
            fetch();
        }
        if (TWO_GROUPS) {
            _tile_loadd(7, x + LANES * x_stride + s * STEP * LANES, ROW);
            _tile_dpbf16ps(2, 4, 7);
            if (TWO_PANELS) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, ROW);
    if (TWO_PANELS) _tile_stored(1, sums + SUMS, ROW);
    if (TWO_GROUPS) _tile_stored(2, sums + 2 * SUMS, ROW);
    if (TWO_PANELS && TWO_GROUPS) _tile_stored(3, sums + 3 * SUMS, ROW);
}

// As product_task, of arranged inputs. x_stride is a whole number of steps.
template <int WEIGHTS>
static const float* tiles_task(int64_t rows, int64_t k, const bf16* x, int64_t x_stride, const bf16* const (&w)[WEIGHTS],
                               const bf16* const (&next)[WEIGHTS], int64_t count, ProductScratch<bf16>& scratch) {
    constexpr int64_t DEEP = 512;  // of k, after which other inputs come: the weights stay in the first cache
    constexpr int64_t GROUP = 2 * LANES * LANES;  // sums of one group of inputs
    const int64_t groups = (rows + LANES - 1) / LANES;
    scratch.tile_sums.resize(groups * GROUP);
    scratch.results.resize(WEIGHTS * rows * PANEL);
    float* const sums = scratch.tile_sums.data();
    for (int m = 0; m < WEIGHTS; m++) {
        const bf16* from = w[m];
        int64_t stride = k;
        if (count % LANES || k % STEP) {  // a tile would end behind the matrix
            scratch.tails.assign(PANEL * x_stride, bf16{});
            for (int64_t c = 0; c < count; c++)
                memcpy((void*)(scratch.tails.data() + c * x_stride), w[m] + c * k, k * sizeof(bf16));
            from = scratch.tails.data(), stride = x_stride;
        }
        for (int64_t begin = 0; begin < x_stride; begin += DEEP) {
            const int64_t steps = ((begin + DEEP < x_stride ? begin + DEEP : x_stride) - begin) / STEP;
            for (int64_t group = 0; group < groups; group += 2) {
                const bool two = group + 1 < groups, anew = begin == 0;
                const bf16* inputs = x + group * LANES * x_stride + begin * LANES;
                const bf16* ahead = next[m] && !group ? next[m] + begin * count : nullptr;
                float* to = sums + group * GROUP;
                if (count > LANES && two) meet_tiles<true, true>(steps, from + begin, stride, inputs, x_stride, to, anew, ahead);
                else if (count > LANES) meet_tiles<true, false>(steps, from + begin, stride, inputs, x_stride, to, anew, ahead);
                else if (two) meet_tiles<false, true>(steps, from + begin, stride, inputs, x_stride, to, anew, ahead);
                else meet_tiles<false, false>(steps, from + begin, stride, inputs, x_stride, to, anew, ahead);
            }
        }
        for (int64_t group = 0; group < groups; group++)
            for (int64_t panel = 0; panel < count; panel += LANES) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(sums + group * GROUP + (panel + i) * LANES);
                turn_square(r);
                for (int64_t i = 0; i < LANES && group * LANES + i < rows; i++)
                    store(scratch.results.data() + (m * rows + group * LANES + i) * PANEL + panel, (vf)r[i]);
            }
    }
    return scratch.results.data();
}

#else

static inline bool may_use_tiles() { return false; }
struct Tiles {
    explicit Tiles(bool) {}
};

#endif
