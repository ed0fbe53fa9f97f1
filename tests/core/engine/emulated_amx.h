// What a processor with AMX_BF16 and AVX512_BF16 does, for one that has AVX-512 only: included before a kernel's source.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512BF16__ 1
#define __AMX_BF16__ 1

namespace emulated {

inline float widened(uint16_t bits) {
    const uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline __m256i rounded(__m512 x) {
    float from[16];
    uint16_t to[16];
    memcpy(from, &x, 64);
    for (int i = 0; i < 16; i++) {
        uint32_t word;
        memcpy(&word, from + i, 4);
        to[i] = std::isnan(from[i]) ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    }
    __m256i out;
    memcpy(&out, to, 32);
    return out;
}

inline float pair_product(float sum, const uint16_t* a, const uint16_t* b) {
    sum += widened(a[0]) * widened(b[0]);
    return sum + widened(a[1]) * widened(b[1]);
}

template <class Pairs>
inline __m512 pairs(__m512 sums, Pairs a, Pairs b) {
    float to[16];
    uint16_t x[32], y[32];
    memcpy(to, &sums, 64), memcpy(x, &a, 64), memcpy(y, &b, 64);
    for (int i = 0; i < 16; i++) to[i] = pair_product(to[i], x + 2 * i, y + 2 * i);
    memcpy(&sums, to, 64);
    return sums;
}

struct Tile {
    unsigned char rows[16][64];
};
inline thread_local Tile tile[8];
inline thread_local bool configured = false;

inline void configure(const void* layout) {
    const auto* bytes = (const unsigned char*)layout;
    configured = bytes[0] == 1 && bytes[1] == 0;  // palette 1, from row 0; eight tiles of 16 rows of 64 bytes
    for (int i = 0; i < 8; i++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        configured = configured && row_bytes == 64 && bytes[48 + i] == 16;
    }
}
inline void check() {
    if (!configured) __builtin_trap();  // the processor raises an invalid instruction, too
}
inline void read(int at, const void* from, long stride) {
    check();
    for (int r = 0; r < 16; r++) memcpy(tile[at].rows[r], (const char*)from + r * stride, 64);
}
inline void write(int at, void* to, long stride) {
    check();
    for (int r = 0; r < 16; r++) memcpy((char*)to + r * stride, tile[at].rows[r], 64);
}
inline void clear(int at) {
    check();
    memset(&tile[at], 0, sizeof(Tile));
}
static long products = 0;  // of this library alone: what is inline is one in a process
inline void multiply(int to, int a, int b) {
    check();
    products++;
    float sums[16][16];
    uint16_t x[16][32], y[16][32];
    memcpy(sums, &tile[to], 1024), memcpy(x, &tile[a], 1024), memcpy(y, &tile[b], 1024);
    for (int m = 0; m < 16; m++)
        for (int pair = 0; pair < 16; pair++)
            for (int n = 0; n < 16; n++) sums[m][n] = pair_product(sums[m][n], x[m] + 2 * pair, y[pair] + 2 * n);
    memcpy(&tile[to], sums, 1024);
}

}  // namespace emulated

extern "C" __attribute__((used)) long tile_products() { return emulated::products; }

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _mm512_cvtneps_pbh emulated::rounded
#define _mm512_dpbf16_ps emulated::pairs
#define _tile_loadconfig emulated::configure
#define _tile_release() (emulated::configured = false)
#define _tile_loadd emulated::read
#define _tile_stored emulated::write
#define _tile_zero emulated::clear
#define _tile_dpbf16ps emulated::multiply
#define syscall(...) 0  // the right to use tiles is given
