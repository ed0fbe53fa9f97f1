// One step of a serving engine through a whole dense decoder: the next tokens of many rows (one each when decoding, pieces
// of prompts, or both) in a single parallel region. Every weight is read from memory once for all of them. Values are
// rounded to the tensors' type where the layer-by-layer path rounds them, and a row's results do not depend, in any bit,
// on what else is in the step or on the number of threads.
#include <omp.h>

#include <memory>
#include <mutex>
#include <type_traits>

#include "paged_attention.h"
#include "parallel.h"
#include "tiles.h"

namespace {

// Addresses of one layer's parameters, in the order of _LAYER in decode_step.py; biases may be null.
enum { NORM_1, Q, Q_BIAS, K, K_BIAS, V, V_BIAS, O, NORM_2, GATE, UP, DOWN, PER_LAYER };
enum { EMBEDDING, LAST_NORM, HEAD };

// Inputs of a product that takes less time than to read its weights, and inputs of one task.
constexpr int64_t FEW = 16, FEW_ON_TILES = 32, HEIGHT = 144;

struct Sizes {  // in the order of PagedStep.SIZES
    int64_t layers, hidden, heads, kv_heads, dim, ffn, vocab;
    int64_t tokens, rows, most_blocks, block_size, pool_stride;  // pool_stride: elements of one layer's pool
    int64_t wanted, table_in_type;  // rows whose result is wanted; whether cos and sin hold values of the tensors' type
};

// What a step reads and writes, in the order of the arguments of paged_step.
struct Step {
    const int64_t *weights, *windows, *tokens, *slots, *positions;
    const int32_t *tables, *starts, *contexts;
    const float *cos, *sin, *query_scale;
    void *keys, *values;
    const int64_t* wanted;
    float *logits, *hidden;
    int64_t* best;
};

template <class T>
class Forward {
    typedef typename InputOf<T>::type X;  // inputs of products, holding values that T can hold

   public:
    Forward(const Sizes& s, float eps, const Step& step, int threads)
        : s_(s), eps_(eps), step_(step), threads_(threads), barrier_(threads), hidden_stride_(whole_steps(s.hidden)),
          ffn_stride_(whole_steps(s.ffn)), out_stride_(whole_steps(s.heads * s.dim)),
          qkv_stride_((s.heads + 2 * s.kv_heads) * s.dim), tasks_(new Tasks[s.layers * 5 + 1]),
          where_{s.rows, s.most_blocks, s.block_size, step.tables, step.starts, step.contexts},
          pieces_(pieces_of(where_, s.heads / s.kv_heads)) {
        const int64_t n = s.tokens;
        values_.reset(new T[n * (s.hidden + qkv_stride_)]);
        x_ = values_.get(), qkv_ = x_ + n * s.hidden;
        const int64_t groups = (n + LANES - 1) / LANES * LANES;  // tiles hold whole ones
        inputs_.reset(new X[groups * (hidden_stride_ + std::max(out_stride_, ffn_stride_))]);
        normed_ = inputs_.get(), out_ = act_ = normed_ + groups * hidden_stride_;  // one is used before the other
        if (step.best) best_.assign(s.wanted, {-INFINITY, -1});
    }

    void run() {
#pragma omp parallel num_threads(threads_)
        {
            Own own;
            const Tiles tiles(tiled_);
            embed();
            for (int64_t layer = 0; layer < s_.layers; layer++) {
                Tasks* tasks = tasks_.get() + layer * 5;
                barrier_.wait();
                norm(address<T>(layer, NORM_1));
                arrange(s_.tokens, normed_, hidden_stride_, own);
                barrier_.wait();
                project(layer, own, tasks[0]);
                barrier_.wait();
                rotate_and_keep(layer);
                barrier_.wait();
                attend(layer, own, tasks[1]);
                arrange(s_.tokens, out_, out_stride_, own);
                barrier_.wait();
                add_product(address<T>(layer, O), s_.heads * s_.dim, out_, out_stride_, own, tasks[2]);
                barrier_.wait();
                norm(address<T>(layer, NORM_2));
                arrange(s_.tokens, normed_, hidden_stride_, own);
                barrier_.wait();
                gate(layer, own, tasks[3]);
                arrange(s_.tokens, act_, ffn_stride_, own);
                barrier_.wait();
                add_product(address<T>(layer, DOWN), s_.ffn, act_, ffn_stride_, own, tasks[4]);
            }
            barrier_.wait();
            last_norm();
            arrange(s_.wanted, normed_, hidden_stride_, own);
            barrier_.wait();
            if (step_.logits || step_.best) head(own, tasks_[s_.layers * 5]);
        }
        for (int64_t r = 0; step_.best && r < s_.wanted; r++) step_.best[r] = best_[r].place;
    }

