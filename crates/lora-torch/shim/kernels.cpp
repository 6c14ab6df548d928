// The loops behind kernels.h. They are plain, and the compiler vectorises them: this file is compiled once for each set of
// instructions, of which KERNEL_SET is the name. What would come to exist outside the anonymous namespace would be shared
// between the sets, so nothing does but their tables.
#include "kernels.h"
#include <cmath>
#include <cstring>

namespace kernel {

namespace {

// exp by range reduction and a polynomial of degree 6 (Taylor, |r| <= ln2 / 2): within 2 ulp, and it vectorises.
inline __attribute__((always_inline)) float exp_fast(float x) {
  x = x > 88.3762f ? 88.3762f : (x < -87.3365f ? -87.3365f : x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504088896341f + magic) - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float two_n;
  std::memcpy(&two_n, &bits, sizeof two_n);
  return p * two_n;
}
inline __attribute__((always_inline)) double exp_fast(double x) { return std::exp(x); }

// The share of a normal distribution below x, given e = exp(-x^2 / 2): Abramowitz & Stegun, 7.1.26, off by at most 7.5e-8, and
// it vectorises.
inline __attribute__((always_inline)) float normal_below(float x, float e) {
  const float z = (x < 0 ? -x : x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * z);
  const float tail = 0.5f * e * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return x < 0 ? tail : 1.0f - tail;
}
inline __attribute__((always_inline)) double normal_below(double x, double) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

// A number of 32 bits for each place, from the key: the finaliser of MurmurHash3 over the place and one half of the key, and
// again over the other.
inline __attribute__((always_inline)) uint32_t mixed(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

template <typename T>
void rms_norm(const T* x, const T* w, T* y, T* rstd, int64_t rows, int64_t d, double eps) {
  for (int64_t i = 0; i < rows; ++i, x += d, y += d) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; ++j) sum += x[j] * x[j];
    const T s = T(1) / std::sqrt(sum / T(d) + T(eps));
    rstd[i] = s;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) y[j] = x[j] * s * w[j];
  }
}

template <typename T>
void rms_norm_backward(const T* g, const T* x, const T* w, const T* rstd, T* gx, T* gw, int64_t rows, int64_t d) {
  for (int64_t i = 0; i < rows; ++i, x += d, g += d, gx += d) {
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < d; ++j) dot += g[j] * w[j] * x[j];
    const T s = rstd[i], k = dot * s * s / T(d);
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) gx[j] = s * (g[j] * w[j] - x[j] * k);
    if (gw) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) gw[j] += g[j] * x[j] * s;
    }
  }
}

template <typename T>
void rotary(const T* x, const T* cos, const T* sin, T* y, int64_t rows, int64_t heads, int64_t d, int64_t half,
            T sign) {
  for (int64_t i = 0; i < rows; ++i, cos += half, sin += half) {
    for (int64_t h = 0; h < heads; ++h, x += d, y += d) {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const T a = x[j], b = x[half + j], s = sign * sin[j];
        y[j] = a * cos[j] - b * s;
        y[half + j] = b * cos[j] + a * s;
      }
      for (int64_t j = 2 * half; j < d; ++j) y[j] = x[j];
    }
  }
}

template <typename T>
void swiglu(const T* gate, const T* up, T* y, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = gate[j] / (T(1) + exp_fast(-gate[j])) * up[j];
}

template <typename T>
void swiglu_backward(const T* g, const T* gate, const T* up, T* ggate, T* gup, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T s = T(1) / (T(1) + exp_fast(-gate[j])), silu = gate[j] * s;
    gup[j] = g[j] * silu;
    ggate[j] = g[j] * up[j] * (s + silu * (T(1) - s));
  }
}

template <typename T>
void geglu(const T* gate, const T* up, T* y, bool tanh, int64_t n) {
  if (tanh) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T x = gate[j], u = T(1.5957691216057308) * (x + T(0.044715) * x * x * x);
      y[j] = x / (T(1) + exp_fast(-u)) * up[j];
    }
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T x = gate[j];
    y[j] = x * normal_below(x, exp_fast(T(-0.5) * x * x)) * up[j];
  }
}

