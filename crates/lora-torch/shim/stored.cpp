// Packed weights: NF4 (Dettmers et al., "QLoRA", 2023, section 3) in the block layout of bitsandbytes, and int8 by rows
// (Dettmers et al., "LLM.int8()", 2022). Every sum and product here rounds as theirs, so that equal codes give equal numbers.
#include "stored.h"
#include "device_kernels.h"
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <cmath>
#include <cstdint>
#include <numeric>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define CLONES
#endif

namespace {

constexpr int64_t TILE_NUMBERS = 1 << 20;        // 4 MB in fp32
constexpr int64_t TILE_NUMBERS_CUDA = 1 << 26;   // a launch should be worth it

// The quantiles of a normal distribution scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
constexpr float QUANTILES[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                 -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Both numbers of a byte side by side.
struct Pairs {
  float of[256][2];
  Pairs() {
    for (int i = 0; i < 256; ++i) of[i][0] = QUANTILES[i >> 4], of[i][1] = QUANTILES[i & 15];
  }
};
const Pairs PAIRS;

// y[0..n) from codes; y[0] is the first of a block, and blocks are even.
CLONES void unpack(const uint8_t* codes, const float* scales, float* y, int64_t n, int64_t block) {
  for (int64_t start = 0, b = 0; start < n; start += block, ++b) {
    const float scale = scales[b];
    const int64_t end = std::min(n, start + block);
    int64_t i = start;
    for (; i + 1 < end; i += 2) {
      const float* pair = PAIRS.of[codes[i / 2]];
      y[i] = pair[0] * scale;
      y[i + 1] = pair[1] * scale;
    }
    if (i < end) y[i] = PAIRS.of[codes[i / 2]][0] * scale;
  }
}

// Codes of one block: how many midpoints lie below x / absmax.
CLONES float pack_block(const float* x, uint8_t* codes, int64_t n) {
  float bound[15];
  for (int k = 0; k < 15; ++k) bound[k] = (QUANTILES[k] + QUANTILES[k + 1]) / 2;
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
  const float inverse = 1.0f / std::max(most, 1e-38f);
  for (int64_t i = 0; i < n; ++i) {
    const float v = std::min(1.0f, std::max(-1.0f, x[i] * inverse));
    uint8_t code = 0;
    for (int k = 0; k < 15; ++k) code += v > bound[k];
    codes[i] = code;
  }
  return most;
}

// The scales of blocks [first, first + n) in fp32.
at::Tensor scales_of(const Stored& w, int64_t first, int64_t n) {
  const at::Tensor part = w.absmax.narrow(0, first, n);
  if (!w.nested.defined()) return part;
  const at::Tensor index = at::arange(first, first + n, w.absmax.options().dtype(at::kLong)).floor_divide(w.nested_block);
  return w.table.index_select(0, part.to(at::kInt)).mul_(w.nested.index_select(0, index)).add_(w.offset);
}

void fill_nf4(const Stored& w, at::Tensor& tile, int64_t begin) {
  const int64_t first = begin * w.cols, n = tile.numel();
  const int64_t blocks = (n + w.block - 1) / w.block;
  const at::Tensor codes = w.data.view({-1}).narrow(0, first / 2, (n + 1) / 2);
  if (device::served(tile)) {
    using device::memory_of;
    const at::Tensor scales = w.absmax.narrow(0, first / w.block, blocks);
    device::over("unpack_nf4", tile, (n + 1) / 2, memory_of(codes), memory_of(scales), memory_of(w.nested), memory_of(w.table),
                 static_cast<float>(w.offset), first / w.block, w.block, w.nested_block, memory_of(tile), n);
    return;
  }
  const at::Tensor scales = scales_of(w, first / w.block, blocks);
  if (!tile.is_cpu()) {
    at::Tensor table = at::empty({256, 2}, at::kFloat);
    std::memcpy(table.data_ptr<float>(), PAIRS.of, sizeof PAIRS.of);
    at::Tensor y = table.to(tile.device(), /*non_blocking=*/true).index_select(0, codes.to(at::kInt)).view({-1}).narrow(0, 0, n);
    if (n % w.block == 0) y = y.view({blocks, w.block}) * scales.unsqueeze(1);
    else y = y * scales.repeat_interleave(w.block).narrow(0, 0, n);
    tile.copy_(y.view(tile.sizes()));
    return;
  }
  at::Tensor wide = tile.scalar_type() == at::kFloat ? tile : at::empty(tile.sizes(), at::kFloat);
  const uint8_t* from = codes.data_ptr<uint8_t>();
  const float* scale = scales.data_ptr<float>();
  float* to = wide.data_ptr<float>();
  at::parallel_for(0, blocks, std::max<int64_t>(1, 16384 / w.block), [&](int64_t b, int64_t end) {
    const int64_t i = b * w.block;
    unpack(from + i / 2, scale + b, to + i, std::min(n, end * w.block) - i, w.block);
  });
  if (!wide.is_same(tile)) tile.copy_(wide);
}

}  // namespace

void Stored::fill(at::Tensor& tile, int64_t begin) const {
  if (form == NF4) return fill_nf4(*this, tile, begin);
  tile.copy_(data.narrow(0, begin, tile.size(0)));
  if (form == INT8) {
    const at::Tensor scale = absmax.narrow(0, begin, tile.size(0)).to(tile.scalar_type()).unsqueeze(1);
    tile.mul_(scale).mul_(1.0 / 127.0);
  }
}

int64_t Stored::tile_rows() const {
  const int64_t numbers = data.is_cpu() ? TILE_NUMBERS : TILE_NUMBERS_CUDA;
  const int64_t wanted = std::max<int64_t>(1, numbers / std::max<int64_t>(1, cols));
  if (form != NF4) return wanted;
  const int64_t whole = block / std::gcd(block, cols);  // so many rows end where a block ends
  return (wanted + whole - 1) / whole * whole;
}

at::Tensor Stored::dense(at::ScalarType kind) const {
  if (form == PLAIN) return data.to(kind);
  at::Tensor out = at::empty({rows, cols}, data.options().dtype(kind));
  tiles(kind, [&](const at::Tensor& tile, int64_t begin) { out.narrow(0, begin, tile.size(0)).copy_(tile); });
  return out;
}

at::Tensor Stored::scales() const {
  if (form == INT8) return absmax.to(at::kFloat);
  return scales_of(*this, 0, absmax.numel());
}

const float* nf4_table() { return QUANTILES; }

extern "C" Message lt_dense(const StoredWeight* w, CTensor* out) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    *out = new at::Tensor(Stored(*w).dense(at::kFloat));
  });
}

