// One token of each row through a whole dense decoder: a single parallel region whose threads stream the weights
// block by block and meet only where one product needs all of another. Values are rounded to the tensors' type where
// the layer-by-layer path rounds them.
#include <omp.h>

#include <atomic>
#include <vector>

#include "dots.h"
#include "parallel.h"

namespace {

// Addresses of one layer's parameters, in the order of DecodeStep.LAYER in decode_step.py; biases may be null.
enum { NORM_1, Q, Q_BIAS, K, K_BIAS, V, V_BIAS, O, NORM_2, GATE, UP, DOWN, PER_LAYER };

struct Sizes {  // in the order of DecodeStep.SIZES
    int64_t rows, layers, hidden, heads, kv_heads, dim, ffn, vocab;
    int64_t layer_stride, row_stride, head_stride;  // of the cache, in elements; a position takes dim
};

constexpr int64_t BLOCK_BYTES = 32768;  // of weights that a thread takes at a time

template <class T>
class Step {
    typedef typename Dot<T>::X X;  // the inputs of a product, holding values that T can hold

   public:
    Step(const Sizes& s, float eps, const int64_t* weights, const int64_t* windows, const int64_t* tokens,
         const int64_t* slots, const float* cos, const float* sin, const float* query_scale, T* k_cache, T* v_cache,
         float* logits, int threads)
        : s_(s), eps_(eps), weights_(weights), windows_(windows), tokens_(tokens), slots_(slots), cos_(cos), sin_(sin),
          query_scale_(query_scale), k_cache_(k_cache), v_cache_(v_cache), logits_(logits), threads_(threads),
          barrier_(threads), hidden_stride_(padded(s.hidden)), ffn_stride_(padded(s.ffn)),
          out_stride_(padded(s.heads * s.dim)), x_(s.rows * hidden_stride_), qkv_(s.rows * qkv_width()),
          out_(s.rows * out_stride_), act_(s.rows * ffn_stride_), next_(s.layers * 5 + 1) {
        for (auto& counter : next_) counter.store(0, std::memory_order_relaxed);
    }

    template <int ROWS>
    void run() {
#pragma omp parallel num_threads(threads_)
        {
            std::vector<X> normed(s_.rows * hidden_stride_, X{});
            std::vector<float> scores;
            embed();
            for (int64_t layer = 0; layer < s_.layers; layer++) {
                auto counter = next_.data() + layer * 5;
                norm(address<T>(layer, NORM_1), normed.data());
                project<ROWS>(layer, normed.data(), counter[0]);
                barrier_.wait();
                attend(layer, scores, counter[1]);
                barrier_.wait();
                add_product<ROWS>(address<T>(layer, O), s_.heads * s_.dim, out_.data(), out_stride_, counter[2]);
                barrier_.wait();
                norm(address<T>(layer, NORM_2), normed.data());
                gate<ROWS>(layer, normed.data(), counter[3]);
                barrier_.wait();
                add_product<ROWS>(address<T>(layer, DOWN), s_.ffn, act_.data(), ffn_stride_, counter[4]);
                barrier_.wait();
            }
            norm(tail<T>(1), normed.data());
            head<ROWS>(normed.data());
        }
    }

   private:
    static int64_t padded(int64_t n) { return (n + Dot<T>::STEP - 1) / Dot<T>::STEP * Dot<T>::STEP; }
    int64_t qkv_width() const { return (s_.heads + 2 * s_.kv_heads) * s_.dim; }
    template <class P>
    const P* address(int64_t layer, int which) const {
        return (const P*)weights_[layer * PER_LAYER + which];
    }
    template <class P>
    const P* tail(int which) const {  // embedding, final norm, head
        return (const P*)weights_[s_.layers * PER_LAYER + which];
    }

    static vf round_to_type(vf x) { return rounded(x, (const T*)nullptr); }

