#!/usr/bin/env bash
# Runs the carried programs against this machine's Python torch and GPU: the tests of the operations, the example from the first
# step to the last, steps of 1B and 8B beside PEFT's, and the settings that save memory. Figures are left in results.jsonl.
#   bash gpu_check.sh [PART...]     of: tests demo speed memory; all of them when none is given
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
parts=${*:-tests demo speed memory}
results=$here/results.jsonl
failed=()

lib=$(python3 - <<'PY'
import importlib.metadata, importlib.util, os
version = importlib.metadata.version("torch")
assert version.split("+")[0] == "2.11.0", f"torch is {version}, and 2.11.0 is needed"
print(os.path.join(list(importlib.util.find_spec("torch").submodule_search_locations)[0], "lib"))
PY
) || exit 1
# NVRTC lies in a package of its own beside torch.
nvidia=$(echo "$(dirname "$(dirname "$lib")")"/nvidia/*/lib | tr ' ' ':')
export LD_LIBRARY_PATH="$lib:$nvidia${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LORA_REQUIRE_CUDA=1

# Runs a command, and goes on where it fails.
try() {
    echo "== $*"
    "$@" || failed+=("$*")
}

# Runs a command that prints a report as JSON, and keeps it with a name.
measure() {
    local name=$1 report
    shift
    echo "== $name: $*"
    if report=$("$@" | python3 -c 'import json, sys; text = sys.stdin.read(); print(json.dumps(json.loads(text[text.index("{"):])))'); then
        echo "$report"
        echo "{\"name\": \"$name\", \"report\": $report}" >> "$results"
    else
        failed+=("$name")
    fi
}

# Our step on a shape of this folder, weights drawn on the device.
ours() {
    local name=$1 shape=$2
    shift 2
    measure "$shape $name" "$here/lora" bench step --random --model "$here/shapes/$shape" --device cuda --dtype bfloat16 --batch 1 \
        --seq 2048 --r 16 --json "$@"
}

theirs() {
    local name=$1 shape=$2
    shift 2
    measure "$shape $name" python3 "$here/peft_bench.py" step "$here/shapes/$shape" --random --device cuda --dtype bfloat16 --batch 1 \
        --seq 2048 --r 16 "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
try "$here/lora" doctor
for part in $parts; do
    case $part in
    tests)
        for test in "$here"/tests/*; do try "$test"; done
        ;;
    demo)
        for kernels in libtorch compiled; do
            rm -rf "$here/run"
            try "$here/lora" demo --assets "$here/demo" --output "$here/run" --set model.device=cuda --set "model.kernels=$kernels"
        done
        ;;
    speed)
        python3 -c 'import peft, transformers' || failed+=("no PEFT here: our steps stand alone")
        for shape in 1b 8b; do
            for checkpointing in none full; do
                ours "ours $checkpointing" $shape --checkpointing $checkpointing
                ours "ours $checkpointing, compiled kernels" $shape --checkpointing $checkpointing --kernels compiled
                theirs "PEFT $checkpointing" $shape $([ $checkpointing = full ] && echo --checkpointing)
            done
        done
        ;;
    memory)
        ours "selective" 8b --checkpointing selective --kernels compiled
        ours "offload" 8b --checkpointing offload --kernels compiled
        ours "offload, base on the host" 8b --checkpointing offload --weights host --kernels compiled
        for kernels in libtorch compiled; do
            ours "full, nf4-double, $kernels" 8b --checkpointing full --quantization nf4-double --kernels $kernels
        done
        ;;
    *)
        failed+=("no part is called $part")
        ;;
    esac
done

echo "figures: $results"
for what in "${failed[@]}"; do echo "FAILED: $what"; done
[ ${#failed[@]} = 0 ]
