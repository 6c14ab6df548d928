// The kernels of device_kernels.cu on the CPU, one thread a block: for tests.
#include "device_kernels.h"
#include <c10/util/Half.h>
#include <cmath>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

struct Place {
  unsigned x;
};
thread_local Place blockIdx{0}, gridDim{1};
constexpr Place blockDim{1}, threadIdx{0};
void __syncthreads() {}

using std::erfc;
using std::exp;
using std::log;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
float from_half(unsigned short bits) { return c10::Half(bits, c10::Half::from_bits()); }
unsigned short to_half(float x) { return c10::Half(x).x; }

#define __device__
#define __constant__ const
#define __shared__ static thread_local
#define KERNEL static
#include "device_kernels.cu"

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

// A kernel without its types.
struct Kernel {
  void (*kernel)();
  void (*caller)(void (*)(), void**);
};

template <typename... P>
Kernel of(void (*kernel)(P...)) {
  return {reinterpret_cast<void (*)()>(kernel), [](void (*k)(), void** arguments) {
            call(reinterpret_cast<void (*)(P...)>(k), arguments, std::index_sequence_for<P...>());
          }};
}

#define LISTED(NAME, S) {#NAME "_" #S, of(NAME##_##S)}
#define EACH(NAME) LISTED(NAME, f32), LISTED(NAME, f64), LISTED(NAME, f16), LISTED(NAME, bf16)
const std::unordered_map<std::string, Kernel> KERNELS{EACH(gated),   EACH(gated_backward), EACH(rotary),
                                                      EACH(dropout), EACH(cross_entropy),  EACH(unpack_nf4)};

}  // namespace

void device::emulate(const std::string& name, unsigned blocks, void** arguments) {
  const Kernel& kernel = KERNELS.at(name);
  gridDim.x = blocks;
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    kernel.caller(kernel.kernel, arguments);
  }
}
