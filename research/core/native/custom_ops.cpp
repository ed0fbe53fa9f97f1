// The kernels as MindSpore's ahead-of-time custom operators (float32): every entry point has the signature
//   (number of tensors, their data, their ranks, their shapes, their dtypes, stream, extra), inputs before outputs,
// and returns 0. Sizes come from the shapes; settings come as one-element tensors.
#include <omp.h>

#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

int wanted_threads = 0;

struct Call {
    void** data;
    int* ranks;
    int64_t** shapes;

    template <class T = float>
    T* at(int i) const {
        return (T*)data[i];
    }
    int64_t size(int i, int axis) const { return shapes[i][axis < 0 ? ranks[i] + axis : axis]; }
    int64_t elements(int i) const {
        int64_t n = 1;
        for (int a = 0; a < ranks[i]; a++) n *= shapes[i][a];
        return n;
    }
};

int threads(int64_t elements) {
    if (elements < 16384) return 1;
    return wanted_threads > 0 ? wanted_threads : omp_get_max_threads();
}

// Runs of one document number in doc_ids [B, T]; 0 belongs to none.
struct Runs {
    std::vector<int64_t> begins, lengths;

    Runs(const int32_t* ids, int64_t batch, int64_t time) {
        for (int64_t b = 0; b < batch; b++)
            for (int64_t t = 0; t < time;) {
                const int32_t number = ids[b * time + t];
                const int64_t first = t;
                while (t < time && ids[b * time + t] == number) t++;
                if (number == 0) continue;
                begins.push_back(b * time + first);
                lengths.push_back(t - first);
            }
    }
};

// q [B, T, H, D], k and v [B, T, K, D], doc_ids int32 [B, T] -> out as q, lse [B, T, H]
int attend(const Call& c, bool causal) {
    const Runs runs(c.at<int32_t>(3), c.size(3, 0), c.size(3, 1));
    memset(c.data[4], 0, c.elements(4) * sizeof(float));
    attention_forward(0, runs.begins.size(), c.size(0, 2), c.size(1, 2), c.size(0, 3), runs.begins.data(),
                      runs.lengths.data(), causal, 1.f, c.at(0), c.at(1), c.at(2), c.at(4), c.at(5),
                      threads(c.elements(0)));
    return 0;
}

// q, k, v, doc_ids, out, lse, gradient of out -> gradients of q, k, v
int attend_back(const Call& c, bool causal) {
    const Runs runs(c.at<int32_t>(3), c.size(3, 0), c.size(3, 1));
    for (int i = 7; i < 10; i++) memset(c.data[i], 0, c.elements(i) * sizeof(float));
    attention_backward(0, runs.begins.size(), c.size(0, 2), c.size(1, 2), c.size(0, 3), runs.begins.data(),
                       runs.lengths.data(), causal, 1.f, c.at(0), c.at(1), c.at(2), c.at(4), c.at(5), c.at(6),
                       c.at(7), c.at(8), c.at(9), threads(c.elements(0)));
    return 0;
}

// x [B, T, H, D], cos and sin [B or 1, T, 1, D/2] -> out
int turn(const Call& c, float direction) {
    const int64_t dim = c.size(0, 3);
    rotary(0, 0, c.size(0, 0) * c.size(0, 1), c.size(0, 2), dim, c.elements(1) / (dim / 2), c.at(0), c.at(1), c.at(2),
           c.at(3), direction, threads(c.elements(0)));
    return 0;
}

}  // namespace

#define OPERATOR(name)                                                                                        \
    static int name##_body(const Call& c);                                                                    \
    extern "C" int name(int, void** data, int* ranks, int64_t** shapes, const char**, void*, void*) {         \
        return name##_body({data, ranks, shapes});                                                            \
    }                                                                                                         \
    static int name##_body(const Call& c)

extern "C" void set_custom_threads(int count) { wanted_threads = count; }

// x [.., W], weight [W], eps [1] -> y, scale [..]
OPERATOR(custom_rms_norm) {
    const int64_t width = c.size(0, -1), rows = c.elements(0) / width;
    rms_norm_forward(0, rows, width, *c.at(2), c.at(0), c.at(1), c.at(3), c.at(4), threads(c.elements(0)));
    return 0;
}

// x, weight, scale, gradient of y -> gradients of x and weight
OPERATOR(custom_rms_norm_back) {
    const int64_t width = c.size(0, -1), rows = c.elements(0) / width;
    const int count = threads(c.elements(0));
    std::vector<float> partial(count * width);
    rms_norm_backward(0, rows, width, c.at(0), c.at(1), c.at(2), c.at(3), c.at(4), partial.data(), count);
    float* total = c.at(5);
    memset(total, 0, width * sizeof(float));
    for (int t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i++) total[i] += partial[t * width + i];
    return 0;
}

