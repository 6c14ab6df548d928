// Cross-entropy straight from hidden states, chunk by chunk of rows; the gradients are made on the way forward, so the
// logits of no more than one chunk exist at any time.
#include "kernels.h"
#include "product.h"
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <algorithm>
#include <vector>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Turns `logits` into the gradient of the summed loss where `grad`, and returns the summed loss.
at::Tensor softmax_loss(at::Tensor& logits, const at::Tensor& targets, bool grad) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  if (logits.is_cpu() && (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kDouble)) {
    const at::Tensor ids = targets.contiguous();
    at::Tensor losses = at::empty({rows}, at::kDouble);
    AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "cross_entropy", [&] {
      at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          losses.data_ptr<double>()[i] = kernel::cross_entropy(logits.data_ptr<scalar_t>() + i * vocab,
                                                               ids.data_ptr<int64_t>() + i, 1, vocab, grad);
      });
    });
    return losses.sum();
  }
  const at::Tensor wide = logits.to(at::kFloat), log_sum = wide.logsumexp(1), column = targets.unsqueeze(1);
  const at::Tensor loss = (log_sum - wide.gather(1, column).squeeze(1)).sum(at::kDouble);
  if (grad) {
    at::Tensor p = (wide - log_sum.unsqueeze(1)).exp_();
    p.scatter_add_(1, column, at::full(column.sizes(), -1.0, p.options()));
    logits = p.to(logits.scalar_type());
  }
  return loss;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  // The list of `place` is hidden, weight (a gap where it is packed), bias, a, b; `wanted` says which need a gradient.
  static at::Tensor forward(AutogradContext* ctx, at::TensorList present, std::vector<int64_t> place, std::vector<bool> wanted,
                            const Stored& weight, const at::Tensor& targets, double scale, double softcap, int64_t chunk) {
    const variable_list tensors = with_gaps(present, place);
    const at::Tensor hidden = tensors[0].contiguous(), &bias = tensors[2];
    const bool adapted = tensors[3].defined(), any = std::find(wanted.begin(), wanted.end(), true) != wanted.end();
    const at::Tensor a = adapted ? tensors[3].to(hidden.scalar_type()) : at::Tensor();
    const at::Tensor b = adapted ? tensors[4].to(hidden.scalar_type()) : at::Tensor();
    variable_list grads(5);
    for (size_t i = 0; i < 5; ++i)
      if (wanted[i]) grads[i] = at::zeros_like(tensors[i]);
    if (wanted[0]) grads[0] = at::empty_like(hidden);
    at::Tensor loss = at::zeros({}, hidden.options().dtype(at::kDouble));
    for (int64_t start = 0; start < hidden.size(0); start += chunk) {
      const int64_t rows = std::min(chunk, hidden.size(0) - start);
      const at::Tensor h = hidden.narrow(0, start, rows);
      at::Tensor logits, u;  // u is scale * h A^T
      std::vector<Term> terms{{h, weight, true}};
      if (adapted) {
        sum_of_products(u, false, {}, {{h, Stored(a), true}});
        terms.push_back({u.mul_(scale), Stored(b), true});
      }
      sum_of_products(logits, false, bias, terms);
      at::Tensor slope;  // of the cap, where there is one
      if (softcap > 0) {
        const at::Tensor t = logits.div(softcap).tanh_();
        slope = any ? 1 - t * t : at::Tensor();
        logits = t.mul_(softcap);
      }
      loss.add_(softmax_loss(logits, targets.narrow(0, start, rows), any));
      if (slope.defined()) logits.mul_(slope);
      const at::Tensor& g = logits;  // the gradient of the logits from here on
      at::Tensor gu;  // scale * g B
      if (adapted && any) {
        sum_of_products(gu, false, {}, {{g, Stored(b), false}});
        gu.mul_(scale);
      }
      if (wanted[0]) {
        at::Tensor gh = grads[0].narrow(0, start, rows);
        std::vector<Term> into_h{{g, weight, false}};
        if (adapted) into_h.push_back({gu, Stored(a), false});
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
    result.resize(result.size() + 7);  // the arguments that need no gradient
    return result;
  }
};

}  // namespace

extern "C" Message lt_cross_entropy(CTensor hidden, const Projection* head, CTensor targets, double softcap, int64_t chunk,
                                    CTensor* out) {
  return guarded([&] {
    const Stored weight(head->weight);
    const std::vector<at::Tensor> tensors{*hidden, weight.form == PLAIN ? weight.data : at::Tensor(), value(head->bias), value(head->a), value(head->b)};
    std::vector<bool> wanted;
    for (const at::Tensor& t : tensors) wanted.push_back(at::GradMode::is_enabled() && t.defined() && t.requires_grad());
    const Present present(tensors);
    *out = new at::Tensor(
        CrossEntropy::apply(at::TensorList(present.tensors), present.place, wanted, weight, *targets, head->scale, softcap, chunk));
  });
}
