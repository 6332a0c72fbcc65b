#!/usr/bin/env bash
# Run `mslora-cr COMMAND CONFIG …` on one or more GPUs. The six scripts next to this one call it.
#
#   scripts/launch.sh COMMAND CONFIG [options] [mslora-cr options] [KEY=VALUE …]
#
#   --gpus N              processes, one per GPU (GPUS; default: all visible GPUs, or 1)
#   --launcher NAME       none, torchrun, deepspeed or accelerate (LAUNCHER; default: torchrun for several processes or
#                         --deepspeed, else none)
#   --per-device-batch N  maximum samples per GPU at once; the global batch stays as configured (PER_DEVICE_BATCH)
#   --deepspeed FILE      DeepSpeed configuration (DEEPSPEED; default with the deepspeed launcher: zero2.json)
#   --max-restarts N      with torchrun: how often it starts all processes again by itself after one has failed, for
#                         instance because memory ran out; they resume (MAX_RESTARTS; default: 0)
#   MODEL, DATA           environment variables: base model folder and data root, overriding the configuration
#
# KEY=VALUE wins over all of these.
# Relative paths are resolved from the repository root. CUDA_VISIBLE_DEVICES selects the GPUs.
# If the run is interrupted, rerun the same command: finished tasks are skipped, and an unfinished one resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,17s/^# \{0,1\}//p' scripts/launch.sh; }
source scripts/common.sh

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit 0; }
[[ $# -ge 2 ]] || { usage >&2; exit 2; }
command=$1 config=$2
shift 2

gpus=${GPUS:-} launcher=${LAUNCHER:-} per_device=${PER_DEVICE_BATCH:-} deepspeed=${DEEPSPEED:-} restarts=${MAX_RESTARTS:-0}
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --gpus | --launcher | --per-device-batch | --deepspeed | --max-restarts) [[ $# -ge 2 ]] || refuse "$1 needs a value" ;;&
    --gpus) gpus=$2; shift 2 ;;
    --launcher) launcher=$2; shift 2 ;;
    --per-device-batch) per_device=$2; shift 2 ;;
    --deepspeed) deepspeed=$2; shift 2 ;;
    --max-restarts) restarts=$2; shift 2 ;;
    *) rest+=("$1"); shift ;;
  esac
done
settle_gpus
[[ $command == train ]] || deepspeed=
[[ -n $launcher ]] || { [[ $gpus -gt 1 || -n $deepspeed ]] && launcher=torchrun || launcher=none; }
[[ $launcher != none || $gpus -eq 1 ]] || refuse "launcher none starts one process, not $gpus; use torchrun"
[[ $restarts =~ ^[0-9]+$ ]] || refuse "--max-restarts is '$restarts'; it must be an integer of at least 0"
[[ $restarts -eq 0 || $launcher == torchrun ]] || refuse "--max-restarts is torchrun's; the launcher is $launcher"
[[ $launcher != deepspeed || -n $deepspeed ]] || deepspeed=configs/deepspeed/zero2.json

if [[ $command == train ]]; then
  [[ -z $per_device ]] || settings+=("training.per_device_train_batch_size=$per_device")
  [[ -z $deepspeed ]] || settings+=("training.deepspeed=$deepspeed")
elif [[ -n $per_device ]]; then
  settings+=("evaluation.batch_size=$per_device")
fi
assemble

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
case $launcher in
  none) exec "$python" -m "${program[@]}" ;;
  torchrun)
    options=(--standalone --nproc_per_node "$gpus")
    [[ $restarts -eq 0 ]] || options+=(--max_restarts "$restarts")
    exec "$python" -m torch.distributed.run "${options[@]}" -m "${program[@]}" ;;
  deepspeed)
    where=(--num_gpus "$gpus")
    # --num_gpus would select the first GPUs of the machine, not the visible ones.
    [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || where=(--include "localhost:$(cut -d, -f "-$gpus" <<<"$CUDA_VISIBLE_DEVICES")")
    exec "$python" -m deepspeed.launcher.runner "${where[@]}" --master_port "$(free_port)" --module "${program[@]}" ;;
  accelerate)
    options=(--num_processes "$gpus" --num_machines 1 --mixed_precision no --dynamo_backend no)
    [[ $gpus -eq 1 ]] || options+=(--multi_gpu)
    exec "$python" -m accelerate.commands.launch "${options[@]}" --main_process_port "$(free_port)" --module "${program[@]}" ;;
  *) refuse "unknown launcher '$launcher'; use none, torchrun, deepspeed or accelerate" ;;
esac
