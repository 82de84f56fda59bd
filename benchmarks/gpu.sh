#!/usr/bin/env bash
# Measures everything that needs a GPU, in under 8 minutes: the gpu-marked tests, losses and attention, training against
# the article, without offload and with LoRA, sampling. Results go to benchmarks/results/gpu.jsonl. Without a GPU it is a
# dry run: the same commands on a small model, and the results are deleted.
#
#   benchmarks/gpu.sh
#   PYTHON=python3 benchmarks/gpu.sh    # another Python than .venv's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  large=2.7B middle=1.3B output=benchmarks/results/gpu.jsonl
  operator_texts=128 steps=3 step_texts=(64 256) whole_step_texts=128 new_tokens=64
  plan_runs="124M-offload 124M-zero2 124M-zero3-offload 124M-zero2-lora"
  memory=$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)')
else
  echo "No GPU: a dry run."
  large=demo middle=demo output=$(mktemp) memory=80
  trap 'rm -f "$output"' EXIT
  operator_texts=4 steps=1 step_texts=(2 4) whole_step_texts=2 new_tokens=4 plan_runs=38M-cpu
fi

part() {
  local began=$SECONDS
  printf '\n== %s\n' "$*"
  timeout --kill-after=10 400 "$@" || echo "FAILED: $*"  # go on with the other figures
  echo "== $((SECONDS - began)) s"
}

part "$python" -m pytest -q -m gpu
part "$python" benchmarks/operators.py --num_texts $operator_texts --output "$output"
# As on a 24 GB card, against the article's batch of 15 on the whole GPU; then large steps as on a 12 GB card.
part "$python" benchmarks/train.py --architecture $large --turns 1 --steps $steps --device_memory_gib 24 \
  --article_texts_per_step 15 --texts_per_step "${step_texts[0]}" --output "$output"
part "$python" benchmarks/train.py --architecture $large --turns 1 --steps $steps --device_memory_gib 12 --sides ours \
  --texts_per_step "${step_texts[1]}" --activation_checkpointing --output "$output"
# Forecast and measured peak, of device and host.
part "$python" benchmarks/plan.py --only $plan_runs --output "$output"
# The whole GPU, no offload.
if ((memory > 70)); then
  part "$python" benchmarks/train.py --architecture $middle --turns 1 --steps $steps --sides ours \
    --texts_per_step $whole_step_texts --deepspeed ds_configs/no_offload.json --output "$output"
  part "$python" benchmarks/train.py --architecture $large --turns 1 --steps $steps --sides ours \
    --texts_per_step $whole_step_texts --deepspeed ds_configs/no_offload.json --output "$output"
fi
# LoRA as on a 24 GB card without offload, against all weights with the optimizer offloaded (above).
part "$python" benchmarks/train.py --architecture $large --turns 1 --steps $steps --device_memory_gib 24 --sides lora \
  --texts_per_step "${step_texts[0]}" --deepspeed ds_configs/no_offload.json --output "$output"
part "$python" benchmarks/generate.py --architecture $large --turns 1 --max_new_tokens $new_tokens --output "$output"
echo "In all $SECONDS s."
