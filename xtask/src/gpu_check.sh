#!/usr/bin/env bash
# Runs the carried programs against this machine's Python torch and GPU.
#   bash gpu_check.sh MODEL_DIR     a checkpoint folder to time training steps with
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:?usage: gpu_check.sh MODEL_DIR}

lib=$(python3 - <<'PY'
import importlib.metadata, importlib.util, os
version = importlib.metadata.version("torch")
assert version.split("+")[0] == "2.11.0", f"torch is {version}, and 2.11.0 is needed"
print(os.path.join(list(importlib.util.find_spec("torch").submodule_search_locations)[0], "lib"))
PY
)
export LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LORA_REQUIRE_CUDA=1

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$here/lora" doctor
for test in "$here"/tests/*; do
    echo "== ${test##*/}"
    "$test"
done
for checkpointing in "" --checkpointing; do
    "$here/lora" bench step --model "$model" --batch 4 --seq 512 --r 16 $checkpointing --json
done
