// Paged attention of one layer as a call of its own, for models that are computed layer by layer.
#include "paged_attention.h"

namespace {

template <class T>
void attend(const PagedAttention<T>& attention, int threads) {
    const std::vector<Piece> pieces = pieces_of(attention.rows, attention.heads / attention.kv_heads);
    const int64_t parts = attention.parts(pieces.size(), threads);
    const int64_t tasks = pieces.size() * attention.kv_heads * parts;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) attention.run(pieces, task, parts, scratch);
    }
}

}  // namespace

extern "C" {

// q and out [tokens, heads, dim]; pools [blocks, kv_heads, block_size, dim]; tables [rows, most_blocks], starts [rows + 1]
// and contexts [rows] are int32; window 0 is none.
void paged_attention(int half, int64_t rows, int64_t most_blocks, int64_t block_size, int64_t heads, int64_t kv_heads,
                     int64_t dim, int64_t window, float scale, const int32_t* tables, const int32_t* starts,
                     const int32_t* contexts, const void* q, const void* keys, const void* values, void* out, int threads) {
    const PagedRows where{rows, most_blocks, block_size, tables, starts, contexts};
    if (half)
        attend<bf16>({where, heads, kv_heads, dim, window, scale, (const bf16*)keys, (const bf16*)values, (const bf16*)q,
                      heads * dim, (bf16*)out, heads * dim},
                     threads);
    else
        attend<float>({where, heads, kv_heads, dim, window, scale, (const float*)keys, (const float*)values,
                       (const float*)q, heads * dim, (float*)out, heads * dim},
                      threads);
}

}  // extern "C"
