// Kernels of a CUDA device, one pass over memory each. NVRTC compiles this text on the machine that runs it; device_emulated.cpp
// compiles it for the CPU, so that its arithmetic and its places are tested without a device. It includes nothing; what differs
// between the two stands before it (KERNEL, from_bits, to_bits, from_half, to_half).
//
// Numbers lie in memory as T and are computed with as A. A kernel may be launched with any number of blocks; of threads a block
// has a power of two, at most THREADS.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

enum { THREADS = 256 };

struct half_bits { unsigned short bits; };
struct bfloat_bits { unsigned short bits; };

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
__device__ inline float wide(bfloat_bits x) { return from_bits(u32(x.bits) << 16); }
__device__ inline float wide(half_bits x) { return from_half(x.bits); }
__device__ inline void put(float& to, float x) { to = x; }
__device__ inline void put(double& to, double x) { to = x; }
__device__ inline void put(half_bits& to, float x) { to.bits = to_half(x); }
__device__ inline void put(bfloat_bits& to, float x) {
  const u32 bits = to_bits(x);
  // To the nearest, of two as near to the even one; what is no number stays none.
  to.bits = x != x ? 0x7fc0 : static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ inline i64 first() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline i64 stride() { return i64(gridDim.x) * blockDim.x; }

// act(x) and its slope; the numbers of `act` are those of Gate in pointwise.h.
template <typename A>
__device__ inline A activation(int act, A x, A& slope) {
  if (act == 1) {
    const A below = A(0.5) * erfc(x * A(-0.70710678118654752440));
    slope = below + x * exp(A(-0.5) * x * x) * A(0.39894228040143267794);
    return x * below;
  }
  const bool tanh = act == 2;
  const A u = tanh ? A(1.59576912160573071176) * (x + A(0.044715) * x * x * x) : x;
  const A by_x = tanh ? A(1.59576912160573071176) * (A(1) + A(0.134145) * x * x) : A(1);
  const A s = A(1) / (A(1) + exp(-u));
  slope = s + x * s * (A(1) - s) * by_x;
  return x * s;
}

template <typename T, typename A>
__device__ void gated(const T* gate, const T* up, T* y, int act, i64 n) {
  A slope;
  for (i64 i = first(); i < n; i += stride()) put(y[i], activation<A>(act, wide(gate[i]), slope) * wide(up[i]));
}

template <typename T, typename A>
__device__ void gated_backward(const T* g, const T* gate, const T* up, T* ggate, T* gup, int act, i64 n) {
  for (i64 i = first(); i < n; i += stride()) {
    A slope;
    const A of = wide(g[i]), y = activation<A>(act, wide(gate[i]), slope);
    put(gup[i], of * y);
    put(ggate[i], of * wide(up[i]) * slope);
  }
}

// Rotates the first 2 * half of each head of d; sign -1 is the inverse. cos and sin have half for each token.
template <typename T, typename A>
__device__ void rotary(const T* x, const T* cos, const T* sin, T* y, i64 heads, i64 d, i64 half, int sign, i64 n) {
  for (i64 i = first(); i < n; i += stride()) {
    const i64 j = i % d, token = i / (heads * d);
    if (j >= 2 * half) {
      y[i] = x[i];
      continue;
    }
    const bool second = j >= half;
    const i64 at = token * half + (second ? j - half : j);
    const A c = wide(cos[at]), s = A(sign) * wide(sin[at]);
    const A other = wide(x[second ? i - half : i + half]);
    put(y[i], second ? wide(x[i]) * c + other * s : wide(x[i]) * c - other * s);
  }
}

__device__ inline u32 mixed(u32 h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// As the loop of the CPU (kernels.cpp): the same key drops the same places.
template <typename T, typename A>
__device__ void dropout(const T* x, T* y, u64 key, u32 bound, double scale, i64 n) {
  const u32 low = u32(key), high = u32(key >> 32);
  for (i64 i = first(); i < n; i += stride()) {
    const bool kept = mixed(mixed(u32(i) ^ low) ^ high) >= bound;
    put(y[i], kept ? wide(x[i]) * A(scale) : A(0));
  }
}

// The largest of some numbers, and the sum of exp(number - largest).
template <typename A>
struct Raised {
  A top, sum;
};

template <typename A>
__device__ inline Raised<A> both(Raised<A> a, Raised<A> b) {
  if (a.sum == A(0)) return b;
  if (b.sum == A(0)) return a;
  const A top = a.top < b.top ? b.top : a.top;
  return Raised<A>{top, a.sum * exp(a.top - top) + b.sum * exp(b.top - top)};
}

// A block for each row of logits: its loss in double, and where `grad` the row becomes weight * (softmax - onehot(target)). The
// weights may be absent. Reads the row twice and writes it once.
template <typename T, typename A>
__device__ void cross_entropy(T* logits, const i64* targets, const double* weights, double* losses, i64 vocab, int grad) {
  __shared__ Raised<A> parts[THREADS];
  T* row = logits + i64(blockIdx.x) * vocab;
  const i64 target = targets[blockIdx.x];
  Raised<A> own = {A(0), A(0)};
  for (i64 j = threadIdx.x; j < vocab; j += blockDim.x) {
    const A x = wide(row[j]);
    // One exponential for each number: of what came before where this one is larger, else of this one.
    if (own.sum == A(0)) own = Raised<A>{x, A(1)};
    else if (x > own.top) own = Raised<A>{x, own.sum * exp(own.top - x) + A(1)};
    else own.sum += exp(x - own.top);
  }
  parts[threadIdx.x] = own;
  __syncthreads();
  for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] = both(parts[threadIdx.x], parts[threadIdx.x + half]);
    __syncthreads();
  }
  const Raised<A> all = parts[0];
  if (threadIdx.x == 0) losses[blockIdx.x] = log(double(all.sum)) + double(all.top) - double(wide(row[target]));
  // Before any thread writes over the target's logit.
  __syncthreads();
  if (!grad) return;
  const A weight = weights ? A(weights[blockIdx.x]) : A(1), factor = weight / all.sum;
  for (i64 j = threadIdx.x; j < vocab; j += blockDim.x) {
    put(row[j], exp(wide(row[j]) - all.top) * factor - (j == target ? weight : A(0)));
  }
}

