#include "sgemm.h"
#include <immintrin.h>

namespace sgemm {

namespace {

constexpr int64_t TILE_ROWS = 12, TILE_COLS = 32;  // 24 of the 32 registers hold sums

// One step of the reduction for R rows: two loads of the panel, R broadcasts, 2 R fused multiply-adds.
#define ROW(I, POINTER)                                   \
  if (R > I) {                                            \
    const __m512 v = _mm512_set1_ps(*(POINTER));          \
    s[I % R][0] = _mm512_fmadd_ps(v, b0, s[I % R][0]);    \
    s[I % R][1] = _mm512_fmadd_ps(v, b1, s[I % R][1]);    \
  }
#define STEP(P)                                                                             \
  {                                                                                         \
    const __m512 b0 = _mm512_loadu_ps(b + 32 * P), b1 = _mm512_loadu_ps(b + 32 * P + 16);   \
    ROW(0, a0 + P) ROW(1, a0 + n + P) ROW(2, a0 + 2 * n + P)                                \
    ROW(3, a3 + P) ROW(4, a3 + n + P) ROW(5, a3 + 2 * n + P)                                \
    ROW(6, a6 + P) ROW(7, a6 + n + P) ROW(8, a6 + 2 * n + P)                                \
    ROW(9, a9 + P) ROW(10, a9 + n + P) ROW(11, a9 + 2 * n + P)                              \
  }

template <int R>
void tile_of(const Span* spans, int count, float* c, int64_t stride, Start start, const float* bias) {
  __m512 s[R][2];
  for (int i = 0; i < R; ++i) s[i][0] = s[i][1] = _mm512_setzero_ps();
  for (int k = 0; k < count; ++k) {
    const int64_t n = spans[k].stride, depth = spans[k].depth;
    // Four pointers, from which the addressing of the CPU reaches twelve rows.
    const float *a0 = spans[k].rows, *a3 = a0 + (R > 3) * 3 * n, *a6 = a0 + (R > 6) * 6 * n, *a9 = a0 + (R > 9) * 9 * n;
    const float* b = spans[k].panel;
    int64_t p = 0;
    for (; p + 4 <= depth; p += 4, a0 += 4, a3 += 4, a6 += 4, a9 += 4, b += 128) {
      STEP(0) STEP(1) STEP(2) STEP(3)
    }
    for (; p < depth; ++p, ++a0, ++a3, ++a6, ++a9, b += 32) STEP(0)
  }
  for (int i = 0; i < R; ++i) {
    const float* first = start == Start::Sum ? c + i * stride : bias;
    if (start != Start::Zero) {
      s[i][0] = _mm512_add_ps(_mm512_loadu_ps(first), s[i][0]);
      s[i][1] = _mm512_add_ps(_mm512_loadu_ps(first + 16), s[i][1]);
    }
    _mm512_storeu_ps(c + i * stride, s[i][0]);
    _mm512_storeu_ps(c + i * stride + 16, s[i][1]);
  }
}

using Tile = void (*)(const Span*, int, float*, int64_t, Start, const float*);
constexpr Tile OF_ROWS[TILE_ROWS] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>,  tile_of<5>,  tile_of<6>,
                                     tile_of<7>, tile_of<8>, tile_of<9>, tile_of<10>, tile_of<11>, tile_of<12>};

void full(const Span* spans, int count, int64_t rows, float* c, int64_t stride, Start start, const float* bias) {
  OF_ROWS[rows - 1](spans, count, c, stride, start, bias);
}

}  // namespace

const Kernel AVX512{TILE_ROWS, TILE_COLS, full};

}  // namespace sgemm
