// CPU kernels over rows, for float and double (kernels.cpp), in loops for the widest instructions that the CPU has.
#pragma once
#include "cpu.h"
#include <cstdint>

namespace kernel {

template <typename T>
struct Rows {
  // y = x * rstd * w over rows of d; writes rstd of each row.
  void (*rms_norm)(const T* x, const T* w, T* y, T* rstd, int64_t rows, int64_t d, double eps);
  // gx = s (g w - x s^2 mean(g w x)); adds g x s to gw where it is wanted.
  void (*rms_norm_backward)(const T* g, const T* x, const T* w, const T* rstd, T* gx, T* gw, int64_t rows, int64_t d);
  // Rotates the first 2 * half of each head of d; sign -1 is the inverse. Rows are tokens; cos and sin have half.
  void (*rotary)(const T* x, const T* cos, const T* sin, T* y, int64_t rows, int64_t heads, int64_t d, int64_t half, T sign);
  void (*swiglu)(const T* gate, const T* up, T* y, int64_t n);
  void (*swiglu_backward)(const T* g, const T* gate, const T* up, T* ggate, T* gup, int64_t n);
  // GELU of the gate, by tanh: x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), or by erf: x P(x).
  void (*geglu)(const T* gate, const T* up, T* y, bool tanh, int64_t n);
  void (*geglu_backward)(const T* g, const T* gate, const T* up, T* ggate, T* gup, bool tanh, int64_t n);
  // y = x scale where the number of the place reaches `bound`, else 0; the places are start.. and tell 2^32 apart.
  void (*dropout)(const T* x, T* y, uint64_t key, uint32_t bound, T scale, int64_t start, int64_t n);
  // The loss of a row of logits; turns the row into scale * (softmax - onehot(target)) where `grad`.
  double (*cross_entropy)(T* logits, int64_t target, int64_t vocab, bool grad, T scale);
  // Turns n scores into exp(scale * score - top), `top` being the largest of what is raised, and returns their sum.
  T (*exp_sum)(T* scores, int64_t n, T scale, T* top);
  // Turns n scores into p = exp(scale * score - lse), and slopes by p into slopes by the scores: scale * p * (slope - delta).
  void (*softmax_slopes)(T* scores, T* slopes, int64_t n, T scale, T lse, T delta);
  // p = keep p - lr sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g.
  void (*lion)(T* p, const T* g, T* m, T lr, T beta1, T beta2, T keep, int64_t n);
};

// A block of AdamW in 8 bits.
struct Blocks {
  void (*unpack)(const uint8_t* codes, const float* table, float absmax, float* out, int64_t n);
  // m and v are moved on; p = keep p - rate m / (sqrt(v) / root + eps).
  void (*adamw)(float* p, const float* g, float* m, float* v, float beta1, float beta2, float keep, float rate, float root,
                float eps, int64_t n);
  // The nearest code of each number over the largest magnitude; what is not zero gets no code below `least`.
  void (*pack)(const float* x, const float* midpoints, uint8_t* codes, float* absmax, int least, int64_t n);
};

struct Set {
  Rows<float> of_float;
  Rows<double> of_double;
  Blocks blocks;
};
extern const Set BASE, AVX2, AVX512;

inline const Set& widest() {
#if defined(LORA_SGEMM)
  switch (cpu()) {
    case Cpu::AVX512: return AVX512;
    case Cpu::AVX2: return AVX2;
    case Cpu::BASE: break;
  }
#endif
  return BASE;
}

template <typename T>
const Rows<T>& rows();
template <>
inline const Rows<float>& rows<float>() { return widest().of_float; }
template <>
inline const Rows<double>& rows<double>() { return widest().of_double; }

}  // namespace kernel
