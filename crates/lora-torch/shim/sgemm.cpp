#include "sgemm.h"

namespace sgemm {

void Kernel::tile(const Span* spans, int count, int64_t rows, float* c, int64_t stride, int64_t width, Start start, const float* bias) const {
  const int64_t whole = tile_of(width);
  Tile* const tile = whole == cols ? full : half;
  if (width == whole) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < whole; j += 16) __builtin_prefetch(c + i * stride + j);
    return tile(spans, count, rows, c, stride, start, bias);
  }
  float edge[MOST_ROWS * MOST_COLS] = {};
  if (start == Start::Sum)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j) edge[i * whole + j] = c[i * stride + j];
  tile(spans, count, rows, edge, whole, start, bias);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) c[i * stride + j] = edge[i * whole + j];
}

}  // namespace sgemm
