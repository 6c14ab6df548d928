"""Checks the event files of `lora train` against TensorBoard itself.

    python tensorboard_check.py --lora PROGRAM --fixtures DIR --work DIR

A run of ten steps, gone on with from its fifth as after a kill:
  accumulator  TensorBoard's reader has every number of metrics.jsonl, as a 32-bit number, and each step once
  server       the server that `tensorboard` starts gives the same over HTTP
  text         the configuration is there as text

Needs tensorboard.
"""
import argparse
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIG = """output_dir = "{run}"
[model]
path = "{model}"
device = "cpu"
[data]
train = "{data}"
eval_split = 8
max_length = 64
[lora]
r = 4
[train]
max_steps = 10
per_device_train_batch_size = 4
eval_steps = 2
save_steps = 5
sample_count = 0
"""


def single(number):
    return struct.unpack("f", struct.pack("f", number))[0]


def make_run(lora, fixtures, work):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run, data, config = work / "run", work / "train.jsonl", work / "run.toml"
    rows = [{"prompt": f"say {i}: ", "completion": chr(97 + i % 26) * 3} for i in range(48)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(CONFIG.format(run=run, model=fixtures / "llama", data=data))
    subprocess.run([lora, "train", str(config), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    # What a kill after the ninth step leaves: the checkpoint of the fifth, and steps behind it that do not count.
    shutil.rmtree(run / "checkpoints/step-10")
    subprocess.run([lora, "train", "--resume", "--output", str(run), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return run


def wanted(run):
    curves = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        step = line.pop("step")
        for name, value in line.items():
            tag = "eval/" + name[5:] if name.startswith("eval_") else "train/" + name
            curves.setdefault(tag, []).append((step, single(value)))
    return curves


def served(run, tags):
    """The curves as the server gives them."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", "0", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if found := re.search(r"http://[\w.]+:\d+", line):
                break
        else:
            raise SystemExit("tensorboard did not start")
        curves = {}
        for tag in tags:
            query = urllib.parse.urlencode({"run": ".", "tag": tag})
            for _ in range(100):
                try:
                    with urllib.request.urlopen(f"{found[0]}/data/plugin/scalars/scalars?{query}") as reply:
                        curves[tag] = [(step, single(value)) for _, step, value in json.load(reply)]
                        break
                except urllib.error.HTTPError:  # not read yet
                    time.sleep(0.1)
        return curves
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser()
    for name in ["lora", "fixtures", "work"]:
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    args = parser.parse_args()
    run = make_run(args.lora, args.fixtures, args.work)
    curves = wanted(run)
    steps = [step for step, _ in curves["train/loss"]]
    assert steps == list(range(1, 11)), steps
    assert len(list(run.glob("events.out.tfevents.*"))) == 2

    reader = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    found = {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert found == curves, (found, curves)
    print(f"accumulator  {len(found)} curves, {sum(map(len, found.values()))} values")

    text = reader.Tensors("configuration")[0].tensor_proto.string_val[0].decode()
    assert "max_steps = 10" in text, text
    print("text         the configuration")

    found = served(run, curves)
    assert found == curves, (found, curves)
    print(f"server       {len(found)} curves")


main()
