#!/usr/bin/env bash
# From a fresh machine to samples: environment, recipe, training, sampling.
#
#   ./launch.sh                                   chooses a recipe for this machine, trains, samples
#   ./launch.sh --config recipes/demo.yaml ...    arguments go to train.py
#   ./launch.sh --setup-only                      makes .venv and exits
#   ./launch.sh --tune --config ...               finds the learning rate (docs/tuning.md)
#   ./launch.sh --doctor                          shows what this machine has and lacks, and exits
#   sbatch launch.sh --config ...                 the same as a SLURM job, on one node or more (docs/clusters.md)
#
#   NGPU=2 ./launch.sh ...                        processes per machine (default: one per GPU)
#   HOSTFILE=hosts ./launch.sh ...                several machines, by DeepSpeed's hostfile and ssh
#   DRY_RUN=1 ./launch.sh ...                     prints the commands, runs nothing
#   PYTHON=python3.12 ./launch.sh                 the Python for .venv
#
# For SLURM: edit these lines, or override them by options of sbatch (sbatch --nodes=2 --time=2:00:00 launch.sh ...).
#SBATCH --job-name=neoflix
#SBATCH --nodes=1                # EDIT: machines
#SBATCH --gpus-per-node=1        # EDIT: GPUs per machine; 0 for none
#SBATCH --cpus-per-task=8        # EDIT: cores per machine; an offloaded optimizer runs on them
#SBATCH --mem=0                  # EDIT: host memory per machine; 0 is all of it (README, Memory)
#SBATCH --time=24:00:00          # EDIT: a longer run saves a checkpoint, is requeued and continues
##SBATCH --partition=gpu         # EDIT: remove one # if your cluster needs it; --account likewise
#SBATCH --signal=B:USR1@600      # seconds before the end at which the run is asked to save
#SBATCH --requeue                # it may be requeued
#SBATCH --open-mode=append       # and continues in the same slurm-JOB.out
#SBATCH --ntasks-per-node=1      # do not change: DeepSpeed starts one process per GPU
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^# For SLURM/{/^# For SLURM/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit
fi

RUN_ME_AGAIN=75  # train.py's exit code: stopped on request, everything saved, the same command continues

fail() {  # prints a user error and exits
  echo "error: $*" >&2
  exit 2
}

run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_slurm() {  # true in a batch job's own shell, false in a shell that `srun --pty bash` opened
  [[ -n "${SLURM_JOB_ID:-}" && -z "${SLURM_STEP_ID:-}" ]]
}

asked='' step=''  # whether the run was asked to save; the process of its srun, or its process group as -NUMBER

ask_to_save() {  # repeatedly: a run that has just started does not handle signals yet
  asked=yes interrupted=yes
  echo "$1: asking the run to save a checkpoint and stop"
  while [[ -n "$step" ]] && kill -USR1 -- "$step" 2>/dev/null; do sleep 5; done
}

trap 'exit 143' TERM  # in a container this shell is process 1, which ignores SIGTERM unless it is trapped
if on_slurm; then trap 'ask_to_save SIGUSR1' USR1; fi

# sbatch runs a copy of this file from its spool, in the folder where it was called.
here=$(dirname "${BASH_SOURCE[0]}")
if [[ -f "$here/requirements.txt" ]]; then cd "$here"; fi
[[ -f requirements.txt ]] || fail "$PWD is not the project's folder: call sbatch from that folder, or use --chdir"

# ---- 1. environment: made once, and updated when requirements.txt changes -----------------------------------

is_set_up() {
  cmp --silent requirements.txt .venv/requirements.installed
}

make_venv() {  # without packages, and checks that this machine can use those that will be installed
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is required; name one, for example: PYTHON=python3.12 ./launch.sh"
  [[ -x .venv/bin/python ]] || run "${PYTHON:-python3}" -m venv .venv
  local python=.venv/bin/python
  [[ -x "$python" ]] || python=${PYTHON:-python3}  # a dry run
  "$python" -m neoflix.runtime.driver
}

setup() {
  is_set_up && return
  echo "Setting up .venv (a few minutes, once)"
  make_venv
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  run cp requirements.txt .venv/requirements.installed
}

