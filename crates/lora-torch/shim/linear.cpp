// Several projections of one input, each `x W^T + bias + scale * dropout(x) A^T B^T`, as one autograd node.
#include "pointwise.h"
#include "product.h"
#include <torch/csrc/autograd/custom_function.h>
#include <vector>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr int64_t FIELDS = 4;  // weight, bias, a, b of each projection, after x; a packed weight is a gap

// How the input was made, where it is to be made again on the way back instead of kept: of tensors that whoever made it keeps
// in any case.
struct Source : torch::CustomClassHolder {
  Origin::Form form = Origin::KEPT;
  double eps = 0;
  variable_list parts = variable_list(3);  // on their way to the forward pass, which saves them
  at::Tensor remade(const at::Tensor& first, const at::Tensor& second, const at::Tensor& third) const {
    c10::NoGradGuard no_grad;
    if (form == Origin::RMS_NORM) return std::get<0>(rms_norm(first.contiguous(), second, eps));
    if (form == Origin::LAYER_NORM) return at::layer_norm(first, {first.size(-1)}, second, third, eps);
    return gated(form - Origin::GATED, first.contiguous(), second.contiguous());
  }
};

// How the weights are kept, on its way from the forward to the backward pass.
struct Weights : torch::CustomClassHolder {
  std::vector<Stored> list;
  explicit Weights(std::vector<Stored> list) : list(std::move(list)) {}
};

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  // The list of `place` is x, then FIELDS of each projection.
  static variable_list forward(AutogradContext* ctx, at::TensorList present, std::vector<int64_t> place,
                               const c10::intrusive_ptr<Weights>& weights, std::vector<double> scales, double dropout,
                               const c10::intrusive_ptr<Source>& source) {
    const variable_list tensors = with_gaps(present, place);
    const at::Tensor x = tensors[0].reshape({-1, tensors[0].size(-1)});
    const size_t n = scales.size();
    std::vector<int64_t> out_size = tensors[0].sizes().vec();
    variable_list ys, saved = tensors, as;
    std::vector<int64_t> keys;
    // On the way back only adapters, and weights that are trained themselves, read x.
    bool read = false;
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor &weight = tensors[1 + FIELDS * i], &a = tensors[3 + FIELDS * i];
      read |= a.defined() || (weight.defined() && weight.requires_grad());
    }
    if (!read) source->form = Origin::KEPT, source->parts.assign(source->parts.size(), at::Tensor());
    if (!read || source->form != Origin::KEPT) saved[0] = at::Tensor();
    for (size_t i = 0; i < n; ++i)
      if (tensors[3 + FIELDS * i].defined()) as.push_back(tensors[3 + FIELDS * i].to(x.scalar_type()));
    // Without dropout all adapters read the same x: one product makes their low-rank inputs, side by side.
    at::Tensor shared;
    if (dropout == 0 && !as.empty()) sum_of_products(shared, false, {}, {{x, Stored(as.size() == 1 ? as[0] : at::cat(as)), true}});
    int64_t column = 0;
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor *p = &tensors[1 + FIELDS * i], &bias = p[1], &a = p[2], &b = p[3];
      std::vector<Term> terms{{x, weights->list[i], true}};
      at::Tensor u;  // scale * dropout(x) A^T
      keys.push_back(0);
      if (a.defined()) {
        if (dropout > 0) {
          const Dropout drop = Dropout::draw(dropout);
          keys.back() = drop.key;
          sum_of_products(u, false, {}, {{drop(x), Stored(a.to(x.scalar_type())), true}});
        } else {
          u = shared.narrow(1, column, a.size(0));
          column += a.size(0);
        }
        u.mul_(scales[i]);
        terms.push_back({u, Stored(b.to(x.scalar_type())), true});
      }
      at::Tensor y;
      sum_of_products(y, false, bias, terms);
      out_size.back() = weights->list[i].rows;
      ys.push_back(y.view(out_size));
      saved.push_back(u);
    }
    saved.insert(saved.end(), source->parts.begin(), source->parts.end());
    source->parts.clear();
    ctx->save_for_backward(saved);
    ctx->saved_data["place"] = place;
    ctx->saved_data["weights"] = c10::IValue::make_capsule(weights);
    ctx->saved_data["scales"] = scales;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["keys"] = keys;
    ctx->saved_data["source"] = c10::IValue::make_capsule(source);
    ctx->saved_data["size"] = tensors[0].sizes().vec();
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> place = ctx->saved_data["place"].toIntVector();
    const std::vector<double> scales = ctx->saved_data["scales"].toDoubleVector();
    const auto weights = c10::static_intrusive_pointer_cast<Weights>(ctx->saved_data["weights"].toCapsule());
    const double dropout = ctx->saved_data["dropout"].toDouble();
    const std::vector<int64_t> keys = ctx->saved_data["keys"].toIntVector(), size = ctx->saved_data["size"].toIntVector();
    const auto source = c10::static_intrusive_pointer_cast<Source>(ctx->saved_data["source"].toCapsule());
    const size_t n = scales.size(), inputs = 1 + FIELDS * n;
    if (source->form != Origin::KEPT) saved[0] = source->remade(saved[inputs + n], saved[inputs + n + 1], saved[inputs + n + 2]);
    const at::Tensor x = saved[0].defined() ? saved[0].reshape({-1, size.back()}) : saved[0];
    const auto wanted = [&](size_t i) { return place[i] >= 0 && ctx->needs_input_grad(place[i]); };
    const auto adapted = [&](size_t i) { return grads[i].defined() && saved[3 + FIELDS * i].defined(); };
    variable_list result(inputs);

    int64_t ranks = 0;
    for (size_t i = 0; i < n; ++i)
      if (adapted(i)) ranks += saved[3 + FIELDS * i].size(0);
    at::Tensor all_gu;  // scale * g B of the adapters, side by side
    if (ranks > 0) all_gu = at::empty({x.size(0), ranks}, x.options());
    std::vector<Term> into_x;
    at::Tensor through_masks;
    int64_t column = 0;
    for (size_t i = 0; i < n; ++i) {
      if (!grads[i].defined()) continue;
      const size_t at = 1 + FIELDS * i;
      const at::Tensor &a = saved[at + 2], &b = saved[at + 3];
      const at::Tensor& u = saved[inputs + i];
      const at::Tensor g = grads[i].reshape({-1, grads[i].size(-1)});
      into_x.push_back({g, weights->list[i], false});
      if (wanted(at)) result[at] = at::mm(g.t(), x).to(saved[at].scalar_type());
      if (wanted(at + 1)) result[at + 1] = g.sum(0);
      if (!a.defined()) continue;
      at::Tensor gu = all_gu.narrow(1, column, a.size(0));
      column += a.size(0);
      sum_of_products(gu, false, {}, {{g, Stored(b.to(g.scalar_type())), false}});
      gu.mul_(scales[i]);
      if (wanted(at + 3)) result[at + 3] = thin_transposed_product(u, g).t().to(b.scalar_type()).contiguous();
      if (dropout == 0) {
        into_x.push_back({gu, Stored(a.to(g.scalar_type())), false});
        continue;
      }
      const Dropout drop{dropout, keys[i]};
      if (wanted(at + 2)) result[at + 2] = thin_transposed_product(gu, drop(x)).to(a.scalar_type());
      if (!wanted(0)) continue;
      at::Tensor part;
      sum_of_products(part, false, {}, {{gu, Stored(a.to(g.scalar_type())), false}});
      part = drop(part);
      if (through_masks.defined()) through_masks.add_(part);
      else through_masks = part;
    }
    if (dropout == 0 && ranks > 0) {
      const at::Tensor all_ga = thin_transposed_product(all_gu, x);
      column = 0;
      for (size_t i = 0; i < n; ++i) {
        if (!adapted(i)) continue;
        const size_t at = 3 + FIELDS * i;
        if (wanted(at)) result[at] = all_ga.narrow(0, column, saved[at].size(0)).to(saved[at].scalar_type());
        column += saved[at].size(0);
      }
    }
    if (wanted(0) && !into_x.empty()) {
      at::Tensor gx = through_masks;
      sum_of_products(gx, gx.defined(), {}, into_x);
      result[0] = gx.view(size);
    }
    variable_list compact;
    for (size_t i = 0; i < inputs; ++i)
      if (place[i] >= 0) compact.push_back(result[i]);
    compact.resize(compact.size() + 5);  // the arguments that are no tensors
    return compact;
  }
};

}  // namespace

extern "C" Message lt_lora_linear(CTensor x, const Origin* origin, const Projection* p, size_t n, double dropout, CTensor* out) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*x};
    std::vector<double> scales;
    std::vector<Stored> stored;
    for (size_t i = 0; i < n; ++i) {
      stored.emplace_back(p[i].weight);
      tensors.push_back(stored.back().form == PLAIN ? stored.back().data : at::Tensor());
      for (CTensor t : {p[i].bias, p[i].a, p[i].b}) tensors.push_back(value(t));
      scales.push_back(p[i].scale);
    }
    const auto weights = c10::make_intrusive<Weights>(std::move(stored));
    const auto source = c10::make_intrusive<Source>();
    if (origin) {
      source->form = static_cast<Origin::Form>(origin->form);
      source->eps = origin->eps;
      const CTensor parts[] = {origin->first, origin->second, origin->third};
      for (size_t i = 0; i < source->parts.size(); ++i)
        if (parts[i]) source->parts[i] = parts[i]->detach();
    }
    const Present present(tensors);
    variable_list ys = LoraLinear::apply(at::TensorList(present.tensors), present.place, weights, scales, dropout, source);
    for (size_t i = 0; i < n; ++i) out[i] = new at::Tensor(ys[i]);
  });
}
