// RMSNorm, rotary embedding, gated activations and dropout: one pass forward, one pass back.
#include "pointwise.h"
#include "device_kernels.h"
#include "kernels.h"
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <mutex>

using device::memory_of;
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

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  if (!has_kernel(x)) return at::_fused_rms_norm(x, {x.size(-1)}, weight.to(x.scalar_type()), eps);
  const int64_t d = x.size(-1), rows = d ? x.numel() / d : 0;
  const at::Tensor w = weight.to(x.scalar_type()).contiguous();
  at::Tensor y = at::empty_like(x), rstd = at::empty({rows}, x.options());
  DISPATCH(x, over_rows(rows, d, [&](int64_t i, int64_t end) {
    kernel::rows<scalar_t>().rms_norm(x.data_ptr<scalar_t>() + i * d, w.data_ptr<scalar_t>(), y.data_ptr<scalar_t>() + i * d,
                                      rstd.data_ptr<scalar_t>() + i, end - i, d, eps);
  }));
  return {y, rstd};
}

at::Tensor gated(int64_t act, const at::Tensor& gate, const at::Tensor& up) {
  if (device::served(gate)) {
    const at::Tensor from = gate.contiguous(), by = up.contiguous(), y = at::empty_like(from);
    device::over("gated", y, y.numel(), memory_of(from), memory_of(by), memory_of(y), static_cast<int>(act), y.numel());
    return y;
  }
  if (!has_kernel(gate)) {
    return (act == SWIGLU ? at::silu(gate) : at::gelu(gate, act == GEGLU_TANH ? "tanh" : "none")).mul_(up);
  }
  at::Tensor y = at::empty_like(gate);
  DISPATCH(gate, at::parallel_for(0, gate.numel(), GRAIN, [&](int64_t i, int64_t end) {
    const scalar_t *from = gate.data_ptr<scalar_t>() + i, *by = up.data_ptr<scalar_t>() + i;
    scalar_t* to = y.data_ptr<scalar_t>() + i;
    if (act == SWIGLU) kernel::rows<scalar_t>().swiglu(from, by, to, end - i);
    else kernel::rows<scalar_t>().geglu(from, by, to, act == GEGLU_TANH, end - i);
  }));
  return y;
}

Dropout Dropout::draw(double p) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(generator.mutex());
  return {p, static_cast<int64_t>(at::check_generator<at::CPUGeneratorImpl>(generator)->random64())};
}

at::Tensor Dropout::operator()(const at::Tensor& x_) const {
  const at::Tensor x = x_.contiguous();
  const double scale = 1.0 / (1.0 - p);
  const auto bound = static_cast<uint32_t>(p * 4294967296.0);
  if (device::served(x)) {
    const at::Tensor y = at::empty_like(x);
    device::over("dropout", y, y.numel(), memory_of(x), memory_of(y), static_cast<uint64_t>(key), bound, scale, y.numel());
    return y;
  }
  if (!has_kernel(x)) {
    at::Generator own = at::globalContext().defaultGenerator(x.device()).clone();
    own.set_current_seed(static_cast<uint64_t>(key));
    return at::rand(x.sizes(), own, x.options()).ge_(p).mul_(x).mul_(scale);
  }
  at::Tensor y = at::empty_like(x);
  DISPATCH(x, at::parallel_for(0, x.numel(), GRAIN, [&](int64_t i, int64_t end) {
    kernel::rows<scalar_t>().dropout(x.data_ptr<scalar_t>() + i, y.data_ptr<scalar_t>() + i, static_cast<uint64_t>(key), bound,
                                     scalar_t(scale), i, end - i);
  }));
  return y;
}

namespace {

struct RmsNorm : Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_, const at::Tensor& weight, double eps) {
    const at::Tensor x = x_.contiguous();
    const auto [y, rstd] = rms_norm(x, weight, eps);
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
  if (device::served(x)) {
    const at::Tensor y = at::empty_like(x);
    device::over("rotary", y, y.numel(), memory_of(x), memory_of(cos), memory_of(sin), memory_of(y), heads, d, half,
                 static_cast<int>(sign), y.numel());
    return y;
  }
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

struct Gated : Function<Gated> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_, const at::Tensor& up_, int64_t act) {
    const at::Tensor gate = gate_.contiguous(), up = up_.contiguous();
    ctx->save_for_backward({gate, up});
    ctx->saved_data["act"] = act;
    return gated(act, gate, up);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t act = ctx->saved_data["act"].toInt();
    const at::Tensor &gate = saved[0], &up = saved[1], g = grads[0].contiguous();
    if (device::served(gate)) {
      const at::Tensor ggate = at::empty_like(gate), gup = at::empty_like(up);
      device::over("gated_backward", gate, gate.numel(), memory_of(g), memory_of(gate), memory_of(up), memory_of(ggate), memory_of(gup),
                   static_cast<int>(act), gate.numel());
      return {ggate, gup, at::Tensor()};
    }
    if (!has_kernel(gate)) {
      const at::Tensor into = g * up;
      const char* way = act == GEGLU_TANH ? "tanh" : "none";
      if (act == SWIGLU) return {at::silu_backward(into, gate), at::silu(gate).mul_(g), at::Tensor()};
      return {at::gelu_backward(into, gate, way), at::gelu(gate, way).mul_(g), at::Tensor()};
    }
    at::Tensor ggate = at::empty_like(gate), gup = at::empty_like(up);
    DISPATCH(gate, at::parallel_for(0, gate.numel(), GRAIN, [&](int64_t i, int64_t end) {
      const scalar_t *of = g.data_ptr<scalar_t>() + i, *x = gate.data_ptr<scalar_t>() + i, *by = up.data_ptr<scalar_t>() + i;
      scalar_t *gx = ggate.data_ptr<scalar_t>() + i, *gby = gup.data_ptr<scalar_t>() + i;
      if (act == SWIGLU) kernel::rows<scalar_t>().swiglu_backward(of, x, by, gx, gby, end - i);
      else kernel::rows<scalar_t>().geglu_backward(of, x, by, gx, gby, act == GEGLU_TANH, end - i);
    }));
    return {ggate, gup, at::Tensor()};
  }
};

struct Dropped : Function<Dropped> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, double p) {
    const Dropout dropout = Dropout::draw(p);
    ctx->saved_data["p"] = p;
    ctx->saved_data["key"] = dropout.key;
    return dropout(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Dropout dropout{ctx->saved_data["p"].toDouble(), ctx->saved_data["key"].toInt()};
    return {dropout(grads[0]), at::Tensor()};
  }
};

}  // namespace

extern "C" Message lt_rms_norm(CTensor x, CTensor weight, double eps, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(RmsNorm::apply(*x, *weight, eps)); });
}

extern "C" Message lt_rotary(CTensor x, CTensor cos, CTensor sin, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(Rotary::apply(*x, *cos, *sin)); });
}

extern "C" Message lt_gated(int64_t act, CTensor gate, CTensor up, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(Gated::apply(*gate, *up, act)); });
}

extern "C" Message lt_dropout(CTensor x, double p, CTensor* out) {
  return guarded([&] { *out = new at::Tensor(Dropped::apply(*x, p)); });
}
