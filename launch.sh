#!/usr/bin/env bash
# The whole road: environment, training, samples.
#
#   ./launch.sh                                   picks a recipe for this machine, trains, samples
#   ./launch.sh --config recipes/demo.yaml ...    arguments go to train.py
#   ./launch.sh --setup-only                      makes .venv and stops
#
#   NGPU=2 ./launch.sh ...                        processes on this machine (default: one for each GPU)
#   HOSTFILE=hosts ./launch.sh ...                several machines, by deepspeed's hostfile and ssh
#   DRY_RUN=1 ./launch.sh ...                     prints the commands, runs nothing
#   PYTHON=python3.12 ./launch.sh                 which Python .venv is made with
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit
fi
[[ -n "${SLURM_SUBMIT_DIR:-}" ]] || cd "$(dirname "${BASH_SOURCE[0]}")"  # sbatch runs a copy from its spool

# ---- 1. environment: made once, and again when requirements.txt changes -----------------------------------

run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

setup() {
  local stamp=.venv/requirements.installed
  cmp --silent requirements.txt "$stamp" && return
  echo "Setting up .venv (a few minutes, once)"
  if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed; name one, for example: PYTHON=python3.12 ./launch.sh" >&2
    exit 2
  fi
  [[ -x .venv/bin/python ]] || run "${PYTHON:-python3}" -m venv .venv
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  run cp requirements.txt "$stamp"
}

setup
if [[ "${1:-}" == --setup-only ]]; then exit; fi
export PATH="$PWD/.venv/bin:$PATH"  # deepspeed starts its workers, and ninja, from here

# ---- 2. which recipe: the memory of the smallest GPU decides ----------------------------------------------

gpu_memory_mib=()
if command -v nvidia-smi >/dev/null; then
  mapfile -t gpu_memory_mib < <(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | sort -n)
fi
num_gpus=${#gpu_memory_mib[@]}

train_args=("$@")
if ((${#train_args[@]} == 0)); then
  if ((num_gpus == 0)); then
    recipe=recipes/demo.yaml
    echo "No GPU found: taking $recipe, a small model on the sample catalogue."
  elif ((gpu_memory_mib[0] >= 24000)); then
    recipe=recipes/gpt-neo-2.7b.yaml
    echo "$num_gpus GPU(s) of at least ${gpu_memory_mib[0]} MiB: taking $recipe, which is made for 24 GB."
  else
    recipe=recipes/gpt-neo-1.3b.yaml
    echo "$num_gpus GPU(s), the smallest of ${gpu_memory_mib[0]} MiB, less than 24 GB: taking $recipe."
  fi
  train_args=(--config "$recipe")
fi

# ---- 3. train ---------------------------------------------------------------------------------------------

binds_cores() {  # DeepSpeed needs numactl for it, and counts on all of the machine's cores
  ((num_gpus > 0)) && [[ $(nproc) == "$(getconf _NPROCESSORS_ONLN)" ]] && numactl -C 0 -m 0 true 2>/dev/null
}

launcher=(deepspeed --quiet)
if [[ -n "${HOSTFILE:-}" ]]; then
  launcher+=(--hostfile "$HOSTFILE")
else
  num_processes=${NGPU:-$((num_gpus > 0 ? num_gpus : 1))}
  launcher+=(--num_accelerators "$num_processes" --master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}")
  if binds_cores; then launcher+=(--bind_cores_to_rank); fi  # an offloaded optimizer works on the CPU
fi
((num_gpus > 0)) || export DS_ACCELERATOR=cpu
run "${launcher[@]}" train.py "${train_args[@]}"

# ---- 4. sample --------------------------------------------------------------------------------------------

generate_args=()  # generate.py finds the run by the same two flags
for ((i = 0; i < ${#train_args[@]}; i++)); do
  case ${train_args[i]} in
    --config | --output_dir) generate_args+=("${train_args[@]:i:2}") ;;
    --config=* | --output_dir=*) generate_args+=("${train_args[i]}") ;;
  esac
done
run python generate.py "${generate_args[@]}"
