// libtorch's process group of NCCL, for tensors on CUDA devices. Compiled with the feature `nccl` alone: its header needs those of
// CUDA and of NCCL.
#include "member.h"
#include <nccl.h>
#define USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

// The options hold NCCL's own, whose layout follows the header's version: it must be the one that libtorch was built with.
static_assert(NCCL_MAJOR == 2 && NCCL_MINOR == 28, "libtorch 2.11.0 was built with NCCL 2.28; take its header");
// The argument of `operator new` in ProcessGroupNCCL::split of libtorch_cuda.so 2.11.0.
static_assert(sizeof(c10d::ProcessGroupNCCL) == 1112, "another libtorch: look at the layout of ProcessGroupNCCL first");

c10::intrusive_ptr<c10d::Backend> nccl_group(const Membership& member) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = member.timeout;
  auto store = c10::make_intrusive<c10d::PrefixStore>(std::string("nccl"), member.store);
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(std::move(store), member.rank, member.world, std::move(options));
}