    // out[r][i] = row `first + i` of the weight times input r, for `count` <= LANES rows of the weight.
    template <int ROWS>
    static void products(const T* weight, int64_t k, const X* input, int64_t stride, int64_t first, int64_t count,
                         vf (&out)[ROWS]) {
        float column[LANES][ROWS];
        for (int64_t i = 0; i < count; i++) dots<T, ROWS>(k, weight + (first + i) * k, input, stride, column[i]);
        for (int r = 0; r < ROWS; r++)
            for (int64_t i = 0; i < count; i++) out[r][i] = column[i][r];
    }

    // body(first, count <= LANES) over `width` outputs with `bytes` of weights each: threads take them block by block.
    template <class Body>
    void share(int64_t width, int64_t bytes, std::atomic<int64_t>& next, Body body) const {
        int64_t block = BLOCK_BYTES / (bytes * LANES) * LANES;
        const int64_t fair = (width + threads_ * LANES - 1) / (threads_ * LANES) * LANES;
        block = block < LANES ? LANES : block;
        block = block > fair ? fair : block;
        for (;;) {
            const int64_t begin = next.fetch_add(block, std::memory_order_relaxed);
            if (begin >= width) return;
            const int64_t end = begin + block < width ? begin + block : width;
            for (int64_t first = begin; first < end; first += LANES)
                body(first, end - first < LANES ? end - first : (int64_t)LANES);
        }
    }

    // `count` values from `p`; what lies behind them is arbitrary.
    template <class P>
    static vf take(const P* p, int64_t count) {
        return count == LANES ? load(p) : load_part(p, count);
    }
    static void give(X* p, vf x, int64_t count) {
        x = round_to_type(x);
        if (count == LANES) store(p, x);
        else store_part(p, x, count);
    }

    void embed() {
#pragma omp single
        for (int64_t r = 0; r < s_.rows; r++)
            copy(s_.hidden, tail<T>(0) + tokens_[r] * s_.hidden, x_.data() + r * hidden_stride_);
    }

    template <class From, class To>
    static void copy(int64_t n, const From* from, To* to) {
        for_vectors(n, [&](int64_t i, auto get, auto put_in) { put_in(to + i, get(from + i)); });
    }

    // Every thread norms for itself, which is cheaper than to wait for another.
    void norm(const T* weight, X* to) const {
        for (int64_t r = 0; r < s_.rows; r++) {
            const X* from = x_.data() + r * hidden_stride_;
            X* out = to + r * hidden_stride_;
            vf squares{};
            for_vectors(s_.hidden, [&](int64_t i, auto get, auto) { vf x = get(from + i); squares += x * x; });
            const float scale = 1 / std::sqrt(sum(squares) / s_.hidden + eps_);
            for_vectors(s_.hidden, [&](int64_t i, auto get, auto put_in) {
                put_in(out + i, round_to_type(round_to_type(get(from + i) * scale) * get(weight + i)));
            });
        }
    }

    template <int ROWS>
    void project(int64_t layer, const X* x, std::atomic<int64_t>& next) {
        const int64_t q = s_.heads * s_.dim, kv = s_.kv_heads * s_.dim, width = qkv_width();
        // dim is a multiple of LANES, so that no run of outputs lies in two of the three weights.
        share(width, s_.hidden * sizeof(T), next, [&](int64_t first, int64_t count) {
            const int which = first < q ? Q : first < q + kv ? K : V;
            const int64_t at = first < q ? first : first < q + kv ? first - q : first - q - kv;
            const T* bias = address<T>(layer, which + 1);
            vf out[ROWS];
            products<ROWS>(address<T>(layer, which), s_.hidden, x, hidden_stride_, at, count, out);
            for (int r = 0; r < ROWS; r++)
                give(qkv_.data() + r * width + first, bias ? out[r] + take(bias + at, count) : out[r], count);
        });
    }

