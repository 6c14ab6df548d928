"""Checks `lora` against PEFT and transformers, both ways, over the golden checkpoints.

    python interop.py --lora PROGRAM --fixtures DIR --work DIR [FAMILY ...]

For every model family:
  theirs in ours   each PEFT adapter of the fixtures: `lora logits` gives PEFT's logits
  merged           `lora merge`: transformers loads the result whole, and it gives PEFT's logits
  repaired         the raw state dict of PEFT's compiled model, `lora repair`: PEFT finds every weight and gives its logits
  ours in theirs   an adapter that `lora train` made in three steps: PEFT finds every weight that it expects and no
                   other, and gives the logits of `lora logits`

Needs torch, transformers, peft, safetensors, scipy and bitsandbytes. `cargo xtask interop` calls it.
"""
import argparse
import inspect
import json
import pathlib
import shutil
import subprocess
import sys

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import layer
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file

# PEFT packs for LoftQ on CUDA only: the name of the device is the one thing that is changed in its text.
exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), vars(loftq_utils))
layer.loftq_init = loftq_utils.loftq_init

# Both sides compute in float32 and sum in different orders; relative to the largest logit.
REACH = 1e-5
# Merging rounds every weight once more.
MERGED_REACH = 2e-5

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# What `lora train` is told for each method.
METHODS = {
    "rslora": "use_rslora = true",
    "dora": "use_dora = true",
    "lora_bias": "lora_bias = true",
    "bias_all": 'bias = "all"',
    "pissa": 'init_lora_weights = "pissa"',
    "pissa_niter_4": 'init_lora_weights = "pissa_niter_4"',
    "olora": 'init_lora_weights = "olora"',
    "loftq": 'init_lora_weights = "loftq"\nloftq_iter = 2',
    "tokens": "trainable_token_indices = [5, 22]",
}
# For families whose experts transformers holds as one tensor.
EXPERTS = 'target_parameters = ["experts.gate_up_proj", "experts.down_proj"]'
EXPERTS_RANKS = EXPERTS + '\nrank_pattern = { "experts.down_proj" = 2 }\nuse_rslora = true'


# Other types of adapters; their ranks have keys of their own.
TYPES = {
    "vera": 'peft_type = "VERA"\nr = 64',
    "vera_key": 'peft_type = "VERA"\nr = 64\nsave_projection = false\nprojection_prng_key = 42',
    "adalora": 'peft_type = "ADALORA"\ninit_r = 6\ntarget_r = 3\ntfinal = 1\nlora_alpha = 64',
    "adalora_unpruned": 'peft_type = "ADALORA"\ninit_r = 6\ntarget_r = 3\ntinit = 5\ntotal_step = 9\nlora_alpha = 64',
}


class Failed(Exception):
    """One check that does not hold."""


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"`{' '.join(str(w) for w in words)}` exited with {done.returncode}: {done.stderr.strip()[-600:]}")


def classifies(folder):
    config = json.loads((folder / "config.json").read_text())
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures", []))


def base(folder, family):
    # gemma2 caps its attention scores, which only the eager implementation does.
    attention = "eager" if family.startswith("gemma2") else "sdpa"
    kind = transformers.AutoModelForSequenceClassification if classifies(folder) else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise Failed(f"{folder}: {kind} {sorted(info[kind])[:4]}")
    return model.eval()


@torch.no_grad()
def their_logits(model, batch):
    return model(**batch).logits.float()


