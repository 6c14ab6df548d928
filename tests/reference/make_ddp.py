"""PEFT in PyTorch's DistributedDataParallel: torchrun --standalone --nproc-per-node 2 make_ddp.py FIXTURES

Writes FIXTURES/distributed: ragged rows, and what two processes come to that train the adapter llama/adapters/all_linear on them, four
rows a step, two for each process. DDP averages gradients over processes, so each weighs its summed loss by their number over the
trained tokens of the whole step. transformers 5.23.0, PEFT 0.21.2, torch 2.11.0."""
import json, random, sys
from pathlib import Path
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

STEPS, ROWS, A_STEP = 9, 12, 4
fixtures = Path(sys.argv[1])
out = fixtures / "distributed"
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
base = AutoModelForCausalLM.from_pretrained(fixtures / "llama", dtype=torch.float32)
model = PeftModel.from_pretrained(base, fixtures / "llama/adapters/all_linear", is_trainable=True)

draw = random.Random(5)
rows = []
for i in range(ROWS):
    prompt, answer = draw.randint(1, 30), draw.randint(1, 9) if i % 3 else 25
    ids = [draw.randrange(3, base.config.vocab_size) for _ in range(prompt + answer)]
    rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
ddp = DistributedDataParallel(model)
losses, norms = [], []
for step in range(STEPS):
    whole = [rows[(step * A_STEP + i) % ROWS] for i in range(A_STEP)]
    # A row's first token has nothing that predicts it.
    count = sum(label != -100 for row in whole for label in row["labels"][1:])
    own = whole[rank * A_STEP // world : (rank + 1) * A_STEP // world]
    total = torch.zeros((), dtype=torch.float64)
    optimizer.zero_grad()
    for i, row in enumerate(own):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        ddp.require_backward_grad_sync = i == len(own) - 1
        logits = ddp(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        (loss * world / count).backward()
        total += loss.detach().double()
    dist.all_reduce(total)
    norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
    optimizer.step()
    losses.append(float(total) / count)
if rank == 0:
    out.mkdir(exist_ok=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "reference.json").write_text(json.dumps({"loss": losses, "grad_norm": norms}, indent=1) + "\n")
dist.destroy_process_group()