    // A task is a run of query heads that share one kv head. Each rotates the new key for itself; the first of a kv
    // head's tasks also writes it to the cache, where no other task of this step reads it.
    void attend(int64_t layer, std::vector<float>& scores, std::atomic<int64_t>& next) {
        const int64_t group = s_.heads / s_.kv_heads, pairs = s_.rows * s_.kv_heads;
        int64_t parts = (threads_ + pairs - 1) / pairs;
        if (parts > group) parts = group;
        const int64_t width = (group + parts - 1) / parts;
        for (;;) {
            const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= pairs * parts) return;
            const int64_t pair = task / parts, first = (task % parts) * width;
            const int64_t last = first + width < group ? first + width : group;
            if (first < last) attend_heads(layer, pair / s_.kv_heads, pair % s_.kv_heads, first, last, scores);
        }
    }

    void attend_heads(int64_t layer, int64_t row, int64_t kv, int64_t first, int64_t last, std::vector<float>& scores) {
        const int64_t dim = s_.dim, slot = slots_[row], window = windows_[layer], group = s_.heads / s_.kv_heads;
        const int64_t begin = window && slot + 1 > window ? slot + 1 - window : 0, count = slot + 1 - begin;
        const int64_t place = layer * s_.layer_stride + row * s_.row_stride + kv * s_.head_stride;
        T *keys = k_cache_ + place, *values = v_cache_ + place;
        const X* qkv = qkv_.data() + row * qkv_width();
        alignas(64) T key[MAX_DIM], value[MAX_DIM];
        alignas(64) X query[MAX_DIM] = {};  // a product may multiply what lies behind dim by zero
        rotate(qkv + (s_.heads + kv) * dim, row, 1, key);
        copy(dim, qkv + (s_.heads + s_.kv_heads + kv) * dim, value);
        if (first == 0) {
            memcpy((void*)(keys + slot * dim), key, dim * sizeof(T));
            memcpy((void*)(values + slot * dim), value, dim * sizeof(T));
        }
        if ((int64_t)scores.size() < count) scores.resize(count + 1024);
        for (int64_t h = kv * group + first; h < kv * group + last; h++) {
            rotate(qkv + h * dim, row, query_scale_ ? query_scale_[row] : 1, query);
            softmax_sum(query, keys + begin * dim, values + begin * dim, key, value, count, scores.data(),
                        out_.data() + row * out_stride_ + h * dim);
        }
    }

    static constexpr int64_t MAX_DIM = 256;

    // Rotates the pairs (i, i + dim / 2), then applies Qwen v1's log-n factor.
    template <class To>
    void rotate(const X* from, int64_t row, float factor, To* to) const {
        const int64_t half = s_.dim / 2;
        const float *cos = cos_ + row * half, *sin = sin_ + row * half;
        for_vectors(half, [&](int64_t i, auto get, auto put_in) {
            vf a = get(from + i), b = get(from + half + i), c = get(cos + i), s = get(sin + i);
            put_in(to + i, round_to_type(round_to_type(a * c - b * s) * factor));
            put_in(to + half + i, round_to_type(round_to_type(b * c + a * s) * factor));
        });
    }

    // The keys and values are those of the cache but for the last one, which another thread may be writing there.
    void softmax_sum(const X* query, const T* keys, const T* values, const T* new_key, const T* new_value, int64_t count,
                     float* scores, X* out) const {
        const float scale = 1 / std::sqrt((float)s_.dim);
        float most = -INFINITY;
        for (int64_t j = 0; j < count; j++) {
            float dot[1];
            dots<T, 1>(s_.dim, j + 1 < count ? keys + j * s_.dim : new_key, query, 0, dot);
            scores[j] = dot[0] * scale;
            most = scores[j] > most ? scores[j] : most;
        }
        for_vectors(count, [&](int64_t i, auto get, auto put_in) { put_in(scores + i, exp(get(scores + i) - most)); });
        vf totals{};
        for_vectors(count, [&](int64_t i, auto get, auto) { totals += get(scores + i); });
        const float total = sum(totals);
        for (int64_t i = 0; i < s_.dim; i += LANES) {
            vf acc{};
            for (int64_t j = 0; j + 1 < count; j++) acc += scores[j] * load(values + j * s_.dim + i);
            acc += scores[count - 1] * load(new_value + i);
            store(out + i, round_to_type(acc / total));
        }
    }

