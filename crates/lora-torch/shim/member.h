// A process's membership of a group, behind the handle that Rust holds.
#pragma once
#include "shim.h"
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

struct Membership {
  c10::intrusive_ptr<c10d::Store> store;
  // For tensors on the host, once it is open.
  c10::intrusive_ptr<c10d::Backend> group;
  // For those of a CUDA device, once there was one; of programs that were built with NCCL.
  c10::intrusive_ptr<c10d::Backend> on_device;
  int32_t rank = 0, world = 1;
  std::chrono::milliseconds timeout{0};
};

// Connects the members by NCCL; every one of them must call it.
c10::intrusive_ptr<c10d::Backend> nccl_group(const Membership& member);
