// Sums of products that share one result: `x W^T + bias + u B^T`, or `g W + gu A`, written once.
#pragma once
#include "sgemm.h"
#include "stored.h"
#include <vector>

// rows [m, k] times the right operand: `right` [k, n], or its transpose [n, k] where `transposed`.
struct Term {
  at::Tensor rows;
  Stored right;
  bool transposed;
};

// out [m, n] = bias + the terms, in the dtype of their rows; the terms are added where `add`. `out` may be undefined and is
// made then. Where the CPU has AVX2 (unless lt_use_products says otherwise), fp32 products are computed here: frozen weights
// are read in the form in which they are kept, a low-rank pair is so many more steps of the same reduction, and the bits
// depend neither on the number of threads nor on the CPU. Elsewhere libtorch computes them.
void sum_of_products(at::Tensor& out, bool add, const at::Tensor& bias, const std::vector<Term>& terms);

// a^T b for a [m, r] with few columns: [r, n].
at::Tensor thin_transposed_product(const at::Tensor& a, const at::Tensor& b);

// The kernel that products of fp32 on the CPU are computed with; none where they are libtorch's.
const sgemm::Kernel* own_kernel();