class Family:
    """One checkpoint of the fixtures, its batch, and a folder to work in."""

    def __init__(self, lora, folder, work):
        self.lora, self.folder, self.work = lora, folder, work / folder.name
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        reference = load_file(folder / "reference.safetensors")
        inputs = ("input_ids", "attention_mask", "token_type_ids")
        self.batch = {k: reference[k] for k in inputs if k in reference}
        self.labels = reference["labels"]
        self.input = self.work / "input.safetensors"
        save_file(self.batch, self.input)

    def our_logits(self, adapter):
        out = self.work / "logits.safetensors"
        out.unlink(missing_ok=True)
        run(self.lora, "logits", "--model", self.folder, "--adapter", adapter, "--input", self.input, "--output", out)
        return load_file(out)["logits"].float()

    def compare(self, ours, theirs, reach):
        """The largest difference at positions that are not padding."""
        if ours.shape != theirs.shape:
            raise Failed(f"logits have the shape {tuple(ours.shape)}, and {tuple(theirs.shape)} is expected")
        real = self.batch["attention_mask"].bool() if ours.dim() == 3 else slice(None)
        difference = float((ours - theirs)[real].abs().max() / theirs[real].abs().max())
        if not difference <= reach:
            raise Failed(f"logits differ by {difference:.2e} of the largest, more than {reach:.0e}")
        return f"{difference:.1e}"

    def peft(self, adapter):
        return PeftModel.from_pretrained(base(self.folder, self.folder.name), adapter).eval()

    def theirs(self, adapter):
        """What PEFT reads: of a layout that today's takes for another, the same adapter in its own."""
        return adapter.with_name("experts") if adapter.name == "experts_before_0_19" else adapter

    def theirs_in_ours(self, adapter):
        theirs = their_logits(self.peft(self.theirs(adapter)), self.batch)
        return self.compare(self.our_logits(adapter), theirs, REACH)

    def merged(self, adapter):
        out = self.work / "merged"
        shutil.rmtree(out, ignore_errors=True)
        run(self.lora, "merge", "--model", self.folder, "--adapter", adapter, "--output", out)
        merged = their_logits(base(out, self.folder.name), self.batch)
        return self.compare(merged, their_logits(self.peft(self.theirs(adapter)), self.batch), MERGED_REACH)

    def repaired(self, adapter):
        model = self.peft(adapter)
        raw = {name: t.clone() for name, t in torch.compile(model).state_dict().items()
               if ".lora_" in name or ".modules_to_save." in name}
        if not all(name.startswith("_orig_mod.") and ".default." in name for name in raw):
            raise Failed(f"the raw names are not what they were: {sorted(raw)[:2]}")
        bad, good = self.work / "raw", self.work / "repaired"
        for folder in (bad, good):
            shutil.rmtree(folder, ignore_errors=True)
        bad.mkdir()
        save_file(raw, bad / "adapter_model.safetensors")
        shutil.copy(adapter / "adapter_config.json", bad)
        run(self.lora, "repair", bad, "--model", self.folder, "--output", good)
        again = self.peft(good)
        if load_file(good / "adapter_model.safetensors").keys() != get_peft_model_state_dict(again).keys():
            raise Failed("PEFT expects other keys than the repaired ones")
        return self.compare(their_logits(again, self.batch), their_logits(model, self.batch), 0.0)

    def data(self, f):
        """Writes what is trained on, and returns its format."""
        for ids, labels, mask in zip(self.batch["input_ids"], self.labels, self.batch["attention_mask"].bool()):
            f.write(json.dumps({"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()}) + "\n")
        return "tokenized"

    def train(self, target_modules, more="r = 4\nlora_alpha = 8"):
        data = self.work / "train.jsonl"
        with open(data, "w") as f:
            form = self.data(f)
        config, run_dir = self.work / "run.toml", self.work / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        quoted = json.dumps
        config.write_text(f"""
output_dir = {quoted(str(run_dir))}
seed = 1
[model]
path = {quoted(str(self.folder))}
device = "cpu"
dtype = "float32"
[lora]
target_modules = {quoted(target_modules)}
{more}
[data]
train = [{{ path = {quoted(str(data))}, format = {quoted(form)} }}]
max_length = 64
[train]
max_steps = 3
per_device_train_batch_size = 2
learning_rate = 0.01
""")
        run(self.lora, "train", config)
        return run_dir

    def ours_in_theirs(self, target_modules, more="r = 4\nlora_alpha = 8"):
        adapter = self.train(target_modules, more)
        written = load_file(adapter / "adapter_model.safetensors")
        model = self.peft(adapter)
        held = get_peft_model_state_dict(model)
        # Tokens alone: PEFT holds the rows of a tied head a second time.
        copies = {n for n in held if n.endswith("lm_head.trainable_tokens_delta") and target_modules == []}
        if written.keys() != held.keys() - copies:
            raise Failed(f"keys that one side lacks: {sorted(written.keys() ^ held.keys())[:4]}")
        for name, tensor in written.items():
            if not torch.equal(tensor, held[name]):
                raise Failed(f"PEFT holds another {name} than was written")
            if ("lora_B" in name or "vera_lambda_b" in name) and tensor.numel() and not tensor.any():
                raise Failed(f"{name} is zero after training")
        for name, original in model.named_buffers():
            if "trainable_tokens_original" in name and any(torch.equal(original, t) for t in held.values()):
                raise Failed(f"the rows of {name} are the base's after training")
        return self.compare(self.our_logits(adapter), their_logits(model, self.batch), REACH)


class Classifier(Family):
    """A checkpoint that tells texts apart: a row of logits for each text."""

    def data(self, f):
        model = json.loads((self.folder / "config.json").read_text())
        names = list(model["id2label"].values())
        labels = [0.5, -1.0, 2.0] if len(names) == 1 else names
        if model.get("problem_type") == "multi_label_classification":
            labels = [names[:2], [], names[1:]]
        texts = [t for t in json.loads((self.folder / "encoded.json").read_text()) if t["max_length"] is None]
        for i, text in enumerate(texts[:2] + texts[3:5]):
            pair = {"text_pair": text["text_pair"]} if text["text_pair"] else {}
            f.write(json.dumps({"text": text["text"], **pair, "label": labels[i % 3]}) + "\n")
        return "classification"

    def train(self, target_modules, more=""):
        return super().train(target_modules, f'task_type = "SEQ_CLS"\n{more}')


def checks(family):
    """(name, function) of everything to check in a family."""
    # A bias of an adapter has no place in a projection without one: PEFT cannot merge that either.
    families = ("qwen2", "gpt2", "gpt_neox", "bert", "roberta")
    biased = json.loads((family.folder / "config.json").read_text())["model_type"] in families
    for adapter in sorted((family.folder / "adapters").iterdir()):
        config = json.loads((adapter / "adapter_config.json").read_text())
        yield f"theirs in ours: {adapter.name}", lambda a=adapter: family.theirs_in_ours(a)
        if biased or not config.get("lora_bias"):
            yield f"merged: {adapter.name}", lambda a=adapter: family.merged(a)
    yield "repaired", lambda: family.repaired(family.folder / "adapters/lora")
    targets = json.loads((family.folder / "adapters/lora/adapter_config.json").read_text())["target_modules"]
    yield "ours in theirs", lambda: family.ours_in_theirs(sorted(targets))
    yield "ours in theirs: all-linear", lambda: family.ours_in_theirs("all-linear")
    for name, more in METHODS.items():
        if name == "tokens" and isinstance(family, Classifier):
            # A row of a table is trained by texts that have the token; a language model's head trains every one.
            text = json.loads((family.folder / "encoded.json").read_text())[0]
            more = f"trainable_token_indices = {text['input_ids'][1:3]}"
        # Beside a module of modules_to_save, PEFT writes the head's bias three times and expects it so.
        head = name == "bias_all" and isinstance(family, Classifier)
        # PEFT packs a Conv1D with its sides exchanged, and an adapter of other sides does not fit it.
        conv = name == "loftq" and json.loads((family.folder / "config.json").read_text())["model_type"] == "gpt2"
        if (name != "lora_bias" or biased) and not head and not conv:
            more = f"r = 4\nlora_alpha = 8\n{more}"
            yield f"ours in theirs: {name}", lambda more=more: family.ours_in_theirs(sorted(targets), more)
    for name, more in TYPES.items():
        yield f"ours in theirs: {name}", lambda more=more: family.ours_in_theirs(sorted(targets), more)
    # PEFT refuses a classifier's adapter of nothing but tokens: its head is saved, and nothing is targeted.
    if not isinstance(family, Classifier):
        yield "ours in theirs: tokens_alone", lambda: family.ours_in_theirs([], METHODS["tokens"])
    if (family.folder / "adapters/experts").exists():
        yield "ours in theirs: experts", lambda: family.ours_in_theirs(sorted(targets), EXPERTS_RANKS)
        yield "ours in theirs: experts_alone", lambda: family.ours_in_theirs([], EXPERTS)


def write_table(path, rows):
    import peft

    def cell(family, name):
        return next((difference for f, n, difference in rows if (f, n) == (family, name)), "")

    kinds = ("theirs in ours", "merged")
    text = f"""# Against PEFT

Written by `cargo xtask interop --table docs/reference/interop.md`: PEFT {peft.__version__}, transformers {transformers.__version__},
torch {torch.__version__.split("+")[0]}, float32 on a CPU. Each number is the largest difference of a logit, relative to the largest logit, on
the fixtures' checkpoints. *Theirs in ours*: PEFT's adapter in `lora logits`. *Merged*: `lora merge`, loaded by transformers. *Ours in
theirs*: an adapter that `lora train` made, loaded by PEFT, every tensor accounted for.

| family | adapter | theirs in ours | merged | ours in theirs |
|---|---|---:|---:|---:|
"""
    for family in dict.fromkeys(f for f, _, _ in rows):
        names = dict.fromkeys(n.split(": ")[-1] if ": " in n else "lora" for f, n, _ in rows if f == family)
        for i, adapter in enumerate(names):
            own = cell(family, "ours in theirs" if adapter == "lora" else f"ours in theirs: {adapter}")
            cells = [cell(family, f"{kind}: {adapter}") for kind in kinds] + [own]
            text += f"| {family if i == 0 else ''} | {adapter} | {' | '.join(cells)} |\n"
    path.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=pathlib.Path, required=True)
    parser.add_argument("--fixtures", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--table", type=pathlib.Path, help="Markdown page to write")
    parser.add_argument("family", nargs="*")
    args = parser.parse_args()
    found = [*args.fixtures.glob("*/config.json"), *args.fixtures.glob("classification/*/config.json")]
    folders = sorted(p.parent for p in found)
    name_of = lambda folder: str(folder.relative_to(args.fixtures))
    if unknown := set(args.family) - {name_of(f) for f in folders}:
        sys.exit(f"no such family in {args.fixtures}: {', '.join(sorted(unknown))}")
    passed = failed = 0
    rows = []
    for folder in folders:
        shown = name_of(folder)
        if args.family and shown not in args.family:
            continue
        family = (Classifier if classifies(folder) else Family)(args.lora.resolve(), folder, args.work / shown)
        for name, check in checks(family):
            try:
                difference = check()
                print(f"ok    {shown}: {name} ({difference})", flush=True)
                rows.append((shown, name, difference))
                passed += 1
            except Exception as error:  # one broken family must not hide the others
                print(f"FAIL  {shown}: {name}: {type(error).__name__}: {error}", flush=True)
                rows.append((shown, name, "FAILED"))
                failed += 1
    if args.table:
        write_table(args.table, rows)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
