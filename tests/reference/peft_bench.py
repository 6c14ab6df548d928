"""What PEFT and transformers take for the work that `cargo xtask bench --against-peft` measures; prints one object of JSON.

peft_bench.py step MODEL     steps of one shape on random tokens: tokens/s, share of the machine's rate of matrix products, memory
peft_bench.py ragged MODEL   steps on instructions, batches padded to their longest row: tokens/s that are no padding
peft_bench.py generate MODEL greedy tokens after a prompt, with keys and values kept
peft_bench.py merge MODEL    an adapter merged and the whole model saved

transformers 5.23.0, PEFT 0.21.2, torch 2.11.0."""
import argparse
import json
import random
import resource
import statistics
import time

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file


def base(args):
    kind = getattr(torch, args.dtype)
    if args.random:
        config = transformers.AutoConfig.from_pretrained(args.model)
        with torch.device(args.device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=kind, attn_implementation="sdpa")
    return model.to(args.device)


def adapted(args):
    config = LoraConfig(task_type="CAUSAL_LM", r=args.r, lora_alpha=2 * args.r, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(base(args), config)


def synchronize(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(args, work):
    synchronize(args)
    start = time.perf_counter()
    result = work()
    synchronize(args)
    return time.perf_counter() - start, result


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def trainer(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)

    def step(**batch):
        optimizer.zero_grad(set_to_none=True)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step, sum(p.numel() for p in trained)


def matmul_rate(args):
    """Of a product of square matrices, as `lora bench step` measures it."""
    n, kind = (2048, torch.float32) if args.device == "cpu" else (8192, torch.bfloat16)
    x, y = (torch.randn(n, n, device=args.device, dtype=kind) for _ in range(2))
    times = [clock(args, lambda: x @ y)[0] for _ in range(7)][2:]
    return 2 * n**3 / statistics.median(times)


def operations(config, args, trained):
    """Multiply-adds times two of a step: forward and the gradient of inputs, of weights too where all are trained."""
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    of_block = hidden * heads * head_dim * 2 + 2 * hidden * config.num_key_value_heads * head_dim + 3 * hidden * config.intermediate_size
    weights = layers * of_block + hidden * config.vocab_size
    attention = layers * 2 * heads * head_dim * args.seq / 2
    of_token = 6 * weights + 6 * attention if args.full else 4 * weights + 6 * attention + 6 * trained
    return args.batch * args.seq * of_token


def step(args):
    torch.manual_seed(0)
    model = base(args) if args.full else adapted(args)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    ids = torch.randint(10, model.config.vocab_size, (args.batch, args.seq), generator=torch.Generator().manual_seed(1))
    if args.start:
        save_file({"input_ids": ids}, f"{args.start}/input.safetensors")
        if not args.full:
            model.save_pretrained(f"{args.start}/adapter")
    ids = ids.to(args.device)
    one, trained = trainer(model)
    losses, times, rates = [one(input_ids=ids, labels=ids) for _ in range(2)], [], []
    for _ in range(args.steps):
        seconds, loss = clock(args, lambda: one(input_ids=ids, labels=ids))
        times.append(seconds)
        losses.append(loss)
        rates.append(matmul_rate(args))
    needed = operations(model.config, args, trained)
    shares = [needed / t / r for t, r in zip(times, rates)]
    seconds = statistics.median(times)
    cuda = {"cuda_mb": torch.cuda.max_memory_allocated() >> 20} if args.device.startswith("cuda") else {}
    return {
        "step_s": seconds,
        "tok_s": args.batch * args.seq / seconds,
        "of_matmul_rate": statistics.median(shares),
        "matmul_gflops": statistics.median(rates) / 1e9,
        "rss_mb": peak_mb(),
        "losses": losses,
        "trainable": trained,
        **cuda,
    }


def instructions(args):
    """Token ids and labels of each row of an alpaca file, in a fixed order."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{args.tokenizer}/tokenizer.json")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = []
    with open(args.data, encoding="utf8") as file:
        for row in json.load(file):
            asked = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
            prompt = tokenizer(f"### Instruction:\n{asked}\n\n### Response:\n")["input_ids"]
            answer = tokenizer(row["output"])["input_ids"] + [end]
            rows.append(((prompt + answer)[: args.seq], ([-100] * len(prompt) + answer)[: args.seq]))
    random.Random(0).shuffle(rows)
    return rows, end


def ragged(args):
    torch.manual_seed(0)
    rows, end = instructions(args)
    one, _ = trainer(adapted(args).train())
    real = padded = trained = 0
    seconds = 0.0
    for number in range(args.steps + 1):
        batch = rows[number * args.batch : (number + 1) * args.batch]
        width = max(len(ids) for ids, _ in batch)
        fill = lambda values, with_: torch.tensor([v + [with_] * (width - len(v)) for v in values]).to(args.device)
        ids, labels = fill([ids for ids, _ in batch], end), fill([labels for _, labels in batch], -100)
        mask = fill([[1] * len(ids) for ids, _ in batch], 0)
        time_, _ = clock(args, lambda: one(input_ids=ids, attention_mask=mask, labels=labels))
        if number == 0:
            continue  # the first step warms up
        seconds += time_
        real += int(mask.sum())
        padded += ids.numel()
        trained += int((labels != -100).sum())
    report = {"rss_mb": peak_mb()}
    if real:
        report |= {"tok_s": real / seconds, "padding": 1 - real / padded, "trained_share": trained / real}
    return report


def generate(args):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{args.tokenizer}/tokenizer.json")
    model = base(args).eval()
    ids = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog. " * 8)["input_ids"]]).to(args.device)

    def write():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0)

    write()  # warms up
    seconds, made = clock(args, write)
    return {"tok_s": args.tokens / seconds, "seconds": seconds, "tokens": made.shape[1] - ids.shape[1], "rss_mb": peak_mb()}


def merge(args):
    seconds, _ = clock(args, lambda: PeftModel.from_pretrained(base(args), args.adapter).merge_and_unload().save_pretrained(args.output))
    return {"seconds": seconds, "rss_mb": peak_mb()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["step", "ragged", "generate", "merge"])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--random", action="store_true", help="weights drawn on the device: the folder needs its config.json only")
    parser.add_argument("--start", help="folder for the adapter and the tokens that the steps begin with")
    parser.add_argument("--data")
    parser.add_argument("--tokenizer")
    parser.add_argument("--adapter")
    parser.add_argument("--output")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(json.dumps(globals()[arguments.work](arguments)))