   private:
    struct Own {  // a thread's
        ProductScratch<T> products;
        std::vector<float> attention;
        std::vector<X> arranging;
    };
    struct Best {
        float value;
        int64_t place;
        bool yields(float other, int64_t at) const { return other > value || (other == value && at < place); }
    };

    template <class P>
    const P* address(int64_t layer, int which) const {
        return (const P*)step_.weights[layer * PER_LAYER + which];
    }
    template <class P>
    const P* tail(int which) const {
        return (const P*)step_.weights[s_.layers * PER_LAYER + which];
    }
    static vf round_to_type(vf x) { return rounded(x, (const T*)nullptr); }

    // body(index) for a fixed share of 0 .. count-1.
    template <class Body>
    void divide(int64_t count, Body body) const {
        const int64_t me = omp_get_thread_num();
        for (int64_t i = count * me / threads_; i < count * (me + 1) / threads_; i++) body(i);
    }

    // done(row, first column, columns, results per matrix) over x [rows, k] times the matrices that at(column) gives.
    // Columns are shared out in panels, long inputs also by rows; a panel lies inside one run of `run` columns.
    template <int WEIGHTS, class At, class Done>
    void products(int64_t rows, int64_t width, int64_t run, int64_t k, const X* x, int64_t stride, Own& own, Tasks& tasks,
                  At at, Done done) const {
        const int64_t heights = (rows + HEIGHT - 1) / HEIGHT;
        int64_t columns = PANEL;
        if (run % columns || (width + columns - 1) / columns * heights < 6 * threads_) columns = LANES;
        const int64_t across = (width + columns - 1) / columns;
        const auto task = [&](int64_t index, bool goes_on) {
            const int64_t first = index / heights * columns, top = index % heights * HEIGHT;
            const int64_t count = std::min(columns, width - first), height = std::min(HEIGHT, rows - top);
            const T *w[WEIGHTS], *next[WEIGHTS] = {};
            at(first, w);
            if (goes_on && first + 2 * columns <= width) at(first + columns, next);
            const X* inputs = x + top * stride;
            const float* results = tiled_ ? tiles_task(height, k, inputs, stride, w, next, count, own.products)
                                          : product_task<T, WEIGHTS>(height, k, inputs, stride, w, next, count, own.products);
            for (int64_t r = 0; r < height; r++)
                done(top + r, first, count, results + r * PANEL, results + (WEIGHTS - 1) * height * PANEL + r * PANEL);
        };
        // Few inputs wait for the memory: each thread goes on through weights that lie behind each other.
        if (rows <= (tiled_ ? FEW_ON_TILES : FEW)) divide(across, [&](int64_t index) { task(index, true); });
        else tasks.run(across * heights, [&](int64_t index) { task(index, false); });
    }

    // Inputs of a product as tiles want them, once all threads have written theirs.
    void arrange(int64_t rows, X* x, int64_t stride, Own& own) {
        if (!tiled_) return;
        barrier_.wait();
        divide((rows + LANES - 1) / LANES, [&](int64_t group) { arrange_inputs(x + group * LANES * stride, stride, own.arranging); });
    }

    void embed() const {
        divide(s_.tokens, [&](int64_t n) {
            T* to = x_ + n * s_.hidden;
            memcpy((void*)to, tail<T>(EMBEDDING) + step_.tokens[n] * s_.hidden, s_.hidden * sizeof(T));
        });
    }

    void norm_row(const T* weight, const T* from, X* to) const {
        vf squares{};
        for_vectors(s_.hidden, [&](int64_t i, auto get, auto) { vf x = get(from + i); squares += x * x; });
        const float scale = 1 / std::sqrt(sum(squares) / s_.hidden + eps_);
        for_vectors(s_.hidden, [&](int64_t i, auto get, auto put) {
            put(to + i, round_to_type(round_to_type(get(from + i) * scale) * get(weight + i)));
        });
        pad(to, s_.hidden, hidden_stride_);
    }
    // Steps of a product run to the end of the padding, where inputs are zero.
    static void pad(X* row, int64_t width, int64_t stride) { memset((void*)(row + width), 0, (stride - width) * sizeof(X)); }

    void norm(const T* weight) const {
        divide(s_.tokens, [&](int64_t n) { norm_row(weight, x_ + n * s_.hidden, normed_ + n * hidden_stride_); });
    }

    void last_norm() const {
        divide(s_.wanted, [&](int64_t r) {
            X* to = normed_ + r * hidden_stride_;
            norm_row(tail<T>(LAST_NORM), x_ + step_.wanted[r] * s_.hidden, to);
            if (step_.hidden)
                for_vectors(s_.hidden, [&](int64_t i, auto get, auto put) { put(step_.hidden + r * s_.hidden + i, get(to + i)); });
        });
    }

