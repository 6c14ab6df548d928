"""Checks `lora export gguf` and `gguf-lora` against llama.cpp and the gguf package.

    python gguf_check.py --lora PROGRAM --fixtures DIR --work DIR [--real MODEL_DIR ...] [FAMILY ...]

For every family that has a GGUF form, and every type of file:
  reads       the gguf package reads the file; every tensor is there and dequantises to within its type's bound of the
              float32 file's
  computes    llama.cpp gives the logits of `lora logits` (float32 and float16 files)
  adapter     llama.cpp with the adapter beside the model gives the logits of `lora logits --adapter`
For a model of rows that the K types can hold:
  reads       as above
  quality     quantised weights are no further from the float32 ones than those of llama.cpp's own quantiser
  computes    llama.cpp's logits are near those that it gives for the unpacked weights in float32
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

TYPES = ["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
FAMILIES = ["llama", "llama_tied_rope3", "llama_linear", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2", "mistral", "mixtral",
            "qwen3_moe", "granite", "olmo2", "gpt_neox"]
# The largest error of an element as a share of the largest of its block, and the elements of a block. Those of the K types
# follow from `crates/lora-export/src/gguf/k_quants/tests.rs`, for the worst element instead of the mean: a search may clamp one.
BOUND = {
    "F32": (0.0, 1), "F16": (2.0 ** -11, 1), "BF16": (2.0 ** -8, 1), "Q8_0": (0.5 / 127 + 2.0 ** -10, 32),
    "Q4_0": (1.01 / 8, 32), "Q5_0": (1.01 / 16, 32), "Q5_1": (2.0 / 31, 32),
    "Q4_K": (2 * 2.0 / 15, 256), "Q5_K": (2 * 2.0 / 31, 256), "Q6_K": (2 / 32, 256),
}
# llama.cpp multiplies float32 by float32 in another order, keeps keys and values in float32 here, and turns the GELU into a
# table of float16 (of the tanh form, where GPT-NeoX has the exact one); in a float16 file activations are rounded to float16
# before each product.
REACH = {"f32": 2e-3, "f16": 2e-2}


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(map(str, words))}` exited with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


def tensors(path):
    """Every tensor as float32, and its type."""
    plain = lambda t: t.data if t.tensor_type.name == "F32" else dequantize(t.data, t.tensor_type)
    return {t.name: (plain(t), t.tensor_type.name) for t in GGUFReader(path).tensors}


def check_read(exact, path):
    got = tensors(path)
    assert exact.keys() == got.keys(), f"tensors {sorted(exact.keys() ^ got.keys())}"
    worst, kinds = 0.0, set()
    for name, (want, _) in exact.items():
        have, kind = got[name]
        kinds.add(kind.lower())
        bound, block = BOUND[kind]
        error = np.abs(have.reshape(want.shape).astype(np.float64) - want)
        size = np.repeat(np.abs(want).reshape(-1, block).max(axis=1), block).reshape(want.shape)
        # float16 has steps of 2^-24 next to zero.
        ratio = (np.maximum(error - 2.0 ** -25, 0.0) / np.maximum(size, 1e-12)).max()
        assert ratio <= bound + 1e-6, f"{name} is off by {ratio:.3e} of its size, allowed {bound:.3e} for {kind}"
        worst = max(worst, ratio)
    return f"{len(got)} tensors in {', '.join(sorted(kinds))}, off by at most {worst:.1e} of the size"


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
        config = json.loads((folder / "config.json").read_text())
        # llama.cpp has no window for Mistral: the file's context ends with it.
        if config.get("sliding_window") and config["model_type"] == "mistral":
            self.rows = [row[: config["sliding_window"]] for row in self.rows]
        self.experts = "num_local_experts" in config

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
            yield f"reads {kind}", lambda k=kind: check_read(exact, self.export(k))
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

    def within(self, got, want, kind):
        if self.experts and kind == "f16":
            # Rounding may let a router take another expert, and what follows sees it: most positions must agree.
            largest = max(np.abs(w).max() for w in want)
            each = np.concatenate([np.abs(g - w).max(axis=1) for g, w in zip(got, want)]) / largest
            near = each < REACH[kind]
            assert near.mean() > 0.75, f"logits of {(~near).sum()} of {near.size} positions differ"
            return f"{each[near].max():.1e}; {(~near).sum()} of {near.size} positions took another expert"
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


def wide(fixture, work):
    """A Llama of random weights whose rows are 256 and 512 long, with the tokenizer of a fixture."""
    folder = work / "models/wide"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fixture, folder, ignore=shutil.ignore_patterns("adapters", "mix", "*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers = 256, 512, 8
    config.update(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=64, tie_word_embeddings=False)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    # Long tails and columns of different sizes, as trained weights have them.
    matrix = lambda r, c: (rng.standard_t(5, (r, c)) * rng.lognormal(0, 0.3, c) * 0.04).astype(np.float32)
    norm = lambda: (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)
    vocab = config["vocab_size"]
    weights = {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden),
               "model.norm.weight": norm()}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes = {"self_attn.q_proj": (256, hidden), "self_attn.k_proj": (128, hidden), "self_attn.v_proj": (128, hidden),
                  "self_attn.o_proj": (hidden, 256), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                  "mlp.down_proj": (hidden, inner)}
        # What is added to the residual is small beside it, so that an error stays one of its size through the layers.
        small = lambda name: np.float32(0.3 if name.endswith(("o_proj", "down_proj")) else 1.0)
        weights |= {f"{at}{name}.weight": matrix(*shape) * small(name) for name, shape in shapes.items()}
        weights |= {f"{at}{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(weights, folder / "model.safetensors")
    shutil.copy(fixture / "reference.safetensors", folder / "reference.safetensors")
    return folder


# Ours may be this much further from the weights than llama.cpp's, as a share of its distance.
WORSE = 0.01
# llama.cpp rounds activations to 8 bits before it multiplies them with a K type: against the same weights in float32.
COARSE = 0.1


def check_quality(exact_path, path):
    """The root of the mean squared error of each type, ours over that of `ggml_quantize_chunk`."""
    base = ctypes.CDLL(str(next((pathlib.Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + 3 * [ctypes.c_int64] + [ctypes.c_void_p]
    exact, sums = tensors(exact_path), {}
    for tensor in GGUFReader(path).tensors:
        kind = tensor.tensor_type
        if kind.name in ("F32", "F16", "BF16"):
            continue
        want = np.ascontiguousarray(exact[tensor.name][0], dtype=np.float32)
        columns = want.shape[-1]
        theirs = np.zeros_like(tensor.data)
        bytes_ = base.ggml_quantize_chunk(int(kind), want.ctypes.data, theirs.ctypes.data, 0, want.size // columns, columns, None)
        assert bytes_ == tensor.data.nbytes, f"{tensor.name}: {bytes_} bytes of llama.cpp, {tensor.data.nbytes} of ours"
        square = lambda data: float(((dequantize(data, kind).reshape(want.shape) - want).astype(np.float64) ** 2).sum())
        a, b = sums.get(kind.name, (0.0, 0.0))
        sums[kind.name] = (a + square(tensor.data), b + square(theirs))
    ratios = {name: (a / b) ** 0.5 for name, (a, b) in sums.items()}
    shown = ", ".join(f"{name.lower()} {ratio:.4f}" for name, ratio in sorted(ratios.items()))
    assert ratios and all(ratio <= 1 + WORSE for ratio in ratios.values()), f"over llama.cpp's: {shown}"
    return f"over llama.cpp's: {shown}"


def wide_checks(family):
    exact = family.export("f32")

    def near(kind):
        path = family.export(kind)
        # The float32 file with the weights that the package unpacks from the other.
        unpacked = family.work / "unpacked.gguf"
        shutil.copy(exact, unpacked)
        values = tensors(path)
        for tensor in GGUFReader(unpacked, "r+").tensors:
            tensor.data[:] = values[tensor.name][0].reshape(tensor.data.shape)
        d = compare(llama_logits(path, family.rows), llama_logits(unpacked, family.rows))
        assert d < COARSE, f"logits differ by {d:.2e} of the largest"
        return f"{d:.1e}"

    for kind in ("q6_k", "q5_k_m", "q4_k_m", "q8_0", "q4_0"):
        yield f"reads {kind}", lambda k=kind: check_read(tensors(exact), family.export(k))
        yield f"quality {kind}", lambda k=kind: check_quality(exact, family.export(k))
    for kind in ("q6_k", "q5_k_m", "q4_k_m"):
        yield f"computes {kind}", lambda k=kind: near(k)


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
    if fixture.name == "qwen3_moe":
        # llama.cpp wants experts in every layer; the first gets those of the second, in another order.
        config["decoder_sparse_step"] = 1
        weights = load_file(folder / "model.safetensors")
        mlp = {n: t for n, t in weights.items() if n.startswith("model.layers.1.mlp.")}
        weights = {n: t for n, t in weights.items() if not n.startswith("model.layers.0.mlp.")}
        count = config["num_local_experts"]
        for name, tensor in mlp.items():
            parts = name.replace("layers.1", "layers.0").split(".")
            if "experts" in parts:
                parts[5] = str((int(parts[5]) + 1) % count)
            weights[".".join(parts)] = tensor.copy()
        save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=pathlib.Path, required=True)
    parser.add_argument("--fixtures", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--real", type=pathlib.Path, action="append", default=[])
    parser.add_argument("family", nargs="*", help="fixtures to check, and `wide`; all when absent")
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
    for name in FAMILIES:
        if args.family and name not in args.family:
            continue
        small = Family(lora, adapted(args.fixtures / name, args.work), args.work)
        for what, check in small.checks():
            report(f"{name}: {what}", check)
    if not args.family or "wide" in args.family:
        family = Family(lora, wide(args.fixtures / "llama", args.work), args.work)
        for what, check in wide_checks(family):
            report(f"wide rows: {what}", check)
    for model in args.real:
        for kind in ("f32", "f16"):
            report(f"{model.name}: greedy text, {kind}", lambda k=kind, m=model: real(lora, m, args.work, k))
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
