// The float kernels by name, for the entry points of other frameworks.
#pragma once
#include <cstdint>

extern "C" {
void rms_norm_forward(int half, int64_t rows, int64_t width, float eps, const void* x, const void* weight, void* y,
                      float* scale, int threads);
void rms_norm_backward(int half, int64_t rows, int64_t width, const void* x, const void* weight, const float* scale,
                       const void* grad, void* grad_x, float* grad_weight, int threads);
void swiglu_forward(int half, int64_t n, const void* gate, const void* up, void* out, int threads);
void swiglu_backward(int half, int64_t n, const void* gate, const void* up, const void* grad, void* grad_gate,
                     void* grad_up, int threads);
void rotary(int half, int half_tables, int64_t tokens, int64_t heads, int64_t dim, int64_t table_rows, const void* x,
            const void* cos, const void* sin, void* out, float direction, int threads);
void cross_entropy(int half, int64_t rows, int64_t width, void* logits, const int64_t* targets, float* loss, int grad,
                   int threads);
void attention_forward(int half, int64_t documents, int64_t heads, int64_t kv_heads, int64_t dim,
                       const int64_t* begins, const int64_t* lengths, int causal, float scale, const void* q,
                       const void* k, const void* v, void* out, float* lse, int threads);
void attention_backward(int half, int64_t documents, int64_t heads, int64_t kv_heads, int64_t dim,
                        const int64_t* begins, const int64_t* lengths, int causal, float scale, const void* q,
                        const void* k, const void* v, const void* out, const float* lse, const void* grad,
                        void* grad_q, void* grad_k, void* grad_v, int threads);
}