extern "C" Message lt_row_norms(const StoredWeight* w, CTensor* out) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    const Stored stored(*w);
    const auto kind = stored.data.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor norms = at::empty({stored.rows}, stored.data.options().dtype(kind));
    stored.tiles(kind, [&](const at::Tensor& tile, int64_t begin) {
      norms.narrow(0, begin, tile.size(0)).copy_(at::linalg_vector_norm(tile, 2, 1));
    });
    *out = new at::Tensor(norms);
  });
}

// Codes [ceil(n / 2)] and scales [blocks] of a contiguous fp32 weight on the CPU.
extern "C" Message lt_pack_nf4(CTensor weight, int64_t block, CTensor* codes, CTensor* scales) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    const at::Tensor x = weight->reshape({-1}).contiguous();
    const int64_t n = x.numel(), blocks = (n + block - 1) / block;
    at::Tensor packed = at::empty({(n + 1) / 2}, at::kByte), absmax = at::empty({blocks}, at::kFloat);
    const float* from = x.data_ptr<float>();
    uint8_t* to = packed.data_ptr<uint8_t>();
    float* scale = absmax.data_ptr<float>();
    at::parallel_for(0, blocks, 256, [&](int64_t b, int64_t end) {
      std::vector<uint8_t> wide(block + 1);
      for (; b < end; ++b) {
        const int64_t start = b * block, len = std::min(block, n - start);
        scale[b] = pack_block(from + start, wide.data(), len);
        wide[len] = 7;  // the number beside the last of an odd count: zero
        for (int64_t i = 0; i < len; i += 2) to[(start + i) / 2] = static_cast<uint8_t>(wide[i] << 4 | wide[i + 1]);
      }
    });
    *codes = new at::Tensor(packed);
    *scales = new at::Tensor(absmax);
  });
}

// A tensor over bytes that somebody else holds; `release(owner)` is called when the last view of them is gone.
extern "C" Message lt_view_bytes(const void* bytes, const int64_t* sizes, size_t n, int32_t kind, void* owner,
                                 void (*release)(void*), CTensor* out) {
  return guarded([&] {
    const at::TensorOptions options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind));
    *out = new at::Tensor(at::from_blob(const_cast<void*>(bytes), at::IntArrayRef(sizes, n),
                                        [owner, release](void*) { release(owner); }, options));
  });
}
