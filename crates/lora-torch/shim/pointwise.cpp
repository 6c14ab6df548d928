// RMSNorm, rotary embedding and SwiGLU: one pass forward, one pass back.
#include "shim.h"
#include "kernels.h"
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <mutex>

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

constexpr int64_t GRAIN = 16384;  // elements below which a thread is not worth its start

bool has_kernel(const at::Tensor& t) {
  return t.is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

template <typename Body>
void over_rows(int64_t rows, int64_t width, const Body& body) {
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)), body);
}

#define DISPATCH(t, ...) AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "lora_torch", [&] { __VA_ARGS__; })

struct RmsNorm : Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_, const at::Tensor& weight, double eps) {
    const at::Tensor x = x_.contiguous();
    at::Tensor y, rstd;
    if (has_kernel(x)) {
      const int64_t d = x.size(-1), rows = d ? x.numel() / d : 0;
      const at::Tensor w = weight.to(x.scalar_type()).contiguous();
      y = at::empty_like(x);
      rstd = at::empty({rows}, x.options());
      DISPATCH(x, over_rows(rows, d, [&](int64_t i, int64_t end) {
        kernel::rows<scalar_t>().rms_norm(x.data_ptr<scalar_t>() + i * d, w.data_ptr<scalar_t>(), y.data_ptr<scalar_t>() + i * d,
                         rstd.data_ptr<scalar_t>() + i, end - i, d, eps);
      }));
    } else {
      std::tie(y, rstd) = at::_fused_rms_norm(x, {x.size(-1)}, weight.to(x.scalar_type()), eps);
    }
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2], g = grads[0].contiguous();
    const bool want_weight = ctx->needs_input_grad(1);
    at::Tensor gx, gw;
    if (has_kernel(x)) {
      const int64_t d = x.size(-1), rows = rstd.numel();
      const at::Tensor w = weight.to(x.scalar_type()).contiguous();
      gx = at::empty_like(x);
      if (want_weight) gw = at::zeros({d}, x.options());
      const auto part = [&](int64_t i, int64_t end) {
        DISPATCH(x, kernel::rows<scalar_t>().rms_norm_backward(g.data_ptr<scalar_t>() + i * d, x.data_ptr<scalar_t>() + i * d,
                                              w.data_ptr<scalar_t>(), rstd.data_ptr<scalar_t>() + i,
                                              gx.data_ptr<scalar_t>() + i * d,
                                              want_weight ? gw.data_ptr<scalar_t>() : nullptr, end - i, d));
      };
      if (want_weight) part(0, rows);  // one sum in one order: the same bits whatever the number of threads
      else over_rows(rows, d, part);
    } else {
      std::tie(gx, gw) = at::_fused_rms_norm_backward(g, x, {x.size(-1)}, rstd, weight.to(x.scalar_type()), {true, want_weight});
    }
    return {gx, gw.defined() ? gw.to(weight.scalar_type()) : gw, at::Tensor()};
  }
};

at::Tensor rotate(const at::Tensor& x_, const at::Tensor& cos_, const at::Tensor& sin_, double sign) {
  const at::Tensor x = x_.contiguous(), cos = cos_.to(x.scalar_type()).contiguous(), sin = sin_.to(x.scalar_type()).contiguous();
  const int64_t rows = x.size(0), heads = x.size(1), d = x.size(2), half = cos.size(1);
  if (has_kernel(x)) {
    at::Tensor y = at::empty_like(x);
    DISPATCH(x, over_rows(rows, heads * d, [&](int64_t i, int64_t end) {
      kernel::rows<scalar_t>().rotary(x.data_ptr<scalar_t>() + i * heads * d, cos.data_ptr<scalar_t>() + i * half,
                     sin.data_ptr<scalar_t>() + i * half, y.data_ptr<scalar_t>() + i * heads * d, end - i, heads, d, half,
                     scalar_t(sign));
    }));
    return y;
  }
  const at::Tensor c = cos.unsqueeze(1), s = sin.unsqueeze(1).mul(sign);
  const at::Tensor a = x.narrow(2, 0, half), b = x.narrow(2, half, half);
  return at::cat({a * c - b * s, b * c + a * s, x.narrow(2, 2 * half, d - 2 * half)}, 2);
}

struct Rotary : Function<Rotary> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotate(x, cos, sin, 1);
  }
  // A rotation is orthogonal: its gradient is the inverse rotation.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotate(grads[0], saved[0], saved[1], -1), at::Tensor(), at::Tensor()};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_, const at::Tensor& up_) {
    const at::Tensor gate = gate_.contiguous(), up = up_.contiguous();
    ctx->save_for_backward({gate, up});
    if (!has_kernel(gate)) return at::silu(gate).mul_(up);
    at::Tensor y = at::empty_like(gate);
    DISPATCH(gate, at::parallel_for(0, gate.numel(), GRAIN, [&](int64_t i, int64_t end) {
      kernel::rows<scalar_t>().swiglu(gate.data_ptr<scalar_t>() + i, up.data_ptr<scalar_t>() + i, y.data_ptr<scalar_t>() + i, end - i);
    }));
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1], g = grads[0].contiguous();
    if (!has_kernel(gate)) return {at::silu_backward(g * up, gate), at::silu(gate).mul_(g)};
    at::Tensor ggate = at::empty_like(gate), gup = at::empty_like(up);
    DISPATCH(gate, at::parallel_for(0, gate.numel(), GRAIN, [&](int64_t i, int64_t end) {
      kernel::rows<scalar_t>().swiglu_backward(g.data_ptr<scalar_t>() + i, gate.data_ptr<scalar_t>() + i, up.data_ptr<scalar_t>() + i,
                              ggate.data_ptr<scalar_t>() + i, gup.data_ptr<scalar_t>() + i, end - i);
    }));
    return {ggate, gup};
  }
};

}  // namespace

extern "C" Message lt_rms_norm(CTensor x, CTensor weight, double eps, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(RmsNorm::apply(*x, *weight, eps)); });
}

extern "C" Message lt_rotary(CTensor x, CTensor cos, CTensor sin, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(Rotary::apply(*x, *cos, *sin)); });
}

extern "C" Message lt_swiglu(CTensor gate, CTensor up, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(SwiGlu::apply(*gate, *up)); });
}
