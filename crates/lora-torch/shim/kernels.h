// CPU kernels over rows, for float and double (kernels.cpp).
#pragma once
#include <cstdint>

namespace kernel {

#define KERNELS(T)                                                                                                      \
  void rms_norm(const T* x, const T* w, T* y, T* rstd, int64_t rows, int64_t d, double eps);                            \
  void rms_norm_backward(const T* g, const T* x, const T* w, const T* rstd, T* gx, T* gw, int64_t rows, int64_t d);     \
  void rotary(const T* x, const T* cos, const T* sin, T* y, int64_t rows, int64_t heads, int64_t d, int64_t half, T sign); \
  void swiglu(const T* gate, const T* up, T* y, int64_t n);                                                             \
  void swiglu_backward(const T* g, const T* gate, const T* up, T* ggate, T* gup, int64_t n);                            \
  void geglu(const T* gate, const T* up, T* y, bool tanh, int64_t n);                                                   \
  void geglu_backward(const T* g, const T* gate, const T* up, T* ggate, T* gup, bool tanh, int64_t n);                  \
  void dropout(const T* x, T* y, uint64_t key, uint32_t bound, T scale, int64_t start, int64_t n);                      \
  double cross_entropy(T* logits, const int64_t* targets, int64_t rows, int64_t vocab, bool grad);                      \
  void lion(T* p, const T* g, T* m, T lr, T beta1, T beta2, T keep, int64_t n);

KERNELS(float)
KERNELS(double)
#undef KERNELS

// A block of AdamW in 8 bits.
void unpack_block(const uint8_t* codes, const float* table, float absmax, float* out, int64_t n);
void adamw_block(float* p, const float* g, float* m, float* v, float beta1, float beta2, float keep, float rate, float root,
                 float eps, int64_t n);
void pack_block(const float* x, const float* midpoints, uint8_t* codes, float* absmax, int least, int64_t n);

}  // namespace kernel
