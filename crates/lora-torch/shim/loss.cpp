// Cross-entropy straight from hidden states, chunk by chunk of rows; the gradients are made on the way forward, so the
// logits of no more than one chunk exist at any time.
#include "device_kernels.h"
#include "kernels.h"
#include "product.h"
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <algorithm>
#include <vector>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The loss of each row, in double; turns `logits` into the gradient of their sum, each row times its weight, where `grad`.
at::Tensor softmax_loss(at::Tensor& logits, const at::Tensor& targets, const at::Tensor& weights, bool grad) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (device::served(logits)) {
    logits = logits.contiguous();
    const at::Tensor ids = targets.contiguous(), by = weights.defined() ? weights.to(at::kDouble).contiguous() : weights;
    const at::Tensor losses = at::empty({rows}, logits.options().dtype(at::kDouble));
    device::in_blocks("cross_entropy", logits, rows, device::memory_of(logits), device::memory_of(ids), device::memory_of(by),
                      device::memory_of(losses), vocab, static_cast<int>(grad));
    return losses;
  }
  if (logits.is_cpu() && (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble)) {
    const at::Tensor ids = targets.contiguous();
    const at::Tensor scales = weights.defined() ? weights.to(at::kDouble).contiguous() : weights;
    at::Tensor losses = at::empty({rows}, at::kDouble);
    AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "cross_entropy", [&] {
      at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          scalar_t* row = logits.data_ptr<scalar_t>() + i * vocab;
          const scalar_t scale = scales.defined() ? scalar_t(scales.data_ptr<double>()[i]) : scalar_t(1);
          losses.data_ptr<double>()[i] =
              kernel::rows<scalar_t>().cross_entropy(row, ids.data_ptr<int64_t>()[i], vocab, grad, scale);
        }
      });
    });
    return losses;
  }
  const at::Tensor wide = logits.to(at::kFloat), log_sum = wide.logsumexp(1), column = targets.unsqueeze(1);
  const at::Tensor losses = (log_sum - wide.gather(1, column).squeeze(1)).to(at::kDouble);
  if (grad) {
    at::Tensor p = (wide - log_sum.unsqueeze(1)).exp_();
    p.scatter_add_(1, column, at::full(column.sizes(), -1.0, p.options()));
    if (weights.defined()) p.mul_(weights.to(p.scalar_type()).unsqueeze(1));
    logits = p.to(logits.scalar_type());
  }
  return losses;
}

// A head over hidden states: bias, a and b where it has them, scale of the adapter, cap of the logits.
struct Head {
  Stored weight;
  at::Tensor bias, a, b;
  double scale, softcap;

  // What a chunk's logits are made with on the way.
  struct Made {
    at::Tensor logits, u, slope;  // u is scale * h A^T, slope that of the cap
  };

