// Backward passes with given gradients, the optimizer, and what the runtime says of itself.
#include "shim.h"
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>
#include <limits>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

extern "C" Message lt_backward(const CTensor* outputs, const CTensor* grads, size_t n) {
  return guarded([&] {
    std::vector<at::Tensor> out, g;
    for (size_t i = 0; i < n; ++i) {
      out.push_back(*outputs[i]);
      g.push_back(*grads[i]);
    }
    torch::autograd::backward(out, g);
  });
}

extern "C" Message lt_set_grad(CTensor param, CTensor grad) {
  return guarded([&] { param->mutable_grad() = *grad; });
}

extern "C" Message lt_norm(CTensor grad, double* out) {
  return guarded([&] { *out = at::linalg_vector_norm(*grad, 2, std::nullopt, false, at::kDouble).item<double>(); });
}

// Matrices drawn one after the other from a generator of their own: `shapes` holds rows and columns of each.
extern "C" Message lt_uniform(uint64_t seed, const int64_t* shapes, const double* bounds, size_t n, CTensor* out) {
  return guarded([&] {
    at::Generator generator = at::detail::createCPUGenerator(seed);
    std::vector<at::Tensor> drawn;
    for (size_t i = 0; i < n; ++i) {
      drawn.push_back(at::empty({shapes[2 * i], shapes[2 * i + 1]}, at::kFloat).uniform_(-bounds[i], bounds[i], generator));
    }
    for (size_t i = 0; i < n; ++i) out[i] = new at::Tensor(drawn[i]);
  });
}

// current, peak and reserved bytes
extern "C" Message lt_device_memory(int64_t index, int64_t* out) {
  return guarded([&] {
    const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(index));
    out[0] = stats.allocated_bytes[0].current;
    out[1] = stats.allocated_bytes[0].peak;
    out[2] = stats.reserved_bytes[0].current;
  });
}

// bytes of the device that nobody has
extern "C" Message lt_device_free(int64_t index, uint64_t* out) {
  return guarded([&] { *out = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(index)).first; });
}

// Looks at the registry only: asking libtorch's hooks would make it remember that there is no CUDA.
extern "C" Message lt_cuda_in_build(int32_t* out) {
  return guarded([&] { *out = c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA); });
}

// A step frees and takes again what the step before it did. By itself the C library gives every large tensor back to the
// system, which then clears its pages anew each time. 32 MiB is the largest threshold that it accepts.
extern "C" Message lt_keep_freed_memory() {
  return guarded([] {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
    mallopt(M_TOP_PAD, 64 << 20);
#endif
  });
}

extern "C" Message lt_give_back_freed_memory() {
  return guarded([] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
}

extern "C" Message lt_synchronize() {
  return guarded([] { at::accelerator::synchronizeDevice(at::accelerator::getDeviceIndex()); });
}
