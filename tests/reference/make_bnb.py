"""Weights packed by bitsandbytes on the CPU, with what it makes of them again: make_bnb.py OUT.safetensors

bitsandbytes 0.50.2. Two matrices, one whose numbers do not fill the last block, with plain and with packed scales; the keys
are those that its Linear4bit writes. `NAME.dense` is what bitsandbytes dequantises. `int8` is Linear8bitLt's form."""
import sys, torch
from safetensors.torch import save_file
from bitsandbytes import functional as F

torch.manual_seed(7)
out = {}
for name, shape in (("whole", (48, 128)), ("ragged", (9, 50))):
    weight = torch.randn(*shape) * 0.05
    weight[1, 3] = 1.5  # one outlier makes the codes of its block coarse
    weight[2] = 0.0
    out[f"{name}.source"] = weight
    for form, double in (("plain", False), ("double", True)):
        codes, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        key = f"{name}.{form}"
        out[f"{key}.weight"] = codes
        for part, value in state.as_dict(packed=True).items():
            out[f"{key}.weight.{part}"] = value
        out[f"{key}.dense"] = F.dequantize_4bit(codes, state)
rows = out["whole.source"]
scale = rows.abs().amax(1)
out["int8.codes"] = torch.round(rows * (127.0 / scale.clamp(min=1e-38))[:, None]).to(torch.int8)
out["int8.scale"] = scale
out["int8.dense"] = F.int8_vectorwise_dequant(out["int8.codes"], scale)
out["table"] = F.create_dynamic_map()
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[1])
