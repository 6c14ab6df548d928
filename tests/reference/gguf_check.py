"""Checks `lora export gguf` and `gguf-lora` against llama.cpp and the gguf package.

    python gguf_check.py --lora PROGRAM --fixtures DIR --work DIR [--real MODEL_DIR ...]

For every family that has a GGUF form, and f32, f16, bf16, q8_0 and q4_0:
  reads       the gguf package reads the file; every tensor is there and dequantises to within its type's bound of the
              float32 file's
  computes    llama.cpp gives the logits of `lora logits` (float32 and float16 files)
  adapter     llama.cpp with the adapter beside the model gives the logits of `lora logits --adapter`
For every real model: llama.cpp's greedy text is that of `lora generate`.

Needs gguf, llama-cpp-python, safetensors and numpy.
"""
import argparse
import ctypes
import json
import pathlib
import shutil
import subprocess
import sys

import llama_cpp
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
# The largest error of an element, as a share of the largest of its block of 32 (of the element itself for f16 and bf16).
BOUND = {"f32": 0.0, "f16": 2.0 ** -11, "bf16": 2.0 ** -8, "q8_0": 0.5 / 127 + 2.0 ** -10, "q4_0": 1.01 / 8}
# llama.cpp multiplies float32 by float32 in another order, keeps keys and values in float32 here, and turns the GELU into a
# table of float16; in a float16 file activations are rounded to float16 before each product.
REACH = {"f32": 2e-3, "f16": 2e-2}


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(map(str, words))}` exited with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


def tensors(path):
    return {t.name: (t.data if t.tensor_type.name == "F32" else dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}


def check_read(exact, path, kind):
    got = tensors(path)
    assert exact.keys() == got.keys(), f"tensors {sorted(exact.keys() ^ got.keys())}"
    worst = 0.0
    for name, want in exact.items():
        have = got[name].reshape(want.shape).astype(np.float64)
        error = np.abs(have - want)
        size = np.abs(want)
        if kind in ("q8_0", "q4_0") and want.ndim > 1 and want.shape[-1] % 32 == 0:
            size = np.repeat(size.reshape(-1, 32).max(axis=1), 32).reshape(want.shape)
        # float16 has steps of 2^-24 next to zero.
        ratio = (np.maximum(error - 2.0 ** -25, 0.0) / np.maximum(size, 1e-12)).max()
        bound = BOUND["q8_0"] if kind == "q4_0" and name.split(".")[0] in ("token_embd", "output") else BOUND[kind]
        if kind in ("q8_0", "q4_0") and want.ndim > 1 and want.shape[-1] % 32:
            bound = BOUND["f16"]
        assert ratio <= bound + 1e-6, f"{name} is off by {ratio:.3e} of its size, allowed {bound:.3e}"
        worst = max(worst, ratio)
    return f"{len(got)} tensors, off by at most {worst:.1e} of the size"


def open_model(path, adapter=None):
    f32 = 0
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False, type_k=f32, type_v=f32,
                           lora_path=str(adapter) if adapter else None)


def llama_logits(path, rows, adapter=None):
    model = open_model(path, adapter)
    out = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        out.append(np.array(model.scores[: len(ids)], dtype=np.float64))
    model.close()
    return out


def compare(got, want):
    return max(np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, want))


class Family:
    def __init__(self, lora, folder, work):
        self.lora, self.folder, self.work = lora, folder, work / folder.name
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        reference = load_file(folder / "reference.safetensors")
        lens = reference["attention_mask"].sum(axis=1)
        self.rows = [list(map(int, ids[:n])) for ids, n in zip(reference["input_ids"], lens)]

    def ours(self, *more):
        width = max(map(len, self.rows))
        ids = np.zeros((len(self.rows), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(self.rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        save_file({"input_ids": ids, "attention_mask": mask}, self.work / "in.safetensors")
        out = self.work / "out.safetensors"
        run(self.lora, "logits", "--model", self.folder, *more, "--input", self.work / "in.safetensors", "--output", out)
        logits = load_file(out)["logits"].astype(np.float64)
        return [logits[i, : len(row)] for i, row in enumerate(self.rows)]

    def export(self, kind, *more):
        path = self.work / f"{'merged-' if more else ''}{kind}.gguf"
        path.unlink(missing_ok=True)
        run(self.lora, "export", "gguf", "--model", self.folder, *more, "--output", path, "--type", kind)
        return path

    def checks(self):
        exact = tensors(self.export("f32"))
        for kind in TYPES:
            yield f"reads {kind}", lambda k=kind: check_read(exact, self.export(k), k)
        for kind in ("f32", "f16"):
            yield f"computes {kind}", lambda k=kind: self.within(llama_logits(self.export(k), self.rows), self.ours(), k)
        adapter = self.folder / "adapters/lora"
        yield "computes merged", lambda: self.within(
            llama_logits(self.export("f32", "--adapter", adapter), self.rows), self.ours("--adapter", adapter), "f32")
        yield "adapter", lambda: self.beside(adapter)

    def beside(self, adapter):
        path = self.work / "lora.gguf"
        path.unlink(missing_ok=True)
        run(self.lora, "export", "gguf-lora", "--model", self.folder, "--adapter", adapter, "--output", path)
        got, want = llama_logits(self.export("f32"), self.rows, path), self.ours("--adapter", adapter)
        moved = compare(self.ours(), want)
        assert moved > 1e-2, f"the adapter must be visible: {moved}"
        return self.within(got, want, "f32")

    @staticmethod
    def within(got, want, kind):
        d = compare(got, want)
        assert d < REACH[kind], f"logits differ by {d:.2e} of the largest, more than {REACH[kind]:.0e}"
        return f"{d:.1e}"


def real(lora, model, work, kind):
    """llama.cpp's greedy text and ours, over prompts that the tokenizer has to split."""
    path = work / f"{model.name}-{kind}.gguf"
    path.unlink(missing_ok=True)
    run(lora, "export", "gguf", "--model", model, "--output", path, "--type", kind)
    theirs = open_model(path)
    golden = json.loads((model / "golden.json").read_text())["cases"]
    total = 0
    for prompt in [case["prompt"] for case in golden]:
        ours = json.loads(run(lora, "generate", "--model", model, "--raw", "--prompt", prompt, "--max-new-tokens", 40, "--json"))
        theirs.reset()
        ids = theirs.tokenize(prompt.encode(), add_bos=True)
        theirs.eval(ids)
        new = []
        for _ in range(40):
            new.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
            theirs.eval(new[-1:])
        assert ours["token_ids"][:40] == new[: len(ours["token_ids"])], f"{prompt!r}: {ours['token_ids'][:12]} and {new[:12]}"
        total += len(ours["token_ids"])
    theirs.close()
    return f"{total} tokens of {len(golden)} prompts"


def adapted(fixture, work):
    """A copy of a fixture with what llama.cpp has fixed for its family, under a name that llama.cpp reads nothing into."""
    folder = work / "models" / f"small_{fixture.name.replace('phi', 'p')}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fixture, folder)
    config = json.loads((folder / "config.json").read_text())
    if fixture.name.startswith("gemma"):
        config["query_pre_attn_scalar"] = config["head_dim"]
    if fixture.name == "gemma3":
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=pathlib.Path, required=True)
    parser.add_argument("--fixtures", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--real", type=pathlib.Path, action="append", default=[])
    args = parser.parse_args()
    passed = failed = 0

    def report(name, check):
        nonlocal passed, failed
        try:
            print(f"ok    {name} ({check()})", flush=True)
            passed += 1
        except Exception as error:  # one broken family must not hide the others
            print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)
            failed += 1

    lora = args.lora.resolve()
    for name in ("llama", "llama_tied_rope3", "llama_linear", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2"):
        family = Family(lora, adapted(args.fixtures / name, args.work), args.work)
        for what, check in family.checks():
            report(f"{name}: {what}", check)
    for model in args.real:
        for kind in ("f32", "f16"):
            report(f"{model.name}: greedy text, {kind}", lambda k=kind, m=model: real(lora, m, args.work, k))
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
