// Optimizers over flat buffers, in place, each in one pass.
#include "shim.h"
#include "kernels.h"
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t GRAIN = 16384;  // elements below which a thread is not worth its start
constexpr int64_t BLOCK = 256;    // numbers that share a scale
constexpr int64_t CODES = 256;    // numbers that a code can stand for

// What a step of AdamW multiplies and divides by.
struct Factors {
  float beta1, beta2, keep, rate, root, eps;

  explicit Factors(const AdamW& h)
      : beta1(h.beta1), beta2(h.beta2), keep(1.0 - h.lr * h.weight_decay),
        rate(h.lr / (1.0 - std::pow(h.beta1, h.step))), root(std::sqrt(1.0 - std::pow(h.beta2, h.step))), eps(h.eps) {}
};

// Where one code's numbers end and the next one's begin.
at::Tensor midpoints(const at::Tensor& table) {
  return table.narrow(0, 0, CODES - 1).add(table.narrow(0, 1, CODES - 1)).div_(2);
}

at::Tensor dense(const Blockwise& moment) {
  return moment.table->index_select(0, moment.codes->to(at::kLong)).view({-1, BLOCK}).mul_(moment.absmax->unsqueeze(1));
}

// Packs `[blocks, BLOCK]`; with `least`, what is not zero gets no code below that.
void pack(const Blockwise& moment, const at::Tensor& value, int64_t least) {
  const at::Tensor absmax = value.abs().amax(1);
  const at::Tensor inverse = at::where(absmax > 0, absmax.reciprocal(), 0);
  at::Tensor codes = at::bucketize(value.mul(inverse.unsqueeze(1)), midpoints(*moment.table));
  if (least > 0) codes = at::where(value != 0, codes.clamp_min(least), codes);
  moment.codes->copy_(codes.view({-1}));
  moment.absmax->copy_(absmax);
}

void adamw_8bit_anywhere(const at::Tensor& param, const at::Tensor& grad, const Blockwise& m, const Blockwise& v, const Factors& f) {
  const at::Tensor g = grad.view({-1, BLOCK});
  const at::Tensor first = dense(m).mul_(f.beta1).add_(g, 1.0f - f.beta1);
  const at::Tensor second = dense(v).mul_(f.beta2).addcmul_(g, g, 1.0f - f.beta2);
  param.view({-1, BLOCK}).mul_(f.keep).addcdiv_(first, second.sqrt().div_(f.root).add_(f.eps), -f.rate);
  pack(m, first, 0);
  pack(v, second, 1);
}

void adamw_8bit_cpu(const at::Tensor& param, const at::Tensor& grad, const Blockwise& m, const Blockwise& v, const Factors& f) {
  const at::Tensor middles[2] = {midpoints(*m.table), midpoints(*v.table)};
  const float *tm = m.table->data_ptr<float>(), *tv = v.table->data_ptr<float>();
  const float *mm = middles[0].data_ptr<float>(), *mv = middles[1].data_ptr<float>();
  float *p = param.data_ptr<float>(), *am = m.absmax->data_ptr<float>(), *av = v.absmax->data_ptr<float>();
  const float* g = grad.data_ptr<float>();
  uint8_t *cm = m.codes->data_ptr<uint8_t>(), *cv = v.codes->data_ptr<uint8_t>();
  const kernel::Blocks& block = kernel::widest().blocks;
  at::parallel_for(0, param.numel() / BLOCK, GRAIN / BLOCK, [&](int64_t begin, int64_t end) {
    float first[BLOCK], second[BLOCK];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * BLOCK;
      block.unpack(cm + at, tm, am[b], first, BLOCK);
      block.unpack(cv + at, tv, av[b], second, BLOCK);
      block.adamw(p + at, g + at, first, second, f.beta1, f.beta2, f.keep, f.rate, f.root, f.eps, BLOCK);
      block.pack(first, mm, cm + at, am + b, 0, BLOCK);
      block.pack(second, mv, cv + at, av + b, 1, BLOCK);
    }
  });
}

}  // namespace

extern "C" Message lt_adamw(CTensor param, CTensor grad, CTensor exp_avg, CTensor exp_avg_sq, const AdamW* h) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    // The kernel counts from the number that it is given.
    const at::Tensor step = at::full({}, static_cast<double>(h->step), param->options().dtype(at::kFloat));
    at::_fused_adamw_({param->detach()}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {step}, h->lr, h->beta1, h->beta2,
                      h->weight_decay, h->eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

extern "C" Message lt_lion(CTensor param, CTensor grad, CTensor exp_avg, const Lion* h) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    const at::Tensor p = param->detach();
    if (!p.is_cpu() || (p.scalar_type() != at::kFloat && p.scalar_type() != at::kDouble)) {
      p.mul_(1.0 - h->lr * h->weight_decay).sub_(exp_avg->mul(h->beta1).add_(*grad, 1.0 - h->beta1).sign_(), h->lr);
      exp_avg->mul_(h->beta2).add_(*grad, 1.0 - h->beta2);
      return;
    }
    AT_DISPATCH_FLOATING_TYPES(p.scalar_type(), "lion", [&] {
      scalar_t *x = p.data_ptr<scalar_t>(), *m = exp_avg->data_ptr<scalar_t>();
      const scalar_t* g = grad->data_ptr<scalar_t>();
      at::parallel_for(0, p.numel(), GRAIN, [&](int64_t i, int64_t end) {
        kernel::rows<scalar_t>().lion(x + i, g + i, m + i, scalar_t(h->lr), scalar_t(h->beta1), scalar_t(h->beta2),
                                      scalar_t(1.0 - h->lr * h->weight_decay), end - i);
      });
    });
  });
}

// Numbers of a multiple of BLOCK.
extern "C" Message lt_adamw_8bit(CTensor param, CTensor grad, const Blockwise* m, const Blockwise* v, const AdamW* h) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    const at::Tensor p = param->detach();
    (p.is_cpu() ? adamw_8bit_cpu : adamw_8bit_anywhere)(p, *grad, *m, *v, Factors(*h));
  });
}