    void project(int64_t layer, Own& own, Tasks& tasks) const {
        const int64_t q = s_.heads * s_.dim, kv = s_.kv_heads * s_.dim;
        const auto part = [=](int64_t first) { return first < q ? Q : first < q + kv ? K : V; };
        const auto inside = [=](int64_t first) { return first < q ? first : first < q + kv ? first - q : first - q - kv; };
        products<1>(
            s_.tokens, qkv_stride_, s_.dim, s_.hidden, normed_, hidden_stride_, own, tasks,
            [&](int64_t first, auto& w) { w[0] = address<T>(layer, part(first)) + inside(first) * s_.hidden; },
            [&](int64_t row, int64_t first, int64_t count, const float* results, const float*) {
                const T* bias = address<T>(layer, part(first) + 1);
                T* to = qkv_ + row * qkv_stride_ + first;
                for_vectors(count, [&](int64_t i, auto get, auto put) {
                    const vf y = get(results + i);
                    put(to + i, bias ? y + get(bias + inside(first) + i) : y);
                });
            });
    }

    // Rotates queries in place and writes the keys and values to their slots.
    void rotate_and_keep(int64_t layer) const {
        const int64_t group = s_.heads + s_.kv_heads;
        divide(s_.tokens, [&](int64_t n) {
            T* row = qkv_ + n * qkv_stride_;
            const int64_t block = step_.slots[n] / s_.block_size, offset = step_.slots[n] % s_.block_size;
            for (int64_t h = 0; h < group; h++)
                rotate(row + h * s_.dim, n, h < s_.heads && step_.query_scale ? step_.query_scale[n] : 1.f);
            for (int64_t kv = 0; kv < s_.kv_heads; kv++) {
                const int64_t place =
                    layer * s_.pool_stride + ((block * s_.kv_heads + kv) * s_.block_size + offset) * s_.dim;
                memcpy((void*)((T*)step_.keys + place), row + (s_.heads + kv) * s_.dim, s_.dim * sizeof(T));
                memcpy((void*)((T*)step_.values + place), row + (group + kv) * s_.dim, s_.dim * sizeof(T));
            }
        });
    }

    // The pairs (i, i + dim / 2), then Qwen v1's log-n factor. Tables in T round the products, as torch's operators do.
    void rotate(T* at, int64_t n, float factor) const {
        const int64_t half = s_.dim / 2;
        const float *cos = step_.cos + step_.positions[n] * half, *sin = step_.sin + step_.positions[n] * half;
        const bool in_type = s_.table_in_type;
        const auto keep = [=](vf x) { return in_type ? round_to_type(x) : x; };
        for_vectors(half, [&](int64_t i, auto get, auto put) {
            const vf a = get(at + i), b = get(at + half + i), c = get(cos + i), s = get(sin + i);
            vf first = keep(a * c) - keep(b * s), second = keep(b * c) + keep(a * s);
            if (factor != 1.f) first = round_to_type(first) * factor, second = round_to_type(second) * factor;
            put(at + i, first);
            put(at + half + i, second);
        });
    }

    void attend(int64_t layer, Own& own, Tasks& tasks) const {
        const int64_t place = layer * s_.pool_stride;
        const PagedAttention<T, X> attention{where_, s_.heads, s_.kv_heads, s_.dim, step_.windows[layer],
                                          1 / std::sqrt((float)s_.dim), (const T*)step_.keys + place,
                                          (const T*)step_.values + place, qkv_, qkv_stride_, out_, out_stride_};
        const int64_t parts = attention.parts(pieces_.size(), threads_);
        tasks.run(pieces_.size() * s_.kv_heads * parts,
                  [&](int64_t task) { attention.run(pieces_, task, parts, own.attention); });
        divide(s_.tokens, [&](int64_t n) { pad(out_ + n * out_stride_, s_.heads * s_.dim, out_stride_); });
    }

    // x += input W^T, a residual connection.
    void add_product(const T* weight, int64_t k, const X* input, int64_t stride, Own& own, Tasks& tasks) const {
        products<1>(
            s_.tokens, s_.hidden, 1 << 30, k, input, stride, own, tasks,
            [&](int64_t first, auto& w) { w[0] = weight + first * k; },
            [&](int64_t row, int64_t first, int64_t count, const float* results, const float*) {
                T* x = x_ + row * s_.hidden + first;
                for_vectors(count, [&](int64_t i, auto get, auto put) {
                    put(x + i, get(x + i) + round_to_type(get(results + i)));
                });
            });
    }

