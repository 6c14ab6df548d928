// Attention over examples laid end to end, causal or within the whole example: no mask over the batch, keys never repeated.
#include "attend.h"
#include "product.h"
#include <torch/csrc/autograd/custom_function.h>
#include <algorithm>
#include <vector>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// A run of neighbouring segments of one length: attended to in one call.
struct Run {
  int64_t start, count, len;
};

std::vector<Run> runs_of(at::IntArrayRef lens) {
  std::vector<Run> runs;
  int64_t start = 0;
  for (int64_t len : lens) {
    if (!runs.empty() && runs.back().len == len) ++runs.back().count;
    else runs.push_back({start, 1, len});
    start += len;
  }
  return runs;
}

// The heads of one run that share no key with each other: [tokens, kv * groups, d] -> [count, kv, len, d] of query group g.
at::Tensor part(const at::Tensor& t, const Run& run, int64_t kv, int64_t group) {
  const int64_t d = t.size(2), groups = t.size(1) / kv;
  return t.narrow(0, run.start, run.count * run.len).view({run.count, run.len, kv, groups, d}).select(3, group).transpose(1, 2);
}

// Keys that a query sees within `window`; undefined where causality alone says it.
std::optional<at::Tensor> window_mask(int64_t len, int64_t window, const at::TensorOptions& like) {
  if (window <= 0 || window >= len) return std::nullopt;
  const at::Tensor seen = at::ones({len, len}, like.dtype(at::kBool)).tril().triu(1 - window);
  return at::zeros({len, len}, like).masked_fill_(seen.logical_not(), -std::numeric_limits<double>::infinity());
}

#if defined(LORA_SGEMM)

