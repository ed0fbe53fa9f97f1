// What the attention kernels share: the shapes of a call, blocks, and the mask inside one.
#pragma once
#include <vector>

#include "vec.h"

constexpr int64_t BLOCK = 64;

struct Shapes {
    int64_t documents, heads, kv_heads, dim;
    const int64_t *begins, *lengths;
    bool causal;
    float scale;
};

static inline int64_t blocks(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

// Keys past the document, or after the query in the diagonal block, get no weight.
static inline void hide(float* scores, int64_t rows, int64_t keys, bool diagonal) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t seen = diagonal && r + 1 < keys ? r + 1 : keys;
        for (int64_t c = seen; c < BLOCK; c++) scores[r * BLOCK + c] = -INFINITY;
    }
}
