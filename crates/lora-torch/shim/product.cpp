#include "product.h"
#include "buffer.h"
#include "cpu.h"
#include "right.h"
#include <ATen/Parallel.h>
#include <atomic>

namespace {

// Sizes by the caches of today's cores: the rows of a tile stay in the first level, with its panel where that is one of 16 columns;
// ROWS x DEPTH of the left operand and the panels of COLS stay in the second.
constexpr int64_t DEPTH = 288, ROWS = 96, COLS = 96;
constexpr int64_t WIDE_COLS = 192;      // where rows are copied
constexpr int64_t SHORT = 64;           // a reduction this short joins the block before it
constexpr int64_t UNPACKED_ROWS = 48;   // so few read panels where they lie, where they can
constexpr int64_t FEW_ROWS = 16;        // fewer are left to libtorch, as packing a panel would cost more than it saves,
constexpr int64_t FEW_UNPACKED = 8;     // or fewer than these, where nothing is packed
constexpr int64_t FEW_STEPS = 1 << 20;  // multiply-adds below which a thread is not worth its start
constexpr int MOST_SPANS = 8;

// As `Products` in products.rs, and as the sets of instructions that they take.
enum Products : uint8_t { LIBTORCH, BY_AVX2, BY_AVX512 };

Products widest() { return static_cast<Products>(cpu()); }

std::atomic<Products>& chosen() {
  static std::atomic<Products> products{widest()};
  return products;
}

// A bias comes with a first term that is transposed.
void by_libtorch(at::Tensor& out, bool add, const at::Tensor& bias, const std::vector<Term>& terms) {
  bool begun = add;
  for (const Term& term : terms) {
    if (term.transposed) {
      term.right.tiles(out.scalar_type(), [&](const at::Tensor& tile, int64_t begin) {
        at::Tensor part = out.narrow(1, begin, tile.size(0));
        if (begun) part.addmm_(term.rows, tile.t());
        else if (bias.defined()) at::addmm_out(part, bias.narrow(0, begin, tile.size(0)), term.rows, tile.t());
        else at::mm_out(part, term.rows, tile.t());
      });
      begun = true;
    } else {
      term.right.tiles(out.scalar_type(), [&](const at::Tensor& tile, int64_t begin) {
        const at::Tensor part = term.rows.narrow(1, begin, tile.size(0));
        if (begun) out.addmm_(part, tile);
        else at::mm_out(out, part, tile);
        begun = true;
      });
    }
  }
}

#if defined(LORA_SGEMM)

thread_local Buffer PANELS, LEFT, WIDE;

struct Operand {
  at::Tensor rows;
  Right right;
  bool transposed;
  bool copied;  // rows a multiple of a page apart fall on the same lines of the caches: a block of them is copied first
};

// A part of the reduction of one operand, and a run of parts that are summed before the result is written.
struct Part {
  const Operand* from;
  int64_t begin, depth, offset;  // where its panel begins in that of the run
};
struct Run {
  std::vector<Part> parts;
  int64_t depth = 0;
};

std::vector<Run> plan(const std::vector<Operand>& operands) {
  std::vector<Run> runs;
  for (const Operand& o : operands) {
    const int64_t depth = o.rows.size(1), count = (depth + DEPTH - 1) / DEPTH;
    const int64_t each = count ? ((depth + count - 1) / count + 7) / 8 * 8 : 0;
    for (int64_t begin = 0; begin < depth; begin += each) {
      const int64_t size = std::min(each, depth - begin);
      const bool joins = !runs.empty() && runs.back().depth + size <= DEPTH + SHORT && runs.back().parts.size() < MOST_SPANS;
      if (!joins) runs.emplace_back();
      runs.back().parts.push_back({&o, begin, size, runs.back().depth});
      runs.back().depth += size;
    }
  }
  return runs;
}

// Whether the right operand is read where it lies: for few rows, packing it would cost more than its products.
bool unpacked(const Part& part, int64_t width, int64_t rows, const sgemm::Kernel& kernel) {
  return rows <= UNPACKED_ROWS && !part.from->transposed && part.from->right.dense() && width % kernel.narrow == 0;
}

// The panels of columns [j0, j0 + width), one after the other, each [run.depth, columns of a tile].
void pack(const Run& run, int64_t j0, int64_t width, int64_t rows, const sgemm::Kernel& kernel, float* panels) {
  const int64_t tile_cols = kernel.cols;
  constexpr int64_t AT_ONCE = 32;  // rows: few enough pages
  for (const Part& part : run.parts) {
    if (unpacked(part, width, rows, kernel)) continue;
    const Right& w = part.from->right;
    if (part.from->transposed) {
      for (int64_t j = 0; j < width; j += tile_cols) {
        const int64_t cols = std::min(tile_cols, width - j);
        float* panel = panels + (j * run.depth) + part.offset * tile_cols;
        if (w.dense()) {
          sgemm::pack_transposed(w.number(j0 + j, part.begin), w.stride, cols, part.depth, tile_cols, panel);
          continue;
        }
        float* wide = WIDE.of(tile_cols * part.depth);
        for (int64_t c = 0; c < cols; ++c) w.read(j0 + j + c, part.begin, part.depth, wide + c * part.depth);
        sgemm::pack_transposed(wide, part.depth, cols, part.depth, tile_cols, panel);
      }
      continue;
    }
    float* panel = panels + part.offset * tile_cols;
    const int64_t apart = run.depth * tile_cols;
    if (w.dense()) {
      sgemm::pack_straight(w.number(part.begin, j0), w.stride, width, part.depth, tile_cols, panel, apart);
      continue;
    }
    for (int64_t p = 0; p < part.depth; p += AT_ONCE) {
      const int64_t depth = std::min(AT_ONCE, part.depth - p);
      float* wide = WIDE.of(AT_ONCE * width);
      for (int64_t q = 0; q < depth; ++q) w.read(part.begin + p + q, j0, width, wide + q * width);
      sgemm::pack_straight(wide, width, width, depth, tile_cols, panel + p * tile_cols, apart);
    }
  }
}

struct Block {
  int64_t i0, i1, j0, width;
};

// Blocks for a queue: the first are of all rows, the last of few, so that all cores end at one time, one that somebody else slows
// down, too.
std::vector<Block> share_out(int64_t m, int64_t n, int64_t widest, int64_t threads) {
  constexpr int64_t LEAST = 48;
  std::vector<Block> blocks;
  for (int64_t j0 = 0; j0 < n; j0 += widest) {
    const int64_t width = std::min(widest, n - j0);
    for (int64_t i0 = 0, i1; i0 < m; i0 = i1) {
      const int64_t left = m - i0 + m * (n - j0 - width) / widest, part = left / (2 * threads) / LEAST * LEAST;
      i1 = threads > 1 ? std::min(m, i0 + std::max(LEAST, part)) : m;
      blocks.push_back({i0, i1, j0, width});
    }
  }
  return blocks;
}

void multiply(const sgemm::Kernel& kernel, const std::vector<Run>& runs, const Block& block, float* out, int64_t stride, bool add, const float* bias) {
  const int64_t tile_cols = kernel.cols, m = block.i1 - block.i0;
  const int64_t panel_count = (block.width + tile_cols - 1) / tile_cols;
  bool begun = add;
  for (const Run& run : runs) {
    float* panels = PANELS.of(panel_count * tile_cols * run.depth);
    pack(run, block.j0, block.width, m, kernel, panels);
    const sgemm::Start start = begun ? sgemm::Start::Sum : bias ? sgemm::Start::Bias : sgemm::Start::Zero;
    begun = true;
    for (int64_t i0 = block.i0; i0 < block.i1; i0 += ROWS) {
      const int64_t i1 = std::min(block.i1, i0 + ROWS), tiles = (i1 - i0 + kernel.rows - 1) / kernel.rows;
      const int64_t tile_rows = (i1 - i0 + tiles - 1) / tiles;
      sgemm::Span spans[MOST_SPANS];
      const float* rows[MOST_SPANS];
      float* left = LEFT.of(ROWS * (DEPTH + SHORT));
      for (size_t k = 0; k < run.parts.size(); ++k) {
        const Part& part = run.parts[k];
        spans[k].depth = part.depth;
        spans[k].stride = part.from->rows.stride(0);
        rows[k] = part.from->rows.data_ptr<float>() + i0 * spans[k].stride + part.begin;
        if (!part.from->copied) continue;
        float* to = left + ROWS * part.offset;
        for (int64_t i = i0; i < i1; ++i)
          std::memcpy(to + (i - i0) * part.depth, rows[k] + (i - i0) * spans[k].stride, part.depth * sizeof(float));
        rows[k] = to;
        spans[k].stride = part.depth;
      }
      for (int64_t j = 0; j < block.width; j += tile_cols) {
        const int64_t cols = std::min(tile_cols, block.width - j);
        float few[sgemm::MOST_COLS] = {};
        if (start == sgemm::Start::Bias) std::memcpy(few, bias + block.j0 + j, cols * sizeof(float));
        for (size_t k = 0; k < run.parts.size(); ++k) {
          const Part& part = run.parts[k];
          const bool lies = unpacked(part, block.width, m, kernel);
          spans[k].panel = lies ? part.from->right.number(part.begin, block.j0 + j) : panels + j * run.depth + part.offset * tile_cols;
          spans[k].panel_stride = lies ? part.from->right.stride : tile_cols;
        }
        for (int64_t i = i0; i < i1; i += tile_rows) {
          for (size_t k = 0; k < run.parts.size(); ++k) spans[k].rows = rows[k] + (i - i0) * spans[k].stride;
          kernel.tile(spans, int(run.parts.size()), std::min(tile_rows, i1 - i), out + i * stride + block.j0 + j, stride,
                      cols, start, few);
        }
      }
    }
  }
}

// Whether the product is one that is computed here.
bool served(const at::Tensor& out, const std::vector<Term>& terms) {
  if (!out.is_cpu() || out.scalar_type() != at::kFloat || out.stride(1) != 1) return false;
  bool packed = false;
  for (const Term& t : terms) packed |= t.transposed || t.right.form != PLAIN || t.right.data.scalar_type() != at::kFloat;
  if (out.size(0) < (packed ? FEW_ROWS : FEW_UNPACKED)) return false;
  for (const Term& t : terms)
    if (t.rows.scalar_type() != at::kFloat || t.rows.size(1) == 0 || !Right::readable(t.right)) return false;
  return true;
}

void here(const sgemm::Kernel& kernel, at::Tensor& out, bool add, const at::Tensor& bias_, const std::vector<Term>& terms) {
  constexpr int64_t PAGE = 4096 / sizeof(float);
  std::vector<Operand> operands;
  int64_t steps = 0;
  bool copied = false;
  for (const Term& t : terms) {
    const at::Tensor rows = t.rows.stride(1) == 1 ? t.rows : t.rows.contiguous();
    // A matrix that lies the other way round is read the other way round.
    const at::Tensor& w = t.right.data;
    const bool turned = t.right.form == PLAIN && w.stride(1) != 1 && w.stride(0) == 1;
    const Stored right = turned ? Stored(w.t()) : t.right;
    operands.push_back({rows, Right(right), t.transposed != turned, rows.stride(0) % PAGE == 0});
    steps += out.numel() * rows.size(1);
    copied |= operands.back().copied;
  }
  const at::Tensor bias = bias_.defined() ? bias_.to(at::kFloat).contiguous() : bias_;
  const std::vector<Run> runs = plan(operands);
  const int64_t m = out.size(0), n = out.size(1), threads = steps < FEW_STEPS ? 1 : at::get_num_threads();
  const std::vector<Block> blocks = share_out(m, n, copied ? WIDE_COLS : COLS, threads);
  float* to = out.data_ptr<float>();
  const float* b = bias.defined() ? bias.data_ptr<float>() : nullptr;
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t k; (k = next.fetch_add(1)) < blocks.size();) multiply(kernel, runs, blocks[k], to, out.stride(0), add, b);
  });
}

