"""Steps of bitsandbytes' AdamW8bit and Lion on the CPU, and its tables: make_optimizers.py OUT.safetensors

bitsandbytes 0.50.2. Its own library for the CPU takes codes near zero from a coarse grid instead of the nearest entry, so the moments
are packed by its plain implementation here (which it keeps for other dtypes), as its GPU kernels do. For AdamW, `adamw.N.*` is
what step N starts from (parameter, codes, scales), its gradient, and what it leaves; 700 numbers, so the last block is not
full. Magnitudes of a gradient stay within a factor of 50 of each other, so that no second moment falls below the table."""
import sys, torch
from bitsandbytes import functional as F
from bitsandbytes.backends.cpu import ops
from bitsandbytes.optim import AdamW8bit, Lion
from safetensors.torch import save_file

BLOCK = 256


def nearest(values, code, absmax, out, blocksize):
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, blocksize)
    out.copy_(codes)
    absmax.copy_(scales)


ops._quant_blockwise_fp32_direct = nearest
torch.manual_seed(11)
out = {"table.signed": F.create_dynamic_map(signed=True), "table.unsigned": F.create_dynamic_map(signed=False)}


def gradient(n, step):
    size = torch.rand(n) * 0.98 + 0.02
    return torch.where(torch.rand(n) < 0.5, -size, size) * (0.5 if step % 3 else 2.0)


p = torch.nn.Parameter(torch.randn(700))
opt = AdamW8bit([p], lr=1e-2, weight_decay=0.1, min_8bit_size=0)
for step in range(1, 13):
    key = f"adamw.{step}"
    state = opt.state[p]
    for name in ("state1", "state2", "absmax1", "absmax2"):
        if state:
            out[f"{key}.{name}"] = state[name].clone()
    out[f"{key}.param"] = p.detach().clone()
    p.grad = gradient(700, step)
    out[f"{key}.grad"] = p.grad.clone()
    opt.step()
for name in ("state1", "state2", "absmax1", "absmax2"):
    out[f"adamw.13.{name}"] = opt.state[p][name].clone()
out["adamw.13.param"] = p.detach().clone()

q = torch.nn.Parameter(torch.randn(300))
out["lion.start"] = q.detach().clone()
lion = Lion([q], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
grads = []
for step in range(20):
    grads.append(gradient(300, step))
    q.grad = grads[-1].clone()
    lion.step()
out["lion.grads"] = torch.stack(grads)
out["lion.end"] = q.detach().clone()
out["lion.exp_avg"] = lion.state[q]["state1"].clone()
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[1])
