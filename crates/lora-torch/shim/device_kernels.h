// Launching the kernels of device_kernels.cu.
#pragma once
#include "shim.h"
#include <string>

namespace device {

// Whether there is a kernel for what is computed with this tensor: they are compiled and it is on a CUDA device, or they are
// emulated and it is on the CPU.
bool served(const at::Tensor& t);

// Runs `name` for the dtype and on the device of `t`, in order with what libtorch runs there. `arguments` point at the kernel's.
void launch(const char* name, const at::Tensor& t, int64_t blocks, void** arguments);

// The same with so many blocks. The arguments must have the very types of the kernel's parameters; memory is `memory_of` a tensor.
template <typename... Arguments>
void in_blocks(const char* name, const at::Tensor& t, int64_t blocks, Arguments... arguments) {
  void* list[] = {&arguments...};
  launch(name, t, blocks, list);
}

// The same with a thread for each of n numbers, or fewer that go on.
template <typename... Arguments>
void over(const char* name, const at::Tensor& t, int64_t n, Arguments... arguments) {
  constexpr int64_t A_BLOCK = 256, MOST = 1 << 16;
  if (n > 0) in_blocks(name, t, std::min((n + A_BLOCK - 1) / A_BLOCK, MOST), arguments...);
}

// Where the numbers of a tensor lie; null of one that is not there.
inline void* memory_of(const at::Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

// Runs a kernel on the CPU.
void emulate(const std::string& name, unsigned blocks, void** arguments);

}  // namespace device