// gate, up -> out
OPERATOR(custom_swiglu) {
    swiglu_forward(0, c.elements(0), c.at(0), c.at(1), c.at(2), threads(c.elements(0)));
    return 0;
}

// gate, up, gradient -> gradients of gate and up
OPERATOR(custom_swiglu_back) {
    swiglu_backward(0, c.elements(0), c.at(0), c.at(1), c.at(2), c.at(3), c.at(4), threads(c.elements(0)));
    return 0;
}

OPERATOR(custom_rotary) { return turn(c, 1.f); }
OPERATOR(custom_rotary_back) { return turn(c, -1.f); }
OPERATOR(custom_attention_causal) { return attend(c, true); }
OPERATOR(custom_attention_full) { return attend(c, false); }
OPERATOR(custom_attention_causal_back) { return attend_back(c, true); }
OPERATOR(custom_attention_full_back) { return attend_back(c, false); }

// logits [C, V], targets int32 [C] (negative: not counted) -> losses [C], softmax - one_hot [C, V]; 0 where not counted
OPERATOR(custom_cross_entropy) {
    const int64_t rows = c.size(0, 0), width = c.size(0, 1);
    const int32_t* targets = c.at<int32_t>(1);
#pragma omp parallel for num_threads(threads(rows* width)) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float* row = c.at(3) + r * width;
        if (targets[r] < 0) {
            memset(row, 0, width * sizeof(float));
            c.at(2)[r] = 0;
            continue;
        }
        const int64_t target = targets[r];
        memcpy(row, c.at(0) + r * width, width * sizeof(float));
        cross_entropy(0, 1, width, row, &target, c.at(2) + r, 1, 1);
    }
    return 0;
}

// x, key int32 [4], keep [1] -> x / keep, or 0 with probability 1 - keep: the choice for element i is a hash of key and i
// (the finaliser of MurmurHash3), so that nothing has to be kept for the gradient, a recomputation or a resumed run.
OPERATOR(custom_dropout) {
    const int64_t n = c.elements(0);
    const int32_t* key = c.at<int32_t>(1);
    const float keep = *c.at(2), factor = 1 / keep;
    const uint64_t bound = (uint64_t)((double)keep * 18446744073709551615.0);
    const auto mix = [](uint64_t z) {
        z = (z ^ (z >> 33)) * 0xff51afd7ed558ccdull;
        z = (z ^ (z >> 33)) * 0xc4ceb9fe1a85ec53ull;
        return z ^ (z >> 33);
    };
    uint64_t base = 0x9e3779b97f4a7c15ull;
    for (int i = 0; i < 4; i++) base = mix(base + (uint32_t)key[i] + 1);
    const float* x = c.at(0);
    float* y = c.at(3);
#pragma omp parallel for num_threads(threads(n)) schedule(static)
    for (int64_t i = 0; i < n; i++) y[i] = mix(base + (uint64_t)i * 0x9e3779b97f4a7c15ull) <= bound ? x[i] * factor : 0;
    return 0;
}

// AdamW (arXiv 1711.05101): weight, gradient, first and second moment [N], numbers [4] (factor on the gradients, learning
// rate, 1 - beta1^step, root of 1 - beta2^step), settings [4] (beta1, beta2, eps, decay) -> weight and both moments anew
OPERATOR(custom_adamw) {
    const int64_t n = c.elements(0);
    const float factor = c.at(4)[0], rate = c.at(4)[1], correction1 = c.at(4)[2], correction2 = c.at(4)[3];
    const float beta1 = c.at(5)[0], beta2 = c.at(5)[1], eps = c.at(5)[2];
    const float kept = 1 - rate * c.at(5)[3], size = rate / correction1;
    const float *weight = c.at(0), *gradient = c.at(1), *first = c.at(2), *second = c.at(3);
    float *new_weight = c.at(6), *new_first = c.at(7), *new_second = c.at(8);
#pragma omp parallel for simd num_threads(threads(n)) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float g = gradient[i] * factor;
        const float m = first[i] * beta1 + g * (1 - beta1), v = second[i] * beta2 + g * g * (1 - beta2);
        new_first[i] = m;
        new_second[i] = v;
        new_weight[i] = weight[i] * kept - size * (m / (__builtin_sqrtf(v) / correction2 + eps));
    }
    return 0;
}