template <typename T>
void geglu_backward(const T* g, const T* gate, const T* up, T* ggate, T* gup, bool tanh, int64_t n) {
  if (tanh) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T x = gate[j], u = T(1.5957691216057308) * (x + T(0.044715) * x * x * x);
      const T s = T(1) / (T(1) + exp_fast(-u)), slope = T(1.5957691216057308) * (T(1) + T(0.134145) * x * x);
      gup[j] = g[j] * x * s;
      ggate[j] = g[j] * up[j] * (s + x * s * (T(1) - s) * slope);
    }
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T x = gate[j], e = exp_fast(T(-0.5) * x * x), below = normal_below(x, e);
    gup[j] = g[j] * x * below;
    ggate[j] = g[j] * up[j] * (below + x * e * T(0.3989422804014327));
  }
}

template <typename T>
void dropout(const T* x, T* y, uint64_t key, uint32_t bound, T scale, int64_t start, int64_t n) {
  const uint32_t low = uint32_t(key), high = uint32_t(key >> 32), first = uint32_t(start);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t drawn = mixed(mixed((first + uint32_t(j)) ^ low) ^ high);
    y[j] = drawn >= bound ? x[j] * scale : T(0);
  }
}

template <typename T>
double cross_entropy(T* logits, int64_t target, int64_t vocab, bool grad, T scale) {
  T top = logits[0];
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < vocab; ++j) top = top < logits[j] ? logits[j] : top;
  const double chosen = double(logits[target]) - double(top);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < vocab; ++j) {
    const T e = exp_fast(logits[j] - top);
    logits[j] = e;
    sum += e;
  }
  if (grad) {
    const T factor = scale / sum;
#pragma omp simd
    for (int64_t j = 0; j < vocab; ++j) logits[j] *= factor;
    logits[target] -= scale;
  }
  return std::log(double(sum)) - chosen;
}

template <typename T>
T exp_sum(T* scores, int64_t n, T scale, T* top) {
  T most = scores[0], sum = 0;
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) most = most < scores[j] ? scores[j] : most;
  most *= scale;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = exp_fast(scores[j] * scale - most);
    scores[j] = e;
    sum += e;
  }
  *top = most;
  return sum;
}

template <typename T>
void softmax_slopes(T* scores, T* slopes, int64_t n, T scale, T lse, T delta) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T p = exp_fast(scores[j] * scale - lse);
    scores[j] = p;
    slopes[j] = scale * p * (slopes[j] - delta);
  }
}

template <typename T>
void lion(T* p, const T* g, T* m, T lr, T beta1, T beta2, T keep, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T way = beta1 * m[i] + (T(1) - beta1) * g[i];
    p[i] = keep * p[i] - lr * (way > T(0) ? T(1) : (way < T(0) ? T(-1) : T(0)));
    m[i] = beta2 * m[i] + (T(1) - beta2) * g[i];
  }
}

void unpack_block(const uint8_t* codes, const float* table, float absmax, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = table[codes[i]] * absmax;
}

void adamw_block(float* p, const float* g, float* m, float* v, float beta1, float beta2, float keep, float rate, float root,
                 float eps, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    m[i] = beta1 * m[i] + (1.0f - beta1) * g[i];
    v[i] = beta2 * v[i] + (1.0f - beta2) * g[i] * g[i];
    p[i] = keep * p[i] - rate * m[i] / (std::sqrt(v[i]) / root + eps);
  }
}

void pack_block(const float* x, const float* midpoints, uint8_t* codes, float* absmax, int least, int64_t n) {
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    most = size > most ? size : most;
  }
  *absmax = most;
  const float inverse = most > 0 ? 1.0f / most : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = x[i] * inverse;
    // How many of the 255 midpoints lie below, by halves.
    int32_t code = 0;
    for (int32_t half = 128; half > 0; half >>= 1) code += midpoints[code + half - 1] < scaled ? half : 0;
    codes[i] = static_cast<uint8_t>(x[i] != 0 && code < least ? least : code);
  }
}

template <typename T>
constexpr Rows<T> ROWS{rms_norm<T>, rms_norm_backward<T>, rotary<T>,        swiglu<T>,  swiglu_backward<T>, geglu<T>, geglu_backward<T>,
                       dropout<T>,  cross_entropy<T>,     exp_sum<T>, softmax_slopes<T>, lion<T>};

}  // namespace

const Set KERNEL_SET{ROWS<float>, ROWS<double>, {unpack_block, adamw_block, pack_block}};

}  // namespace kernel
