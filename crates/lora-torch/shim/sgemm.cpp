#include "sgemm.h"

namespace sgemm {

void Kernel::tile(const Span* spans, int count, int64_t rows, float* c, int64_t stride, int64_t width, Start start, const float* bias) const {
  if (width == cols) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; j += 16) __builtin_prefetch(c + i * stride + j);
    return full(spans, count, rows, c, stride, start, bias);
  }
  float edge[MOST_ROWS * MOST_COLS] = {};
  if (start == Start::Sum)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j) edge[i * cols + j] = c[i * stride + j];
  full(spans, count, rows, edge, cols, start, bias);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) c[i * stride + j] = edge[i * cols + j];
}

}  // namespace sgemm
