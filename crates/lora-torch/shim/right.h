// The right operand of a product on the CPU, read in the form in which it is kept.
#pragma once
#include "sgemm.h"
#include "stored.h"
#include <cstring>

struct Right {
  Stored weight;
  at::Tensor scales;  // of a packed weight, in fp32
  const char* data;
  int64_t stride;  // from row to row, in numbers

  explicit Right(const Stored& stored) : weight(stored) {
    if (weight.form != NF4 && weight.data.stride(1) != 1) weight.data = weight.data.contiguous();
    if (weight.form != PLAIN) scales = weight.scales().contiguous();
    data = static_cast<const char*>(weight.data.data_ptr());
    stride = weight.form == NF4 ? weight.cols : weight.data.stride(0);
  }

  // Whether every form of it is one that `read` knows.
  static bool readable(const Stored& w) {
    if (w.form != PLAIN) return w.form == INT8 || w.block % 2 == 0;
    const at::ScalarType kind = w.data.scalar_type();
    return w.data.dim() == 2 && (kind == at::kFloat || kind == at::kBFloat16 || kind == at::kHalf);
  }

  bool dense() const { return weight.form == PLAIN && weight.data.scalar_type() == at::kFloat; }
  const float* number(int64_t row, int64_t col) const { return reinterpret_cast<const float*>(data) + row * stride + col; }

  // n numbers of a row from `col` on, in fp32.
  void read(int64_t row, int64_t col, int64_t n, float* to) const {
    const int64_t first = row * stride + col;
    if (weight.form == NF4) return read_nf4(first, n, to);
    if (weight.form == INT8) return sgemm::widen_int8(reinterpret_cast<const int8_t*>(data) + first, scales.data_ptr<float>()[row], to, n);
    if (weight.data.scalar_type() == at::kBFloat16) return sgemm::widen_bf16(reinterpret_cast<const uint16_t*>(data) + first, to, n);
    if (weight.data.scalar_type() == at::kHalf) return sgemm::widen_f16(reinterpret_cast<const uint16_t*>(data) + first, to, n);
    std::memcpy(to, number(row, col), n * sizeof(float));
  }

 private:
  void read_nf4(int64_t first, int64_t n, float* to) const {
    const auto* codes = reinterpret_cast<const uint8_t*>(data);
    const float *table = nf4_table(), *scale = scales.data_ptr<float>();
    for (int64_t i = first, end = first + n; i < end;) {
      const float s = scale[i / weight.block];
      if (i % 2) {  // the second of a byte
        *to++ = table[codes[i++ / 2] & 15] * s;
        continue;
      }
      const int64_t len = std::min(end, (i / weight.block + 1) * weight.block) - i, even = len / 2 * 2;
      sgemm::widen_nf4(codes + i / 2, table, s, to, even);
      if (even < len) to[even] = table[codes[(i + even) / 2] >> 4] * s;
      to += len;
      i += len;
    }
  }
};