  // The logits of rows h, written into the beginning of `space`, which is made by the first call.
  Made of(const at::Tensor& h, at::Tensor& space, bool slope) const {
    Made made;
    if (space.defined()) made.logits = space.narrow(0, 0, h.size(0));
    std::vector<Term> terms{{h, weight, true}};
    if (a.defined()) {
      sum_of_products(made.u, false, {}, {{h, Stored(a), true}});
      terms.push_back({made.u.mul_(scale), Stored(b), true});
    }
    sum_of_products(made.logits, false, bias, terms);
    if (!space.defined()) space = made.logits;
    if (softcap > 0) {
      const at::Tensor t = made.logits.div(softcap).tanh_();
      if (slope) made.slope = 1 - t * t;
      made.logits = t.mul_(softcap);
    }
    return made;
  }
};

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  // The list of `place` is hidden, weight (a gap where it is packed), bias, a, b; `wanted` says which need a gradient.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList present, std::vector<int64_t> place, std::vector<bool> wanted,
                            const Stored& weight, const at::Tensor& targets, const std::optional<at::Tensor>& given,
                            double scale, double softcap, int64_t chunk) {
    const at::Tensor weights = given.value_or(at::Tensor());
    const variable_list tensors = with_gaps(present, place);
    const at::Tensor hidden = tensors[0].contiguous();
    const bool adapted = tensors[3].defined(), any = std::find(wanted.begin(), wanted.end(), true) != wanted.end();
    const auto as_hidden = [&](const at::Tensor& t) { return t.defined() ? t.to(hidden.scalar_type()) : t; };
    const Head head{weight, tensors[2], as_hidden(tensors[3]), as_hidden(tensors[4]), scale, softcap};
    variable_list grads(5);
    for (size_t i = 0; i < 5; ++i)
      if (wanted[i]) grads[i] = at::zeros_like(tensors[i]);
    if (wanted[0]) grads[0] = at::empty_like(hidden);
    at::Tensor loss = at::zeros({}, hidden.options().dtype(at::kDouble)), space;
    for (int64_t start = 0; start < hidden.size(0); start += chunk) {
      const int64_t rows = std::min(chunk, hidden.size(0) - start);
      const at::Tensor h = hidden.narrow(0, start, rows);
      const at::Tensor here = weights.defined() ? weights.narrow(0, start, rows) : weights;
      auto [logits, u, slope] = head.of(h, space, any);
      const at::Tensor losses = softmax_loss(logits, targets.narrow(0, start, rows), here, any);
      loss.add_(here.defined() ? losses.mul(here).sum() : losses.sum());
      if (slope.defined()) logits.mul_(slope);
      const at::Tensor& g = logits;  // the gradient of the logits from here on
      at::Tensor gu;  // scale * g B
      if (adapted && any) {
        sum_of_products(gu, false, {}, {{g, Stored(head.b), false}});
        gu.mul_(scale);
      }
      if (wanted[0]) {
        at::Tensor gh = grads[0].narrow(0, start, rows);
        std::vector<Term> into_h{{g, weight, false}};
        if (adapted) into_h.push_back({gu, Stored(head.a), false});
        sum_of_products(gh, false, {}, into_h);
      }
      if (wanted[1]) grads[1].add_(at::mm(g.t(), h));
      if (wanted[2]) grads[2].add_(g.sum(0));
      if (wanted[3]) grads[3].add_(thin_transposed_product(gu, h));
      if (wanted[4]) grads[4].add_(thin_transposed_product(u, g).t());
    }
    ctx->save_for_backward(grads);
    ctx->saved_data["place"] = place;
    return hidden.scalar_type() == at::kDouble ? loss : loss.to(at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> place = ctx->saved_data["place"].toIntVector();
    variable_list result;
    for (size_t i = 0; i < saved.size(); ++i)
      if (place[i] >= 0) result.push_back(saved[i].defined() ? saved[i].mul(grads[0].to(saved[i].scalar_type())) : saved[i]);
    result.resize(result.size() + 8);  // the arguments that need no gradient
    return result;
  }
};

}  // namespace

extern "C" Message lt_cross_entropy(CTensor hidden, const Projection* head, CTensor targets, CTensor weights, double softcap,
                                    int64_t chunk, CTensor* out) {
  return guarded([&] {
    const Stored weight(head->weight);
    const std::vector<at::Tensor> tensors{*hidden, weight.form == PLAIN ? weight.data : at::Tensor(), value(head->bias), value(head->a), value(head->b)};
    std::vector<bool> wanted;
    for (const at::Tensor& t : tensors) wanted.push_back(at::GradMode::is_enabled() && t.defined() && t.requires_grad());
    const Present present(tensors);
    const std::optional<at::Tensor> by_row = weights ? std::optional(*weights) : std::nullopt;
    *out = new at::Tensor(CrossEntropy::apply(at::TensorList(present.tensors), present.place, wanted, weight, *targets, by_row,
                                              head->scale, softcap, chunk));
  });
}

extern "C" Message lt_token_losses(CTensor hidden, const Projection* head, CTensor targets, double softcap, int64_t chunk,
                                   CTensor* out) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    const at::Tensor h = hidden->contiguous();
    const auto as_hidden = [&](CTensor t) { return value(t).defined() ? value(t).to(h.scalar_type()) : at::Tensor(); };
    const Head own{Stored(head->weight), value(head->bias), as_hidden(head->a), as_hidden(head->b), head->scale, softcap};
    at::Tensor losses = at::empty({h.size(0)}, h.options().dtype(at::kDouble)), space;
    for (int64_t start = 0; start < h.size(0); start += chunk) {
      const int64_t rows = std::min(chunk, h.size(0) - start);
      at::Tensor logits = own.of(h.narrow(0, start, rows), space, false).logits;
      losses.narrow(0, start, rows).copy_(softmax_loss(logits, targets->narrow(0, start, rows), {}, false));
    }
    *out = new at::Tensor(losses);
  });
}
