// What is computed number by number or row by row, without a graph: forward passes that a backward pass may need once more.
#pragma once
#include "shim.h"

enum Gate : int64_t { SWIGLU = 0, GEGLU_ERF = 1, GEGLU_TANH = 2 };

// act(gate) * up.
at::Tensor gated(int64_t act, const at::Tensor& gate, const at::Tensor& up);

// Of contiguous rows: the result, and the reciprocal root of each row's mean square.
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// Which values are dropped, by a key alone: nothing is kept of them, and any pass finds them again.
struct Dropout {
  double p;
  int64_t key;

  // A key from the generator of the CPU, which reaching for waits for no device.
  static Dropout draw(double p);

  // x / (1 - p), or 0 where it is dropped.
  at::Tensor operator()(const at::Tensor& x) const;
};
