// Causal attention of new tokens over keys and values that lie in the blocks of a paged cache, float32 inside.
//
// A layer's pool is [blocks, kv_heads, block_size, dim]. Keys are taken TILE at a time at positions that are multiples of
// TILE, with a running softmax, so that a token's result depends, to the bit, only on its own keys: not on the tokens that
// are computed with it. dim must be a multiple of LANES, at most MOST_DIM.
#pragma once
#include <algorithm>
#include <vector>

#include "turned.h"

constexpr int64_t TILE = 64, MOST_DIM = 256;
constexpr int64_t PIECE_ROWS = 96;  // queries of all heads of a piece: bounds its scratch

// Which tokens a call computes, and where the keys of their rows lie.
struct PagedRows {
    int64_t rows, most_blocks, block_size;
    const int32_t *tables, *starts, *contexts;  // [rows, most_blocks], [rows + 1], [rows] (lengths after this step)
};

// Some tokens of one row: its queries first .. last - 1.
struct Piece {
    int64_t row, first, last;
};

static inline std::vector<Piece> pieces_of(const PagedRows& rows, int64_t group) {
    std::vector<Piece> pieces;
    const int64_t tokens = std::max<int64_t>(1, PIECE_ROWS / group);
    for (int64_t row = 0; row < rows.rows; row++) {
        const int64_t count = rows.starts[row + 1] - rows.starts[row];
        for (int64_t first = 0; first < count; first += tokens)
            pieces.push_back({row, first, std::min(first + tokens, count)});
    }
    return pieces;
}

// Out: what results are stored as, T or float holding values of T.
template <class T, class Out = T>
struct PagedAttention {
    PagedRows rows;
    int64_t heads, kv_heads, dim, window;  // window 0: everything before
    float scale;
    const T *keys, *values;  // the layer's pools
    const T* q;  // [tokens][q_stride], heads behind each other
    int64_t q_stride;
    Out* out;  // [tokens][out_stride]
    int64_t out_stride;

    // The heads first_head .. last_head - 1 of one kv head's group, for one piece.
    void run(const Piece& piece, int64_t kv, int64_t first_head, int64_t last_head, std::vector<float>& scratch) const {
        const int64_t share = last_head - first_head, count = (piece.last - piece.first) * share;
        const int64_t queries = rows.starts[piece.row + 1] - rows.starts[piece.row];
        const int64_t before = rows.contexts[piece.row] - queries;  // tokens of the row that earlier steps computed
        const int64_t end = before + piece.last, first_seen = lowest(before + piece.first);
        scratch.resize(2 * TILE * MOST_DIM + count * (2 * dim + TILE + 2));
        float *keys_t = scratch.data(), *vals = keys_t + TILE * MOST_DIM, *query = vals + TILE * MOST_DIM;
        float *sums = query + count * dim, *scores = sums + count * dim, *top = scores + count * TILE, *weight = top + count;
        const T* at = q + (rows.starts[piece.row] + piece.first) * q_stride + (kv * (heads / kv_heads) + first_head) * dim;
        for (int64_t r = 0; r < count; r++) {
            const T* from = at + r / share * q_stride + r % share * dim;
            for (int64_t d = 0; d < dim; d += LANES) store(query + r * dim + d, load(from + d) * scale);
            top[r] = -INFINITY, weight[r] = 0;
        }
        memset(sums, 0, count * dim * sizeof(float));
        for (int64_t begin = first_seen / TILE * TILE; begin < end; begin += TILE) {
            const int64_t here = std::min(TILE, end - begin);
            const int64_t skipped = std::max<int64_t>(0, first_seen - begin);
            take_tile(piece.row, kv, begin, here, keys_t, vals);
            product(count, TILE, dim, FULL, query, dim, 1, keys_t, TILE, scores, TILE, false);
            for (int64_t r = 0; r < count; r++) {
                const int64_t position = before + piece.first + r / share;
                soften(scores + r * TILE, std::max<int64_t>(0, lowest(position) - begin),
                       std::min(here, position + 1 - begin), sums + r * dim, top[r], weight[r]);
            }
            product(count, dim, here - skipped, FULL, scores + skipped, TILE, 1, vals + skipped * dim, dim, sums, dim, true);
        }
        Out* to = out + (rows.starts[piece.row] + piece.first) * out_stride + (kv * (heads / kv_heads) + first_head) * dim;
        for (int64_t r = 0; r < count; r++) {
            const float factor = 1.f / weight[r];
            for (int64_t d = 0; d < dim; d += LANES)
                store(to + r / share * out_stride + r % share * dim + d,
                      rounded(load(sums + r * dim + d) * factor, (const T*)nullptr));
        }
    }

    // Tasks of one step: pieces x kv heads x parts of a group, more parts where there are few of the others.
    int64_t parts(int64_t pieces, int threads) const {
        const int64_t group = heads / kv_heads, tasks = pieces * kv_heads;
        return std::max<int64_t>(1, std::min(group, (threads + tasks - 1) / tasks));
    }
    void run(const std::vector<Piece>& pieces, int64_t task, int64_t parts, std::vector<float>& scratch) const {
        const int64_t group = heads / kv_heads, width = (group + parts - 1) / parts;
        const int64_t first = task % parts * width, kv = task / parts % kv_heads;
        if (first < group) run(pieces[task / parts / kv_heads], kv, first, std::min(first + width, group), scratch);
    }

   private:
    int64_t lowest(int64_t position) const { return window && position >= window ? position + 1 - window : 0; }

    void take_tile(int64_t row, int64_t kv, int64_t begin, int64_t count, float* keys_t, float* vals) const {
        const T* at[TILE];
        for (int64_t j = 0; j < count; j++) {
            const int64_t position = begin + j, block = rows.tables[row * rows.most_blocks + position / rows.block_size];
            const int64_t place = ((block * kv_heads + kv) * rows.block_size + position % rows.block_size) * dim;
            at[j] = keys + place;
            for (int64_t d = 0; d < dim; d += LANES) store(vals + j * dim + d, load(values + place + d));
        }
        for (int64_t j = 0; j < TILE; j += LANES) turn(at + j, count - j, dim, keys_t + j, TILE);
    }

    // One row of scores to weights: its keys are low .. high - 1 of the tile, the others get none.
    void soften(float* row, int64_t low, int64_t high, float* sum_v, float& top, float& weight) const {
        if (low >= high) {
            memset(row, 0, TILE * sizeof(float));
            return;
        }
        for (int64_t c = 0; c < low; c++) row[c] = -INFINITY;
        for (int64_t c = high; c < TILE; c++) row[c] = -INFINITY;
        vf m = load(row);
        for (int64_t c = LANES; c < TILE; c += LANES) m = max(m, load(row + c));
        float most = largest(m);
        most = most > top ? most : top;
        vf total{};
        for (int64_t c = 0; c < TILE; c += LANES) {
            const vf p = exp(load(row + c) - most);
            total += p;
            store(row + c, p);
        }
        const float keep = std::exp(top - most);
        weight = weight * keep + sum(total);
        if (keep != 1.f)
            for (int64_t d = 0; d < dim; d += LANES) store(sum_v + d, load(sum_v + d) * keep);
        top = most;
    }
};
