// The innermost part of a product of fp32 matrices on CPUs with AVX2 and FMA (sgemm_avx2.cpp), or AVX-512 (sgemm_avx512.cpp). This
// header and those sources know nothing of libtorch: they are compiled for such CPUs, and no inline function of another header may
// come to exist in them.
#pragma once
#include <cstdint>

namespace sgemm {

constexpr int64_t MOST_ROWS = 12, MOST_COLS = 32;  // of a tile of any kernel

// Rows of the left operand and the columns of a tile of the right one: panel[p * panel_stride + j], of which as many must be
// readable as the tile has columns.
struct Span {
  const float* rows;
  int64_t stride, depth;
  const float* panel;
  int64_t panel_stride;
};

// What the sums are added to.
enum class Start { Zero, Bias, Sum };

// A tile of the result, as large as the registers hold. Every number is summed in one order, whatever tile and kernel it falls
// to: the bits are the same on every CPU.
struct Kernel {
  using Tile = void(const Span* spans, int count, int64_t rows, float* c, int64_t stride, Start start, const float* bias);
  // A tile of `cols` columns, and one of `narrow` for edges and thin products; both of at most so many rows. `bias` has as many
  // numbers as there are columns.
  int64_t rows, cols, narrow;
  Tile *full, *half;

  // Columns of the tile that serves so many.
  int64_t tile_of(int64_t width) const { return width <= narrow ? narrow : cols; }

  // c[rows, cols] = start + sum over spans of rows * panel, with fewer rows and columns at the edges.
  void tile(const Span* spans, int count, int64_t rows, float* c, int64_t stride, int64_t cols, Start start, const float* bias) const;
};
extern const Kernel AVX2, AVX512;

// panel[p][j] = w[j * stride + p] for j < cols <= tile_cols and p < depth.
void pack_transposed(const float* w, int64_t stride, int64_t cols, int64_t depth, int64_t tile_cols, float* panel);
// panel[p][j] = w[p * stride + j] for p < depth and j < cols, of which each tile_cols go to a panel `apart` from the one before.
void pack_straight(const float* w, int64_t stride, int64_t cols, int64_t depth, int64_t tile_cols, float* panel, int64_t apart);

void widen_bf16(const uint16_t* from, float* to, int64_t n);
void widen_f16(const uint16_t* from, float* to, int64_t n);
void widen_int8(const int8_t* from, float scale, float* to, int64_t n);
// Two codes a byte, the first in the high half, `n` even; table of 16.
void widen_nf4(const uint8_t* codes, const float* table, float scale, float* to, int64_t n);

}  // namespace sgemm
