// Frozen weights in the form in which they are kept, made dense tile by tile for the product that needs them.
#pragma once
#include "shim.h"
#include <algorithm>
#include <utility>

enum Form : int32_t { PLAIN = 0, NF4 = 1, INT8 = 2 };

// A weight [rows, cols]. PLAIN: `data` itself, of any floating dtype. NF4: `data` holds two codes a byte, the first in the
// high half, row-major; blocks of `block` numbers share a scale, `absmax`, which may itself be bytes of a table with scales
// of their own (`nested`, `nested_block`, `offset`). INT8: `data` int8, `absmax` one scale a row.
struct Stored {
  at::Tensor data, absmax, nested, table;
  double offset = 0;
  int64_t rows = 0, cols = 0, block = 0, nested_block = 0;
  int32_t form = PLAIN;

  explicit Stored(const at::Tensor& plain) : data(plain), rows(plain.size(0)), cols(plain.size(1)) {}

  explicit Stored(const StoredWeight& w)
      : data(value(w.data)), absmax(value(w.absmax)), nested(value(w.nested)), table(value(w.table)), offset(w.offset),
        rows(w.rows), cols(w.cols), block(w.block), nested_block(w.nested_block), form(w.form) {}

  // Whether a product in `kind` can take the weight as it is.
  bool ready(at::ScalarType kind) const { return form == PLAIN && data.scalar_type() == kind; }

  // Writes rows [begin, begin + tile.size(0)) into `tile`, which is contiguous.
  void fill(at::Tensor& tile, int64_t begin) const;

  // The scales of NF4 in fp32, one for each block, or those of int8, one for each row.
  at::Tensor scales() const;

  // How many rows a tile has: as many as stay in the caches of a CPU, and beginning where a block begins.
  int64_t tile_rows() const;

  // The weight in `kind`, whole.
  at::Tensor dense(at::ScalarType kind) const;

  // Calls body(tile, begin) for all rows in order; a tile is overwritten by the next one.
  template <typename Body>
  void tiles(at::ScalarType kind, const Body& body) const {
    if (ready(kind)) return body(data, int64_t(0));
    const int64_t step = tile_rows();
    at::Tensor scratch = at::empty({std::min(step, rows), cols}, data.options().dtype(kind));
    for (int64_t begin = 0; begin < rows; begin += step) {
      at::Tensor tile = scratch.narrow(0, 0, std::min(step, rows - begin));
      fill(tile, begin);
      body(std::as_const(tile), begin);
    }
  }
};

// The sixteen numbers that a code of NF4 stands for.
const float* nf4_table();
