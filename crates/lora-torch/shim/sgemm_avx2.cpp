#include "sgemm.h"
#include <immintrin.h>

namespace sgemm {

namespace {

constexpr int64_t TILE_ROWS = 6, TILE_COLS = 16;  // 12 of the 16 registers hold sums

// One step of the reduction for R rows: two loads of the panel, R broadcasts, 2 R fused multiply-adds.
#define ROW(I, POINTER)                                        \
  if (R > I) {                                                 \
    const __m256 v = _mm256_broadcast_ss(POINTER);             \
    s[I % R][0] = _mm256_fmadd_ps(v, b0, s[I % R][0]);         \
    s[I % R][1] = _mm256_fmadd_ps(v, b1, s[I % R][1]);         \
  }
#define STEP(P)                                                                                              \
  {                                                                                                          \
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);                                       \
    b += width;                                                                                              \
    ROW(0, a + P) ROW(1, a + n + P) ROW(2, a + 2 * n + P) ROW(3, d + P) ROW(4, d + n + P) ROW(5, d + 2 * n + P) \
  }

#define FETCH(POINTER) _mm_prefetch(reinterpret_cast<const char*>(POINTER), _MM_HINT_T0);

template <int R>
void tile_of(const Span* spans, int count, float* c, int64_t stride, Start start, const float* bias) {
  __m256 s[R][2];
  for (int i = 0; i < R; ++i) s[i][0] = s[i][1] = _mm256_setzero_ps();
  for (int k = 0; k < count; ++k) {
    const float *a = spans[k].rows, *b = spans[k].panel;
    const int64_t n = spans[k].stride, depth = spans[k].depth, width = spans[k].panel_stride;
    const float* d = a + (R > 3 ? 3 * n : 0);
    int64_t p = 0;
    // A line of cache of each row at a time, while those of the next tile's rows are fetched.
    for (; p + 16 <= depth; p += 16, a += 16, d += 16) {
      if (R == 6) {
        FETCH(a + 6 * n) FETCH(a + 7 * n)
      }
      STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)
      if (R == 6) {
        FETCH(d + 5 * n) FETCH(d + 6 * n) FETCH(d + 7 * n) FETCH(d + 8 * n)
      }
      STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)
    }
    for (; p + 4 <= depth; p += 4, a += 4, d += 4) {
      STEP(0) STEP(1) STEP(2) STEP(3)
    }
    for (; p < depth; ++p, ++a, ++d) STEP(0)
  }
  for (int i = 0; i < R; ++i) {
    const float* first = start == Start::Sum ? c + i * stride : bias;
    if (start != Start::Zero) {
      s[i][0] = _mm256_add_ps(_mm256_loadu_ps(first), s[i][0]);
      s[i][1] = _mm256_add_ps(_mm256_loadu_ps(first + 8), s[i][1]);
    }
    _mm256_storeu_ps(c + i * stride, s[i][0]);
    _mm256_storeu_ps(c + i * stride + 8, s[i][1]);
  }
}

void full(const Span* spans, int count, int64_t rows, float* c, int64_t stride, Start start, const float* bias) {
  switch (rows) {
    case 6: return tile_of<6>(spans, count, c, stride, start, bias);
    case 5: return tile_of<5>(spans, count, c, stride, start, bias);
    case 4: return tile_of<4>(spans, count, c, stride, start, bias);
    case 3: return tile_of<3>(spans, count, c, stride, start, bias);
    case 2: return tile_of<2>(spans, count, c, stride, start, bias);
    default: return tile_of<1>(spans, count, c, stride, start, bias);
  }
}

// Eight rows of eight numbers become eight rows of a panel.
inline void transpose8(const float* w, int64_t stride, float* panel, int64_t tile_cols) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(w + i * stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(panel + i * tile_cols, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(panel + (i + 4) * tile_cols, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

}  // namespace

const Kernel AVX2{TILE_ROWS, TILE_COLS, TILE_COLS, full, full};

void pack_transposed(const float* w, int64_t stride, int64_t cols, int64_t depth, int64_t tile_cols, float* panel) {
  int64_t whole = 0;
  if (cols == tile_cols)
    for (; whole + 8 <= depth; whole += 8)
      for (int64_t j = 0; j < tile_cols; j += 8) transpose8(w + j * stride + whole, stride, panel + whole * tile_cols + j, tile_cols);
  for (int64_t p = whole; p < depth; ++p)
    for (int64_t j = 0; j < tile_cols; ++j) panel[p * tile_cols + j] = j < cols ? w[j * stride + p] : 0.0f;
}

void pack_straight(const float* w, int64_t stride, int64_t cols, int64_t depth, int64_t tile_cols, float* panel, int64_t apart) {
  constexpr int64_t AHEAD = 8;  // rows: each lies on a page of its own, beyond what the CPU foresees
  const int64_t whole = cols / tile_cols * tile_cols;
  for (int64_t p = 0; p < depth; ++p, w += stride, panel += tile_cols) {
    if (p + AHEAD < depth)
      for (int64_t j = 0; j < cols; j += 16) FETCH(w + AHEAD * stride + j)
    float* to = panel;
    for (int64_t j0 = 0; j0 < whole; j0 += tile_cols, to += apart)
      for (int64_t j = 0; j < tile_cols; j += 8) _mm256_storeu_ps(to + j, _mm256_loadu_ps(w + j0 + j));
    for (int64_t j = whole; j < cols; ++j) to[j - whole] = w[j];
    if (whole < cols) for (int64_t j = cols - whole; j < tile_cols; ++j) to[j] = 0.0f;
  }
}

void widen_bf16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
  for (; i < n; ++i) _mm_store_ss(to + i, _mm_castsi128_ps(_mm_cvtsi32_si128(int(uint32_t(from[i]) << 16))));
}

void widen_f16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) _mm_store_ss(to + i, _mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
}

void widen_int8(const int8_t* from, float scale, float* to, int64_t n) {
  const __m256 s = _mm256_set1_ps(scale), unit = _mm256_set1_ps(float(1.0 / 127.0));
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(wide), s), unit));
  }
  for (; i < n; ++i) to[i] = float(from[i]) * scale * float(1.0 / 127.0);
}

void widen_nf4(const uint8_t* codes, const float* table, float scale, float* to, int64_t n) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8), s = _mm256_set1_ps(scale);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24), mask = _mm256_set1_epi32(15);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    int32_t four;
    __builtin_memcpy(&four, codes + i / 2, sizeof four);
    const __m256i code = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(four), shifts), mask);
    const __m256 a = _mm256_permutevar8x32_ps(low, code), b = _mm256_permutevar8x32_ps(high, code);
    // The fourth bit of the code, moved to the sign, chooses the upper half of the table.
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_blendv_ps(a, b, upper), s));
  }
  for (; i < n; i += 2) {
    to[i] = table[codes[i / 2] >> 4] * scale;
    to[i + 1] = table[codes[i / 2] & 15] * scale;
  }
}

}  // namespace sgemm
