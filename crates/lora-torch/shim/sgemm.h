// The innermost part of a product of fp32 matrices on CPUs with AVX2 and FMA (sgemm_avx2.cpp). This header and its source
// know nothing of libtorch: the source is compiled for AVX2, and no inline function of another header may come to exist in it.
#pragma once
#include <cstdint>

namespace sgemm {

constexpr int64_t TILE_ROWS = 6, TILE_COLS = 16;  // 12 of the 16 registers hold sums

// Rows of the left operand and, in `panel`, 16 columns of the right one: panel[p * 16 + j], zeros beyond its width.
struct Span {
  const float* rows;
  int64_t stride, depth;
  const float* panel;
};

// What the sums are added to.
enum class Start { Zero, Bias, Sum };

// c[rows, cols] = start + sum over spans of rows * panel, with rows <= 6 and cols <= 16. `bias` has 16 numbers.
// Every number is summed in one order, whatever tile it falls into.
void tile(const Span* spans, int count, int64_t rows, float* c, int64_t stride, int64_t cols, Start start, const float* bias);

// panel[p][j] = w[j * stride + p] and panel[p][j] = w[p * stride + j], for j < cols <= 16 and p < depth.
void pack_transposed(const float* w, int64_t stride, int64_t cols, int64_t depth, float* panel);
void pack_straight(const float* w, int64_t stride, int64_t cols, int64_t depth, float* panel);

void widen_bf16(const uint16_t* from, float* to, int64_t n);
void widen_f16(const uint16_t* from, float* to, int64_t n);
void widen_int8(const int8_t* from, float scale, float* to, int64_t n);
// Two codes a byte, the first in the high half, `n` even; table of 16.
void widen_nf4(const uint8_t* codes, const float* table, float scale, float* to, int64_t n);

}  // namespace sgemm