// fp32 by the products of our own.
struct OwnAttention : torch::autograd::Function<OwnAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                            std::vector<int64_t> lens, double scale, int64_t window, bool causal) {
    const at::Tensor q = q_.contiguous(), k = k_.contiguous(), v = v_.contiguous();
    at::Tensor out = at::empty_like(q), lse = at::empty({q.size(0), q.size(1)}, q.options());
    const sgemm::Kernel& kernel = *own_kernel();
    attend::forward(kernel, q, k, v, lens, {scale, window, causal}, out, lse);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["lens"] = lens;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["kernel"] = reinterpret_cast<int64_t>(&kernel);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list s = ctx->get_saved_variables();
    const auto* kernel = reinterpret_cast<const sgemm::Kernel*>(ctx->saved_data["kernel"].toInt());
    const attend::Rule rule{ctx->saved_data["scale"].toDouble(), ctx->saved_data["window"].toInt(), ctx->saved_data["causal"].toBool()};
    at::Tensor gq = at::empty_like(s[0]), gk = at::empty_like(s[1]), gv = at::empty_like(s[2]);
    attend::backward(*kernel, grads[0].contiguous(), s[0], s[1], s[2], s[3], s[4], ctx->saved_data["lens"].toIntVector(),
                     rule, gq, gk, gv);
    return {gq, gk, gv, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

#endif

struct CpuAttention : torch::autograd::Function<CpuAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                            std::vector<int64_t> lens, double scale, int64_t window, bool causal) {
    const at::Tensor q = q_.contiguous(), k = k_.contiguous(), v = v_.contiguous();
    const int64_t kv = k.size(1), groups = q.size(1) / kv;
    at::Tensor out = at::empty_like(q);
    variable_list saved{q, k, v, out};
    for (const Run& run : runs_of(lens)) {
      const auto mask = window_mask(run.len, window, q.options());
      for (int64_t g = 0; g < groups; ++g) {
        auto [o, lse] = at::_scaled_dot_product_flash_attention_for_cpu(part(q, run, kv, g), part(k, run, kv, 0),
                                                                        part(v, run, kv, 0), 0.0, causal && !mask, mask, scale);
        part(out, run, kv, g).copy_(o);
        saved.push_back(lse);
      }
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["lens"] = lens;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    ctx->saved_data["causal"] = causal;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], g_out = grads[0].contiguous();
    const std::vector<int64_t> lens = ctx->saved_data["lens"].toIntVector();
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t window = ctx->saved_data["window"].toInt(), kv = k.size(1), groups = q.size(1) / kv;
    const bool causal = ctx->saved_data["causal"].toBool();
    at::Tensor gq = at::empty_like(q), gk = at::empty_like(k), gv = at::empty_like(v);
    size_t next = 4;
    for (const Run& run : runs_of(lens)) {
      const auto mask = window_mask(run.len, window, q.options());
      for (int64_t g = 0; g < groups; ++g) {
        auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
            part(g_out, run, kv, g), part(q, run, kv, g), part(k, run, kv, 0), part(v, run, kv, 0), part(out, run, kv, g),
            saved[next++], 0.0, causal && !mask, mask, scale);
        part(gq, run, kv, g).copy_(dq);
        at::Tensor k_sum = part(gk, run, kv, 0), v_sum = part(gv, run, kv, 0);
        if (g == 0) k_sum.copy_(dk), v_sum.copy_(dv);
        else k_sum.add_(dk), v_sum.add_(dv);
      }
    }
    return {gq, gk, gv, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// FlashAttention over cumulative lengths (half precision on CUDA): grouped queries and windows are its own.
struct VarlenAttention : torch::autograd::Function<VarlenAttention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            at::Tensor offsets, int64_t longest, double scale, int64_t window, bool causal) {
    const std::optional<int64_t> left = window > 0 ? std::optional<int64_t>(window - 1) : std::nullopt;
    const std::optional<int64_t> right = window > 0 ? std::optional<int64_t>(0) : std::nullopt;
    auto [out, lse, seed, unused, debug] =
        at::_flash_attention_forward(q, k, v, offsets, offsets, longest, longest, 0.0, causal, false, scale, left, right);
    ctx->save_for_backward({q, k, v, out, lse, offsets, seed, unused});
    ctx->saved_data["longest"] = longest;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    ctx->saved_data["causal"] = causal;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list s = ctx->get_saved_variables();
    const int64_t longest = ctx->saved_data["longest"].toInt(), window = ctx->saved_data["window"].toInt();
    const std::optional<int64_t> left = window > 0 ? std::optional<int64_t>(window - 1) : std::nullopt;
    const std::optional<int64_t> right = window > 0 ? std::optional<int64_t>(0) : std::nullopt;
    auto [gq, gk, gv] =
        at::_flash_attention_backward(grads[0].contiguous(), s[0], s[1], s[2], s[3], s[4], s[5], s[5], longest, longest, 0.0,
                                      ctx->saved_data["causal"].toBool(), s[6], s[7], ctx->saved_data["scale"].toDouble(), left, right);
    return {gq, gk, gv, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// Any device and dtype, by libtorch's own choice of kernel and its own autograd.
at::Tensor composed(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef lens, double scale,
                    int64_t window, bool causal) {
  std::vector<at::Tensor> outs;
  for (const Run& run : runs_of(lens)) {
    const auto view = [&](const at::Tensor& t) {
      return t.narrow(0, run.start, run.count * run.len).view({run.count, run.len, t.size(1), t.size(2)}).transpose(1, 2);
    };
    const auto mask = window_mask(run.len, window, q.options());
    const at::Tensor o = at::scaled_dot_product_attention(view(q), view(k), view(v), mask, 0.0, causal && !mask, scale, true);
    outs.push_back(o.transpose(1, 2).reshape({run.count * run.len, q.size(1), q.size(2)}));
  }
  return at::cat(outs, 0);
}

// Scores capped by `softcap * tanh(score / softcap)` before the mask: no fused kernel takes that, so it is written out.
at::Tensor capped(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef lens, double scale,
                  int64_t window, double softcap, bool causal) {
  const int64_t kv = k.size(1), groups = q.size(1) / kv, d = q.size(2);
  std::vector<at::Tensor> outs;
  for (const Run& run : runs_of(lens)) {
    const int64_t rows = run.count * run.len;
    const auto heads_first = [&](const at::Tensor& t, int64_t group) {
      return t.narrow(0, run.start, rows).reshape({run.count, run.len, kv, group, d}).permute({0, 2, 3, 1, 4});
    };
    at::Tensor seen = at::ones({run.len, run.len}, q.options().dtype(at::kBool));
    if (causal) seen = seen.tril();
    if (window > 0) seen = seen.triu(1 - window);
    const at::Tensor scores = at::matmul(heads_first(q, groups), heads_first(k, 1).transpose(-1, -2)).mul(scale / softcap);
    const at::Tensor weights =
        scores.tanh().mul(softcap).masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity()).softmax(-1);
    outs.push_back(at::matmul(weights, heads_first(v, 1)).permute({0, 3, 1, 2, 4}).reshape({rows, q.size(1), d}));
  }
  return at::cat(outs, 0);
}

}  // namespace

extern "C" Message lt_attention(CTensor q, CTensor k, CTensor v, const int64_t* lens, size_t n, double scale, int64_t window,
                                double softcap, int causal_, CTensor* out) {
  return guarded([&] {
    const at::ScalarType dtype = q->scalar_type();
    const std::vector<int64_t> l(lens, lens + n);
    const bool causal = causal_ != 0;
    if (softcap > 0 && n > 0) {
      *out = new at::Tensor(capped(*q, *k, *v, l, scale, window, softcap, causal));
#if defined(LORA_SGEMM)
    } else if (q->is_cpu() && n > 0 && dtype == at::kFloat && own_kernel()) {
      *out = new at::Tensor(OwnAttention::apply(*q, *k, *v, l, scale, window, causal));
#endif
    } else if (q->is_cpu() && n > 0) {
      *out = new at::Tensor(CpuAttention::apply(*q, *k, *v, l, scale, window, causal));
    } else if (q->is_cuda() && n > 0 && (dtype == at::kHalf || dtype == at::kBFloat16)) {
      std::vector<int32_t> offsets{0};
      for (int64_t len : l) offsets.push_back(offsets.back() + static_cast<int32_t>(len));
      const at::Tensor on_device = at::tensor(offsets, at::kInt).to(q->device(), /*non_blocking=*/true);
      *out = new at::Tensor(VarlenAttention::apply(q->contiguous(), k->contiguous(), v->contiguous(), on_device,
                                                   *std::max_element(l.begin(), l.end()), scale, window, causal));
    } else {
      *out = new at::Tensor(n ? composed(*q, *k, *v, l, scale, window, causal) : at::empty_like(*q));
    }
  });
}
