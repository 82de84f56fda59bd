#!/usr/bin/env bash
# The whole road: environment, training, samples.
#
#   ./launch.sh                                   picks a recipe for this machine, trains, samples
#   ./launch.sh --config recipes/demo.yaml ...    arguments go to train.py
#   ./launch.sh --setup-only                      makes .venv and stops
#   sbatch launch.sh --config ...                 the same as a SLURM job, on one node or more (docs/clusters.md)
#
#   NGPU=2 ./launch.sh ...                        processes on each machine (default: one for each GPU)
#   HOSTFILE=hosts ./launch.sh ...                several machines, by deepspeed's hostfile and ssh
#   DRY_RUN=1 ./launch.sh ...                     prints the commands, runs nothing
#   PYTHON=python3.12 ./launch.sh                 which Python .venv is made with
#
# For SLURM: edit these lines, or say it to sbatch, which wins (sbatch --nodes=2 --time=2:00:00 launch.sh ...).
#SBATCH --job-name=neoflix
#SBATCH --nodes=1                # EDIT: machines
#SBATCH --gpus-per-node=1        # EDIT: GPUs of each; 0 for none
#SBATCH --cpus-per-task=8        # EDIT: cores of each; an offloaded optimizer works on them
#SBATCH --mem=0                  # EDIT: host memory of each; 0 is all of it (README, Memory)
#SBATCH --time=24:00:00          # EDIT: a run that takes longer saves itself, queues again and goes on
##SBATCH --partition=gpu         # EDIT: take away one # where your cluster wants it, --account likewise
#SBATCH --signal=B:USR1@600      # so many seconds before its end it is told to save itself
#SBATCH --requeue                # and may queue again
#SBATCH --open-mode=append       # and goes on in the same slurm-JOB.out
#SBATCH --ntasks-per-node=1      # leave it: DeepSpeed starts a process for each GPU
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^# For SLURM/{/^# For SLURM/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit
fi

RUN_ME_AGAIN=75  # train.py's exit code: stopped on request, all saved, the same command goes on

