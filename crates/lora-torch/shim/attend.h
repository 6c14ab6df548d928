// Attention of fp32 on the CPU by the products of our own (attend.cpp): causal blocks that see nothing are never computed.
#pragma once
#include "sgemm.h"
#include <ATen/ATen.h>

namespace attend {

// What is the same for every segment.
struct Rule {
  double scale;
  int64_t window;  // 0 for none
  bool causal;
};

// q [tokens, heads, d], k and v [tokens, kv heads, d], contiguous; out as q; lse [tokens, heads] of the scaled scores.
void forward(const sgemm::Kernel& kernel, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef lens,
             const Rule& rule, at::Tensor& out, at::Tensor& lse);

// The gradients of q, k and v, written into tensors of their shapes.
void backward(const sgemm::Kernel& kernel, const at::Tensor& g, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
              const at::Tensor& out, const at::Tensor& lse, at::IntArrayRef lens, const Rule& rule, at::Tensor& gq,
              at::Tensor& gk, at::Tensor& gv);

}  // namespace attend