    // x += input W^T, a residual connection.
    template <int ROWS>
    void add_product(const T* weight, int64_t k, const X* input, int64_t stride, std::atomic<int64_t>& next) {
        share(s_.hidden, k * sizeof(T), next, [&](int64_t first, int64_t count) {
            vf out[ROWS];
            products<ROWS>(weight, k, input, stride, first, count, out);
            for (int r = 0; r < ROWS; r++) {
                X* x = x_.data() + r * hidden_stride_ + first;
                give(x, take(x, count) + round_to_type(out[r]), count);
            }
        });
    }

    template <int ROWS>
    void gate(int64_t layer, const X* x, std::atomic<int64_t>& next) {
        share(s_.ffn, 2 * s_.hidden * sizeof(T), next, [&](int64_t first, int64_t count) {
            vf gates[ROWS], ups[ROWS];
            products<ROWS>(address<T>(layer, GATE), s_.hidden, x, hidden_stride_, first, count, gates);
            products<ROWS>(address<T>(layer, UP), s_.hidden, x, hidden_stride_, first, count, ups);
            for (int r = 0; r < ROWS; r++) {
                vf g = round_to_type(gates[r]);
                g = round_to_type(g / (1 + exp(-g)));
                give(act_.data() + r * ffn_stride_ + first, g * round_to_type(ups[r]), count);
            }
        });
    }

    template <int ROWS>
    void head(const X* x) {
        share(s_.vocab, s_.hidden * sizeof(T), next_[s_.layers * 5], [&](int64_t first, int64_t count) {
            vf out[ROWS];
            products<ROWS>(tail<T>(2), s_.hidden, x, hidden_stride_, first, count, out);
            for (int r = 0; r < ROWS; r++) {
                float* to = logits_ + r * s_.vocab + first;
                if (count == LANES) store(to, round_to_type(out[r]));
                else store_part(to, round_to_type(out[r]), count);
            }
        });
    }

    const Sizes s_;
    const float eps_;
    const int64_t *weights_, *windows_, *tokens_, *slots_;
    const float *cos_, *sin_, *query_scale_;
    T *k_cache_, *v_cache_;
    float* logits_;
    const int threads_;
    Barrier barrier_;
    const int64_t hidden_stride_, ffn_stride_, out_stride_;
    std::vector<X> x_, qkv_, out_, act_;
    std::vector<std::atomic<int64_t>> next_;
};

template <class T>
void decode(const Sizes& s, float eps, const int64_t* weights, const int64_t* windows, const int64_t* tokens,
            const int64_t* slots, const float* cos, const float* sin, const float* query_scale, void* k_cache,
            void* v_cache, float* logits, int threads) {
    Step<T> step(s, eps, weights, windows, tokens, slots, cos, sin, query_scale, (T*)k_cache, (T*)v_cache, logits, threads);
    switch (s.rows) {
#define CASE(R)                      \
    case R:                          \
        step.template run<R>();      \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
    }
}

}  // namespace

extern "C" {

// `slots` [rows] is the cache slot of each row's token; cos and sin [rows, dim / 2] and query_scale [rows] (or null) are
// float32; `windows` [layers] is 0 where a layer sees everything. Writes float32 logits [rows, vocab].
void decode_step(int half, const int64_t* sizes, float eps, const int64_t* weights, const int64_t* windows,
                 const int64_t* tokens, const int64_t* slots, const float* cos, const float* sin,
                 const float* query_scale, void* k_cache, void* v_cache, float* logits, int threads) {
    Sizes s;
    memcpy(&s, sizes, sizeof s);
    if (half)
        decode<bf16>(s, eps, weights, windows, tokens, slots, cos, sin, query_scale, k_cache, v_cache, logits, threads);
    else
        decode<float>(s, eps, weights, windows, tokens, slots, cos, sin, query_scale, k_cache, v_cache, logits, threads);
}

}  // extern "C"
