#!/usr/bin/env bash
# Measures everything that needs a GPU, within 25 minutes, the most valuable figures first: 2.7B as on a 24 GB card
# (the article, offload, one_card, LoRA), the gpu-marked tests, sampling, the plan's table, then the whole GPU. Each part appends
# its figures to benchmarks/results/gpu.jsonl when it ends. Without a GPU it is a dry run: the same commands on a small
# model, and the results are deleted.
#
#   benchmarks/gpu.sh
#   PYTHON=python3 benchmarks/gpu.sh    # another Python than .venv's
#   OUTPUT=figures.jsonl MINUTES=10 benchmarks/gpu.sh
#   VLLM_PYTHON=/path/to/vllm/bin/python benchmarks/gpu.sh   # sampling against vLLM too (docs/export.md)
#   LARGE=1.3B MIDDLE=125M benchmarks/gpu.sh           # smaller models
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  large=${LARGE:-2.7B} middle=${MIDDLE:-1.3B} output=${OUTPUT:-benchmarks/results/gpu.jsonl}
  operator_texts=128 steps=3 step_texts=(64 256) whole_step_texts=128 new_tokens=64 sampled_texts=(20 128)
  plan_runs="124M-offload 124M-zero2 124M-zero3-offload 124M-zero2-lora"
  memory=$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)')
else
  echo "No GPU: a dry run."
  large=demo middle=demo output=$(mktemp) memory=80
  trap 'rm -f "$output"' EXIT
  operator_texts=4 steps=1 step_texts=(2 4) whole_step_texts=2 new_tokens=4 sampled_texts=(2 4)
  plan_runs=38M-cpu
fi

deadline=$((${MINUTES:-25} * 60))

part() {  # runs a command within the time that is left; goes on with the next one if it fails
  local began=$SECONDS left=$((deadline - SECONDS))
  printf '\n== %s\n' "$*"
  if ((left < 10)); then
    echo "SKIPPED: no time left"
    return
  fi
  timeout --kill-after=10 $((left < 400 ? left : 400)) "$@" || { echo "FAILED: $*" && has_failed=yes; }
  echo "== $((SECONDS - began)) s"
}

train() { part "$python" benchmarks/train.py --turns 1 --steps $steps --output "$output" "$@"; }

sample() {
  part "$python" benchmarks/generate.py --architecture $large --batch_sizes "${sampled_texts[@]}" --turns 1 \
    --max_new_tokens $new_tokens --output "$output" "$@"
}

# As on a 24 GB card, against the article's batch of 15 on the whole GPU; and with LoRA without offload.
train --architecture $large --device_memory_gib 24 --article_texts_per_step 15 --texts_per_step "${step_texts[0]}" \
  --sides article offload one_card --recomputed_layers 8
train --architecture $large --device_memory_gib 24 --sides lora --texts_per_step "${step_texts[0]}" \
  --deepspeed ds_configs/no_offload.json
part "$python" -m pytest -q -m gpu
has_failed=
sample --sides transformers ours generate_batch ${VLLM_PYTHON:+vllm}
if [[ $has_failed ]]; then
  sample  # without the sides that have not been run on a GPU yet
fi
# Forecast and measured peak, of device and host.
part "$python" benchmarks/plan.py --only $plan_runs --output "$output"
# The whole GPU, no offload.
if ((memory > 70)); then
  train --architecture $large --sides ours --texts_per_step $whole_step_texts --deepspeed ds_configs/no_offload.json
  train --architecture $middle --sides ours --texts_per_step $whole_step_texts --deepspeed ds_configs/no_offload.json
fi
# Large steps as on a 12 GB card.
train --architecture $large --device_memory_gib 12 --sides ours --texts_per_step "${step_texts[1]}" \
  --activation_checkpointing
part "$python" benchmarks/operators.py --num_texts $operator_texts --output "$output"
echo "In all $SECONDS s."
