"""From a JSON Lines file to packed rows with `datasets.map` and a fast tokenizer, timed; called by `cargo xtask bench
--against-datasets`.

Records with `prompt` and `completion` are tokenised apart and joined; records with `messages` go through the chat template,
whose generation blocks mark what is trained. Both in batches and on several processes, as is the step that packs: tokens end to
end, cut into rows. That is the fastest usual way; it cuts examples in two, which ours does not.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
from transformers import AutoTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)


def tokenise_pairs(batch, tokenizer, limit):
    prompts = tokenizer(batch["prompt"])["input_ids"]
    completions = tokenizer(batch["completion"], add_special_tokens=False)["input_ids"]
    ids, labels = [], []
    for prompt, completion in zip(prompts, completions):
        completion = completion + [tokenizer.eos_token_id]
        ids.append((prompt + completion)[:limit])
        labels.append(([-100] * len(prompt) + completion)[:limit])
    return {"input_ids": ids, "labels": labels}


def tokenise_talks(batch, tokenizer, limit):
    out = tokenizer.apply_chat_template(
        batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [row[:limit] for row in out["input_ids"]]
    masks = out["assistant_masks"]
    labels = [[i if m else -100 for i, m in zip(row, mask)] for row, mask in zip(ids, masks)]
    return {"input_ids": ids, "labels": labels}


def pack(batch, limit):
    joined = {key: sum_lists(rows) for key, rows in batch.items()}
    length = len(joined["input_ids"])
    return {key: [ids[i : i + limit] for i in range(0, length, limit)] for key, ids in joined.items()}


def sum_lists(rows):
    out = []
    for row in rows:
        out.extend(row)
    return out


def run(args, tokenizer):
    start = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(args.data), split="train", cache_dir=str(args.cache))
    columns = data.column_names
    tokenise = tokenise_talks if "messages" in columns else tokenise_pairs
    rows = data.map(
        tokenise,
        batched=True,
        num_proc=args.num_proc,
        remove_columns=columns,
        fn_kwargs={"tokenizer": tokenizer, "limit": args.max_length},
    )
    packed = rows.map(pack, batched=True, num_proc=args.num_proc, fn_kwargs={"limit": args.max_length})
    first = packed[: args.batch]["input_ids"]
    seconds = time.perf_counter() - start
    assert first and first[0]
    return seconds, rows, packed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="an empty folder")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--num-proc", type=int, default=2)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None or "{% generation" not in tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    tokenizer.eos_token = tokenizer.eos_token or "<|endoftext|>"
    fresh, rows, _ = run(args, tokenizer)
    cached, _, packed = run(args, tokenizer)
    lengths = [len(ids) for ids in rows.with_format("arrow")["input_ids"]]
    print(
        json.dumps(
            {
                "rows": len(lengths),
                "tokens": sum(lengths),
                "packed_rows": len(packed),
                "fresh_s": round(fresh, 3),
                "cached_s": round(cached, 3),
                "versions": {"datasets": datasets.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
