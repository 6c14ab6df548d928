// The border to Rust: plain C functions over tensors that Rust owns.
//
// Every function returns null, or the text of the exception that it caught, allocated with malloc for the caller to free.
#pragma once
#include <ATen/ATen.h>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

using CTensor = at::Tensor*;
using Message = char*;

// A frozen weight as it is kept (stored.h); null means absent. The layout is that of `RawWeight` in src/ffi.rs.
struct StoredWeight {
  CTensor data, absmax, nested, table;
  double offset;
  int64_t rows, cols, block, nested_block;
  int32_t form;
};

// One projection of an input; null means absent. The layout is that of `RawProjection` in src/ffi.rs.
struct Projection {
  StoredWeight weight;
  CTensor bias, a, b;
  double scale;
};

// What an input was made of; null means absent. The layout is that of `RawOrigin` in src/ffi.rs.
struct Origin {
  enum Form : int32_t { KEPT = 0, RMS_NORM = 1, LAYER_NORM = 2, GATED = 3 };  // from GATED on by the kind of gate (pointwise.h)
  CTensor first, second, third;
  double eps;
  int32_t form;
};

// The layout is that of `RawAdamW` in src/ffi.rs.
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
};

// The layout is that of `RawLion` in src/ffi.rs.
struct Lion {
  double lr, beta1, beta2, weight_decay;
};

// A moment in 8 bits (blockwise.rs). The layout is that of `RawBlockwise` in src/ffi.rs.
struct Blockwise {
  CTensor codes, absmax, table;
};

inline at::Tensor value(CTensor t) { return t ? *t : at::Tensor(); }

// The defined tensors of a list with gaps, and where each stands: autograd takes no undefined inputs.
struct Present {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> place;  // index in `tensors`, or -1

  explicit Present(const std::vector<at::Tensor>& list) {
    for (const at::Tensor& t : list) {
      place.push_back(t.defined() ? static_cast<int64_t>(tensors.size()) : -1);
      if (t.defined()) tensors.push_back(t);
    }
  }
};

// The list with its gaps again.
inline std::vector<at::Tensor> with_gaps(at::TensorList tensors, const std::vector<int64_t>& place) {
  std::vector<at::Tensor> list;
  for (int64_t i : place) list.push_back(i < 0 ? at::Tensor() : tensors[i]);
  return list;
}

// Runs `body` and turns whatever it throws into a message.
template <typename Body>
Message guarded(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return strdup("bad_alloc: not enough memory on the host");
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("an exception that is not a std::exception");
  }
}