// The sixteen numbers that a code of NF4 stands for (stored.cpp).
__constant__ float QUANTILES_OF_NF4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                           -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                           0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                           0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Numbers [0, n) from codes, the first of which begins a block. `scales` are those of the blocks; where `nested` is there they are
// bytes: places in `table`, times the scale of so many blocks, plus `offset`. A thread makes both numbers of a byte.
template <typename T, typename A>
__device__ void unpack_nf4(const u8* codes, const void* scales, const float* nested, const float* table, float offset,
                           i64 first_block, i64 block, i64 nested_block, T* y, i64 n) {
  for (i64 i = first(); 2 * i < n; i += stride()) {
    const i64 b = 2 * i / block;  // blocks are even
    const float scale = nested ? table[static_cast<const u8*>(scales)[b]] * nested[(first_block + b) / nested_block] + offset
                               : static_cast<const float*>(scales)[b];
    const u8 code = codes[i];
    put(y[2 * i], A(QUANTILES_OF_NF4[code >> 4] * scale));
    if (2 * i + 1 < n) put(y[2 * i + 1], A(QUANTILES_OF_NF4[code & 15] * scale));
  }
}

#define KERNELS_OF(S, T, A)                                                                                                      \
  KERNEL void gated_##S(const T* gate, const T* up, T* y, int act, i64 n) { gated<T, A>(gate, up, y, act, n); }   \
  KERNEL void gated_backward_##S(const T* g, const T* gate, const T* up, T* ggate, T* gup, int act, i64 n) {      \
    gated_backward<T, A>(g, gate, up, ggate, gup, act, n);                                                                       \
  }                                                                                                                              \
  KERNEL void rotary_##S(const T* x, const T* cos, const T* sin, T* y, i64 heads, i64 d, i64 half, int sign,      \
                                        i64 n) {                                                                                 \
    rotary<T, A>(x, cos, sin, y, heads, d, half, sign, n);                                                                       \
  }                                                                                                                              \
  KERNEL void dropout_##S(const T* x, T* y, u64 key, u32 bound, double scale, i64 n) {                            \
    dropout<T, A>(x, y, key, bound, scale, n);                                                                                   \
  }                                                                                                                              \
  KERNEL void cross_entropy_##S(T* logits, const i64* targets, const double* weights, double* losses, i64 vocab,  \
                                               int grad) {                                                                       \
    cross_entropy<T, A>(logits, targets, weights, losses, vocab, grad);                                                          \
  }                                                                                                                              \
  KERNEL void unpack_nf4_##S(const u8* codes, const void* scales, const float* nested, const float* table,        \
                                            float offset, i64 first_block, i64 block, i64 nested_block, T* y, i64 n) {           \
    unpack_nf4<T, A>(codes, scales, nested, table, offset, first_block, block, nested_block, y, n);                              \
  }

KERNELS_OF(f32, float, float)
KERNELS_OF(f64, double, double)
KERNELS_OF(f16, half_bits, float)
KERNELS_OF(bf16, bfloat_bits, float)