    void gate(int64_t layer, Own& own, Tasks& tasks) const {
        products<2>(
            s_.tokens, s_.ffn, 1 << 30, s_.hidden, normed_, hidden_stride_, own, tasks,
            [&](int64_t first, auto& w) {
                w[0] = address<T>(layer, GATE) + first * s_.hidden;
                w[1] = address<T>(layer, UP) + first * s_.hidden;
            },
            [&](int64_t row, int64_t first, int64_t count, const float* gates, const float* ups) {
                X* to = act_ + row * ffn_stride_ + first;
                for_vectors(count, [&](int64_t i, auto get, auto put) {
                    vf g = round_to_type(get(gates + i));
                    g = round_to_type(g / (1 + exp(-g)));
                    put(to + i, round_to_type(g * round_to_type(get(ups + i))));
                });
                if (first + count == s_.ffn) pad(act_ + row * ffn_stride_, s_.ffn, ffn_stride_);
            });
    }

    void head(Own& own, Tasks& tasks) {
        std::vector<Best> best(step_.best ? s_.wanted : 0, Best{-INFINITY, -1});
        products<1>(
            s_.wanted, s_.vocab, 1 << 30, s_.hidden, normed_, hidden_stride_, own, tasks,
            [&](int64_t first, auto& w) { w[0] = tail<T>(HEAD) + first * s_.hidden; },
            [&](int64_t row, int64_t first, int64_t count, const float* results, const float*) {
                if (step_.logits)
                    for_vectors(count, [&](int64_t i, auto get, auto put) {
                        put(step_.logits + row * s_.vocab + first + i, round_to_type(get(results + i)));
                    });
                if (!step_.best) return;
                vf most = splat(-INFINITY);
                int64_t i = 0;
                for (; i + LANES <= count; i += LANES) most = max(round_to_type(load(results + i)), most);
                float top = largest(most);
                float rest[LANES];
                if (i < count) {
                    store(rest, round_to_type(load_part(results + i, count - i)));
                    for (int64_t e = 0; e < count - i; e++) top = rest[e] > top ? rest[e] : top;
                }
                if (!best[row].yields(top, first)) return;
                for (i = 0; i < count; i += LANES) {  // the first that has it
                    store(rest, round_to_type(load(results + i)));
                    for (int64_t e = 0; e < LANES && i + e < count; e++)
                        if (rest[e] == top) {
                            best[row] = {top, first + i + e};
                            return;
                        }
                }
            });
        if (!step_.best) return;
        const std::lock_guard<std::mutex> lock(merging_);
        for (int64_t r = 0; r < s_.wanted; r++)
            if (best[r].place >= 0 && (best_[r].place < 0 || best_[r].yields(best[r].value, best[r].place))) best_[r] = best[r];
    }

    const Sizes s_;
    const float eps_;
    const Step step_;
    const int threads_;
    const bool tiled_ = std::is_same_v<X, bf16> && may_use_tiles();
    Barrier barrier_;
    const int64_t hidden_stride_, ffn_stride_, out_stride_, qkv_stride_;
    std::unique_ptr<Tasks[]> tasks_;
    const PagedRows where_;
    const std::vector<Piece> pieces_;
    std::unique_ptr<T[]> values_;
    std::unique_ptr<X[]> inputs_;
    T *x_, *qkv_;
    X *normed_, *out_, *act_;
    std::vector<Best> best_;
    std::mutex merging_;
};

}  // namespace

extern "C" {

// tokens, slots (block * block_size + offset) and positions (rows of cos and sin, [.., dim / 2]) are [tokens] int64;
// tables [rows, most_blocks], starts [rows + 1] and contexts [rows] int32; query_scale [tokens] or null; `wanted` lists
// tokens: their float32 logits [wanted, vocab], final hidden states [wanted, hidden] and most likely tokens [wanted]
// (-1 where no logit is a number) are written where the pointer is not null.
void paged_step(int half, const int64_t* sizes, float eps, const int64_t* weights, const int64_t* windows,
                const int64_t* tokens, const int64_t* slots, const int64_t* positions, const int32_t* tables,
                const int32_t* starts, const int32_t* contexts, const float* cos, const float* sin,
                const float* query_scale, void* keys, void* values, const int64_t* wanted, float* logits, float* hidden,
                int64_t* best, int threads) {
    Sizes s;
    memcpy(&s, sizes, sizeof s);
    omp_set_dynamic(0);  // fewer threads than the barriers count would wait for ever
    threads = std::min(threads, omp_get_thread_limit());
    const Step step{weights, windows, tokens, slots, positions, tables, starts, contexts, cos, sin, query_scale,
                    keys, values, wanted, logits, hidden, best};
    if (half)
        Forward<bf16>(s, eps, step, threads).run();
    else
        Forward<float>(s, eps, step, threads).run();
}

}  // extern "C"