fail() {  # what the caller got wrong, in one sentence
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

on_slurm() {  # a job's own shell; one that was opened on a node by `srun --pty bash` is like any other
  [[ -n "${SLURM_JOB_ID:-}" && -z "${SLURM_STEP_ID:-}" ]]
}

asked='' step=''  # whether the job was asked to save itself; the process of its srun

ask_to_save() {  # again and again: training that has only just started hears nothing
  asked=yes interrupted=yes
  echo "SIGUSR1: training is asked to save itself"
  while [[ -n "$step" ]] && kill -USR1 "$step" 2>/dev/null; do sleep 5; done
}

if on_slurm; then trap ask_to_save USR1; fi

# sbatch runs a copy from its spool, in the folder that it was called from.
here=$(dirname "${BASH_SOURCE[0]}")
if [[ -f "$here/requirements.txt" ]]; then cd "$here"; fi
[[ -f requirements.txt ]] || fail "$PWD is not the project's folder: call sbatch from there, or with --chdir"

# ---- 1. environment: made once, and again when requirements.txt changes -----------------------------------

is_set_up() {
  cmp --silent requirements.txt .venv/requirements.installed
}

setup() {
  is_set_up && return
  echo "Setting up .venv (a few minutes, once)"
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed; name one, for example: PYTHON=python3.12 ./launch.sh"
  [[ -x .venv/bin/python ]] || run "${PYTHON:-python3}" -m venv .venv
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  run cp requirements.txt .venv/requirements.installed
}

if ! is_set_up; then
  { flock 9 || true; setup; } 9<>requirements.txt  # of jobs that begin together one installs, the others wait
fi
if [[ "${1:-}" == --setup-only ]]; then exit; fi
export PATH="$PWD/.venv/bin:$PATH"  # deepspeed starts its workers, and ninja, from here

# ---- 2. which recipe: the memory of the smallest GPU decides, and of the host -----------------------------

gpu_memory_mib=()
if command -v nvidia-smi >/dev/null && [[ -n "${CUDA_VISIBLE_DEVICES-all}" ]]; then
  query=(nvidia-smi --query-gpu=memory.total "--format=csv,noheader,nounits")
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then query+=(--id="$CUDA_VISIBLE_DEVICES"); fi  # those that are ours
  mapfile -t gpu_memory_mib < <("${query[@]}" 2>/dev/null | grep -E '^[0-9]+$' | sort -n)
fi
num_gpus=${#gpu_memory_mib[@]}

train_args=("$@")
if ((${#train_args[@]} == 0)); then
  if ((num_gpus == 0)); then
    recipe=recipes/demo.yaml
    echo "No GPU found: taking $recipe, a small model on the sample catalogue."
    echo "With a network, ./launch.sh --config recipes/gpt-neo-125m.yaml gives real English; it takes longer."
  else
    # What the recipes take by their plans (docs/memory.md): 2.7B 18 GiB of the GPU and 52 of the host, 1.3B 6.4 and
    # 30, by LoRA 2.7B 17 and 7.4. Where `free` is missing the GPU alone decides, and the plan has the last word.
    host_mib=$({ free --mebi 2>/dev/null || true; } | awk '/^Mem:/ {print $7}')
    host_words=${host_mib:+, $host_mib MiB of host memory free}
    host_mib=${host_mib:-1000000}
    if ((gpu_memory_mib[0] >= 24000 && host_mib >= 54000)); then
      recipe=recipes/gpt-neo-2.7b.yaml
    elif ((gpu_memory_mib[0] >= 24000 && host_mib >= 8000)); then
      recipe=recipes/gpt-neo-2.7b-lora.yaml
    elif ((gpu_memory_mib[0] >= 8000 && host_mib >= 30500)); then
      recipe=recipes/gpt-neo-1.3b.yaml
    else
      recipe=recipes/gpt-neo-125m.yaml
    fi
    echo "$num_gpus GPU(s) of at least ${gpu_memory_mib[0]} MiB$host_words: taking $recipe."
  fi
  train_args=(--config "$recipe")
fi

# ---- 3. which folder: generate.py finds the run by the same two flags -------------------------------------

# As the parser reads them: --output_dir X, --output-dir X or either with =X, and the last one wins.
config='' output_dir='' plan=false eval_only=false
for ((i = 0; i < ${#train_args[@]}; i++)); do
  word=${train_args[i]} value=${train_args[i + 1]:-}
  if [[ "$word" == *=* ]]; then value=${word#*=} word=${word%%=*}; fi
  case ${word//-/_} in
    __config) config=$value ;;
    __output_dir) output_dir=$value ;;
    __plan) plan=$value ;;
    __eval_only) eval_only=$value ;;
  esac
done

is_no() {  # a flag alone means yes, and what follows it is another flag, or nothing
  [[ "${1,,}" =~ ^(false|f|no|n|0)$ ]]
}

output_dir_of() {  # a recipe; of one that cannot be read, nothing: training says why
  python -c 'import os, sys, yaml
recipe = yaml.safe_load(open(os.path.expanduser(sys.argv[1]), encoding="utf-8"))
print(recipe.get("output_dir") or "")' "$1" 2>/dev/null || true
}

if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then  # %a is sbatch's own word for the task's number
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

# ---- 4. what starts the processes -------------------------------------------------------------------------

binds_cores() {  # DeepSpeed needs numactl for it, and counts on all of the machine's cores
  ((num_gpus > 0)) && [[ $(nproc) == "$(getconf _NPROCESSORS_ONLN)" ]] && numactl -C 0 -m 0 true 2>/dev/null
}

launch_here() {
  launcher=(deepspeed --quiet)
  if ((num_gpus == 0)) || [[ -n "${NGPU:-}" || -z "${CUDA_VISIBLE_DEVICES:-}" ]]; then  # else it takes those named
    launcher+=(--num_accelerators "$num_processes")
  fi
  launcher+=(--master_port "${MASTER_PORT:-$((20000 + RANDOM % 10000))}")
  if binds_cores; then launcher+=(--bind_cores_to_rank); fi  # an offloaded optimizer works on the CPU
}

launch_by_ssh() {
  [[ -f "$HOSTFILE" ]] || fail "HOSTFILE=$HOSTFILE: no such file; it has a line for each machine, as: node1 slots=8"
  launcher=(deepspeed --quiet --hostfile "$HOSTFILE")
}

start_on_node() {  # what srun runs, once on each node
  trap '' TERM USR1  # they reach all processes: training acts on them, what started it must not die of them
  [[ -z "$WANTED_GPUS" || -z "${CUDA_VISIBLE_DEVICES:-}" || ",$CUDA_VISIBLE_DEVICES," == ",$WANTED_GPUS,"* ]] ||
    fail "DeepSpeed takes GPUs $WANTED_GPUS, $SLURMD_NODENAME has given $CUDA_VISIBLE_DEVICES: ask for --exclusive nodes"
  exec deepspeed --node_rank "$SLURM_NODEID" "$@"
}

launch_by_srun() {
  # The last task of an array has the array's own number as its job: by that alone all tasks would be meant.
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  export NEOFLIX_LOG_DIR=${NEOFLIX_LOG_DIR:-.}/slurm-$job  # rank 0 writes to the job's output, the others here
  local nodes address hostfile=$NEOFLIX_LOG_DIR/hosts
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  address=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')  # as SLURM itself reaches it
  echo "$hostfile: $num_processes process(es) on each of ${nodes[*]}"
  run mkdir -p "$NEOFLIX_LOG_DIR"
  if [[ -z "${DRY_RUN:-}" ]]; then printf "%s slots=$num_processes\n" "${nodes[@]}" >"$hostfile"; fi
  WANTED_GPUS=$( ((num_gpus == 0)) || seq -s, 0 $((num_processes - 1)))
  export WANTED_GPUS
  export -f start_on_node fail
  if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then  # srun takes it from here alone, since SLURM 22.05
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  fi
  # After a task's end the others have a minute: time enough to say which rank died.
  launcher=(srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60)
  launcher+=(bash -c 'start_on_node "$@"' node --quiet --hostfile "$hostfile" --no_ssh)
  launcher+=(--master_addr "${MASTER_ADDR:-$address}" --master_port "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}")
}

num_processes=${NGPU:-$((num_gpus > 0 ? num_gpus : 1))}
((num_gpus > 0)) || export DS_ACCELERATOR=cpu
if on_slurm; then
  launch_by_srun
elif [[ -n "${HOSTFILE:-}" ]]; then
  launch_by_ssh
else
  launch_here
fi

# ---- 5. train ---------------------------------------------------------------------------------------------

train() {  # returns training's own exit code
  local code=0
  if [[ -n "${DRY_RUN:-}" ]] || ! on_slurm; then
    run "$@" || code=$?
  else
    wait_for_step "$@" || code=$?
  fi
  # Rank 0 leaves it: DeepSpeed's launcher and srun do not always hand it on.
  if [[ -s "$NEOFLIX_EXIT_CODE_FILE" ]]; then code=$(<"$NEOFLIX_EXIT_CODE_FILE"); fi
  return "$code"
}

wait_for_step() {  # in the background: the shell hears signals meanwhile, and outlives them until all is saved
  local code
  trap 'interrupted=yes' TERM  # SLURM tells training as well
  "$@" &
  step=$!
  if [[ -n "$asked" ]]; then ask_to_save; fi
  interrupted=yes
  while [[ -n "$interrupted" ]]; do
    interrupted=''
    wait "$step" && code=0 || code=$?
  done
  trap '' USR1
  trap - TERM
  return "$code"
}

queue_again() {
  case $(squeue --noheader --job "$job" --format=%T) in
    COMPLETING | CANCELLED) return ;;  # somebody wants it to end
  esac
  echo "Queueing job $job again"
  scontrol requeue "$job" || echo "It cannot be queued again from here: the same command goes on."
}

NEOFLIX_EXIT_CODE_FILE=$(mktemp)
export NEOFLIX_EXIT_CODE_FILE
trap 'rm -f "$NEOFLIX_EXIT_CODE_FILE"' EXIT
code=0
train "${launcher[@]}" train.py "${train_args[@]}" || code=$?
if ((code == RUN_ME_AGAIN)) && on_slurm; then queue_again; fi
((code == 0)) || exit "$code"

# ---- 6. sample --------------------------------------------------------------------------------------------

if ! is_no "$plan" || ! is_no "$eval_only"; then exit; fi  # nothing was trained

run python generate.py "${generate_args[@]}"

if [[ -z "${DRY_RUN:-}" ]]; then
  if [[ -z "$output_dir" && -n "$config" ]]; then output_dir=$(output_dir_of "$config"); fi
  echo "Report: ${output_dir:-results}/report.html (open it in a browser)"
fi