#else

bool served(const at::Tensor&, const std::vector<Term>&) { return false; }
void here(const sgemm::Kernel&, at::Tensor&, bool, const at::Tensor&, const std::vector<Term>&) {}

#endif

}  // namespace

const sgemm::Kernel* own_kernel() {
#if defined(LORA_SGEMM)
  switch (chosen().load(std::memory_order_relaxed)) {
    case BY_AVX512: return &sgemm::AVX512;
    case BY_AVX2: return &sgemm::AVX2;
    default: break;
  }
#endif
  return nullptr;
}

void sum_of_products(at::Tensor& out, bool add, const at::Tensor& bias, const std::vector<Term>& terms) {
  if (!out.defined()) {
    const Term& first = terms.front();
    out = at::empty({first.rows.size(0), first.transposed ? first.right.rows : first.right.cols}, first.rows.options());
  }
  if (out.numel() == 0) return;
  const sgemm::Kernel* kernel = own_kernel();
  if (kernel && served(out, terms)) here(*kernel, out, add, bias, terms);
  else by_libtorch(out, add, bias, terms);
}

at::Tensor thin_transposed_product(const at::Tensor& a, const at::Tensor& b) {
  const bool here = own_kernel() && a.is_cpu() && a.scalar_type() == at::kFloat && a.size(1) >= FEW_UNPACKED;
  if (!here) return at::mm(a.t(), b);
  at::Tensor out;
  sum_of_products(out, false, at::Tensor(), {{a.t().contiguous(), Stored(b), false}});
  return out;
}

extern "C" Message lt_use_products(uint8_t products) {
  return guarded([&] { chosen().store(std::min(Products(products), widest())); });
}

extern "C" Message lt_products(uint8_t* out) {
  return guarded([&] { *out = chosen().load(); });
}

extern "C" Message lt_widest_products(uint8_t* out) {
  return guarded([&] { *out = widest(); });
}