doctor() {
  if .venv/bin/python -c 'import neoflix.doctor' 2>/dev/null; then exec .venv/bin/python -m neoflix.doctor; fi
  make_venv
  echo "The rest is read with the packages of .venv, which are not installed yet: ./launch.sh --setup-only"
}

if [[ "${1:-}" == --doctor ]]; then
  doctor
  exit
fi
if ! is_set_up; then
  { flock 9 || true; setup; } 9<>requirements.txt  # of jobs that start together, one installs and the others wait
fi
if [[ "${1:-}" == --setup-only ]]; then exit; fi
export PATH="$PWD/.venv/bin:$PATH"  # deepspeed finds its workers and ninja here

# ---- 2. recipe: the first whose plan fits the GPUs, the host's memory and the disk -------------

export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}  # as nvidia-smi; by default CUDA's first is the fastest
if [[ ! -x .venv/bin/python ]]; then  # a dry run
  echo "The rest depends on the GPUs, which are read with .venv: ./launch.sh --setup-only makes it."
  exit
fi
gpu_lines=$(python -m neoflix.doctor --gpus) || exit  # number and name of each
mapfile -t gpus < <(grep . <<<"$gpu_lines")
num_gpus=${#gpus[@]}
num_processes=${NGPU:-$((num_gpus > 0 ? num_gpus : 1))}

fits() {  # whether the plan of a recipe, and of flags after it, fits this machine; sets `said`
  local code=0
  said=$(WORLD_SIZE=$((num_processes * ${SLURM_NNODES:-1})) LOCAL_SIZE=$num_processes \
    python train.py --config "$@" --plan 2>&1) || code=$?
  ((code == 0 || code == 2)) || fail "the plan of $1 failed: $said"
  return "$code"
}

reason() {  # why a plan does not fit, by `said`
  grep -m1 '^too large: ' <<<"$said" || head -1 <<<"${said#error: }"
}

choose_first_look() {  # without a GPU: sets `train_args`, and says why
  local model=smollm2  # in a dry run, which downloads nothing
  echo "No GPU found: looking for the best model within reach."
  if [[ -z "${DRY_RUN:-}" ]]; then model=$(DS_ACCELERATOR=cpu python -m neoflix.first_look results) || exit; fi
  if [[ "$model" != demo ]]; then
    train_args=(--config recipes/first-look.yaml)
    if [[ "$model" != smollm2 ]]; then train_args+=(--model_name_or_path "$model"); fi
    if fits "${train_args[@]:1}"; then
      echo "Using recipes/first-look.yaml: $model, a pretrained model, with LoRA on the sample catalogue."
      return
    fi
    echo "Passed over $model: $(reason)"
  fi
  train_args=(--config recipes/demo.yaml)
  echo "Using recipes/demo.yaml: a small model from scratch on the sample catalogue. It will not write sentences;"
  echo "a pretrained model does: ./launch.sh --config recipes/first-look.yaml (needs a network once)."
}

choose_recipe() {  # sets `train_args`, and says why
  local recipe
  echo "$num_gpus GPU(s):"
  printf '  %s\n' "${gpus[@]}"
  for recipe in recipes/gpt-neo-{2.7b-one-card,2.7b,1.3b-one-card,2.7b-lora,1.3b,125m}.yaml; do
    if fits "$recipe"; then
      echo "Using $recipe: it fits, by its plan (python train.py --config $recipe --plan)."
      train_args=(--config "$recipe")
      return
    fi
    echo "Passed over $recipe: $(reason)"
  done
  fail "no recipe fits this machine; for the smallest: ${said#error: }"
}

train_args=("$@")
if ((${#train_args[@]} == 0)); then
  if ((num_gpus == 0)); then choose_first_look; else choose_recipe; fi
fi

# ---- 3. the run's folder: generate.py finds it by the same two flags -------------------------------------

# As the parser reads flags: --output_dir X, --output-dir X or either with =X; the last one wins.
config='' output_dir='' plan=false eval_only=false tune=false
for ((i = 0; i < ${#train_args[@]}; i++)); do
  word=${train_args[i]} value=${train_args[i + 1]:-}
  if [[ "$word" == *=* ]]; then value=${word#*=} word=${word%%=*}; fi
  case ${word//-/_} in
    __config) config=$value ;;
    __output_dir) output_dir=$value ;;
    __plan) plan=$value ;;
    __eval_only) eval_only=$value ;;
    __tune) tune=$value ;;
  esac
done

is_no() {  # a flag without a value means yes
  [[ "${1,,}" =~ ^(false|f|no|n|0)$ ]]
}

output_dir_of() {  # prints a recipe's output_dir; nothing if it cannot be read (training reports why)
  python -c 'import os, sys, yaml
recipe = yaml.safe_load(open(os.path.expanduser(sys.argv[1]), encoding="utf-8"))
print(recipe.get("output_dir") or "")' "$1" 2>/dev/null || true
}

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then  # %a is sbatch's name for the task's number
  config=${config//%a/$SLURM_ARRAY_TASK_ID}
  if [[ -z "$output_dir" && -n "$config" ]]; then
    output_dir=$(output_dir_of "$config")
  fi
  if [[ "$output_dir" != *%a* ]]; then
    output_dir=${output_dir:-results}/%a
    train_args+=(--output_dir "$output_dir")
  fi
  output_dir=${output_dir//%a/$SLURM_ARRAY_TASK_ID}
  train_args=("${train_args[@]//%a/$SLURM_ARRAY_TASK_ID}")
fi

generate_args=(${config:+--config "$config"} ${output_dir:+--output_dir "$output_dir"})

# ---- 4. the launcher -------------------------------------------------------------------------

binds_cores() {  # DeepSpeed needs numactl for it, and assumes that it has all cores of the machine
  ((num_gpus > 0)) && [[ $(nproc) == "$(getconf _NPROCESSORS_ONLN)" ]] && numactl -C 0 -m 0 true 2>/dev/null
}

launch_here() {
  launcher=(deepspeed --quiet)
  local numbers
  numbers=$(printf '%s\n' ${gpus[@]+"${gpus[@]%% *}"} | head -n "$num_processes" | paste -sd,)
  if ((num_gpus == 0 || num_processes > num_gpus)) || [[ -z "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    launcher+=(--num_accelerators "$num_processes")
  elif [[ "$numbers" != *-* ]]; then  # DeepSpeed itself reads numbers only, no UUIDs
    launcher=(env -u CUDA_VISIBLE_DEVICES deepspeed --quiet --include "localhost:$numbers")
  elif ((num_processes == 1)); then  # part of a GPU (MIG), which DeepSpeed's launcher cannot name
    launcher=(python)
    return
  fi
  launcher+=(--master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}")
  if binds_cores; then launcher+=(--bind_cores_to_rank); fi  # an offloaded optimizer runs on the CPU
}

launch_by_ssh() {
  [[ -f "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE: no such file; it needs one line per machine: node1 slots=8"
  launcher=(deepspeed --quiet --hostfile "$HOSTFILE")
}

start_on_node() {  # srun runs this once on each node
  trap '' TERM USR1  # signals reach all processes: training handles them, its launcher must survive them
  [[ -z "$WANTED_GPUS" || -z "${CUDA_VISIBLE_DEVICES:-}" || ",$CUDA_VISIBLE_DEVICES," == ",$WANTED_GPUS,"* ]] ||
    fail "DeepSpeed uses GPUs $WANTED_GPUS, but $SLURMD_NODENAME gives $CUDA_VISIBLE_DEVICES: request --exclusive nodes"
  exec deepspeed --node_rank "$SLURM_NODEID" "$@"
}

launch_by_srun() {
  export NEOFLIX_LOG_DIR=${NEOFLIX_LOG_DIR:-.}/slurm-$job  # rank 0 writes to the job's output, the other ranks here
  local nodes address hostfile=$NEOFLIX_LOG_DIR/hosts
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  address=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')  # the address that SLURM uses
  echo "$hostfile: $num_processes process(es) on each of ${nodes[*]}"
  run mkdir -p "$NEOFLIX_LOG_DIR"
  if [[ -z "${DRY_RUN:-}" ]]; then printf "%s slots=$num_processes\n" "${nodes[@]}" >"$hostfile"; fi
  WANTED_GPUS=$( ((num_gpus == 0)) || seq -s, 0 $((num_processes - 1)))
  export WANTED_GPUS
  export -f start_on_node fail
  if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then  # since SLURM 22.05 srun reads it only from here
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  fi
  # After a task has ended, the others have a minute to report which rank died.
  launcher=(srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60)
  launcher+=(bash -c 'start_on_node "$@"' node --quiet --hostfile "$hostfile" --no_ssh)
  launcher+=(--master_addr "${MASTER_ADDR:-$address}" --master_port "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}")
}

((num_gpus > 0)) || export DS_ACCELERATOR=cpu
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}  # the last task of an array has the array's own number, which would mean all tasks
if ! is_no "$tune"; then  # starts its runs itself, on this machine
  ((${SLURM_NNODES:-1} == 1)) || fail "--tune runs on one node; use --nodes=1, or --tune array (docs/tuning.md)"
  launcher=(python)
elif on_slurm; then
  launch_by_srun
elif [[ -n "${HOSTFILE:-}" ]]; then
  launch_by_ssh
else
  launch_here
fi

# ---- 5. train ---------------------------------------------------------------------------------------------

train() {  # returns the exit code of training
  local code=0
  if [[ -n "${DRY_RUN:-}" ]]; then
    run "$@"
  elif [[ -n "${HOSTFILE:-}" ]] && ! on_slurm; then
    "$@" || code=$?
  else
    wait_for_step "$@" || code=$?
  fi
  # Rank 0 writes it: DeepSpeed's launcher and srun do not always pass it on.
  if [[ -s "$NEOFLIX_EXIT_CODE_FILE" ]]; then code=$(<"$NEOFLIX_EXIT_CODE_FILE"); fi
  return "$code"
}

wait_for_step() {  # runs in the background, so that the shell handles signals and survives until everything is saved
  local code
  if on_slurm; then
    trap 'interrupted=yes' TERM  # SLURM signals training as well
    "$@" &
    step=$!
  else
    start_process_group "$@"
  fi
  if [[ -n "$asked" ]]; then ask_to_save SIGUSR1; fi
  interrupted=yes
  while [[ -n "$interrupted" ]]; do
    interrupted=''
    wait "${step#-}" && code=0 || code=$?
  done
  trap '' USR1
  trap 'exit 143' TERM
  trap - INT HUP
  return "$code"
}

start_process_group() {  # all processes of a run on one machine, without this shell, which passes signals on to them
  trap '' USR1  # inherited by DeepSpeed's launcher, which must survive it; training handles it
  set -m
  "$@" &
  set +m
  step=-$!
  trap 'ask_to_save SIGTERM' TERM
  trap 'ask_to_save SIGUSR1' USR1
  trap 'interrupted=yes; kill -INT -- "$step"' INT  # Ctrl-C
  trap 'interrupted=yes; kill -HUP -- "$step"' HUP  # the terminal was closed
}

queue_again() {
  case $(squeue --noheader --job "$job" --format=%T) in
    COMPLETING | CANCELLED) return ;;  # somebody cancelled it
  esac
  echo "Requeueing job $job"
  scontrol requeue "$job" || echo "The job cannot be requeued from here; the same command continues the run."
}

NEOFLIX_EXIT_CODE_FILE=$(mktemp)
export NEOFLIX_EXIT_CODE_FILE
trap 'rm -f "$NEOFLIX_EXIT_CODE_FILE"' EXIT
code=0
train "${launcher[@]}" train.py "${train_args[@]}" || code=$?
if ((code == RUN_ME_AGAIN)) && on_slurm; then queue_again; fi
((code == 0)) || exit "$code"

# ---- 6. sample --------------------------------------------------------------------------------------------

if ! is_no "$plan" || ! is_no "$eval_only" || ! is_no "$tune"; then exit; fi  # no model was made

run python generate.py "${generate_args[@]}"

if [[ -z "${DRY_RUN:-}" ]]; then
  if [[ -z "$output_dir" && -n "$config" ]]; then output_dir=$(output_dir_of "$config"); fi
  echo "Report: ${output_dir:-results}/report.html (open it in a browser)"
fi
