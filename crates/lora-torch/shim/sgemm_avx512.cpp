#include "sgemm.h"
#include <immintrin.h>

namespace sgemm {

namespace {

constexpr int64_t TILE_ROWS = 12, TILE_COLS = 32;  // 24 of the 32 registers hold sums

#define FETCH(POINTER) _mm_prefetch(reinterpret_cast<const char*>(POINTER), _MM_HINT_T0);

// One step of the reduction for R rows of V vectors: V loads of the panel, R broadcasts, V R fused multiply-adds.
#define ROW(I, POINTER)                                            \
  if (R > I) {                                                     \
    const __m512 v = _mm512_set1_ps(*(POINTER));                   \
    s[I % R][0] = _mm512_fmadd_ps(v, b0, s[I % R][0]);             \
    if (V > 1) s[I % R][1] = _mm512_fmadd_ps(v, b1, s[I % R][1]);  \
  }
#define STEP(P)                                                                                    \
  {                                                                                                \
    const __m512 b0 = _mm512_loadu_ps(b), b1 = V > 1 ? _mm512_loadu_ps(b + 16) : b0;               \
    FETCH(b + 8 * width) if (V > 1) FETCH(b + 8 * width + 16)                                       \
    b += width;                                                                                    \
    ROW(0, a0 + P) ROW(1, a0 + n + P) ROW(2, a0 + 2 * n + P)                                       \
    ROW(3, a3 + P) ROW(4, a3 + n + P) ROW(5, a3 + 2 * n + P)                                       \
    ROW(6, a6 + P) ROW(7, a6 + n + P) ROW(8, a6 + 2 * n + P)                                       \
    ROW(9, a9 + P) ROW(10, a9 + n + P) ROW(11, a9 + 2 * n + P)                                     \
  }
#define NEXT(I) \
  if (R == TILE_ROWS) { FETCH(a9 + (3 + I) * n) FETCH(a9 + (4 + I) * n) FETCH(a9 + (5 + I) * n) }

template <int R, int V>
void tile_of(const Span* spans, int count, float* c, int64_t stride, Start start, const float* bias) {
  __m512 s[R][V];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) s[i][j] = _mm512_setzero_ps();
  for (int k = 0; k < count; ++k) {
    const int64_t n = spans[k].stride, depth = spans[k].depth, width = spans[k].panel_stride;
    // Four pointers, from which the addressing of the CPU reaches twelve rows.
    const float *a0 = spans[k].rows, *a3 = a0 + (R > 3) * 3 * n, *a6 = a0 + (R > 6) * 6 * n, *a9 = a0 + (R > 9) * 9 * n;
    const float* b = spans[k].panel;
    int64_t p = 0;
    // A line of the caches of each row at a time, while those of the next tile's rows are fetched.
    for (; p + 16 <= depth; p += 16, a0 += 16, a3 += 16, a6 += 16, a9 += 16) {
      NEXT(0) STEP(0) STEP(1) STEP(2) STEP(3)
      NEXT(3) STEP(4) STEP(5) STEP(6) STEP(7)
      NEXT(6) STEP(8) STEP(9) STEP(10) STEP(11)
      NEXT(9) STEP(12) STEP(13) STEP(14) STEP(15)
    }
    for (; p < depth; ++p, ++a0, ++a3, ++a6, ++a9) STEP(0)
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) {
      const float* first = start == Start::Sum ? c + i * stride : bias;
      if (start != Start::Zero) s[i][j] = _mm512_add_ps(_mm512_loadu_ps(first + 16 * j), s[i][j]);
      _mm512_storeu_ps(c + i * stride + 16 * j, s[i][j]);
    }
}

using Tile = void (*)(const Span*, int, float*, int64_t, Start, const float*);
template <int V>
constexpr Tile OF_ROWS[TILE_ROWS] = {tile_of<1, V>, tile_of<2, V>, tile_of<3, V>, tile_of<4, V>,  tile_of<5, V>,  tile_of<6, V>,
                                     tile_of<7, V>, tile_of<8, V>, tile_of<9, V>, tile_of<10, V>, tile_of<11, V>, tile_of<12, V>};

template <int V>
void tile(const Span* spans, int count, int64_t rows, float* c, int64_t stride, Start start, const float* bias) {
  OF_ROWS<V>[rows - 1](spans, count, c, stride, start, bias);
}

}  // namespace

const Kernel AVX512{TILE_ROWS, TILE_COLS, TILE_COLS / 2, tile<2>, tile<1>};

}  // namespace sgemm
