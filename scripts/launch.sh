#!/usr/bin/env bash
# Start `mslora-cr COMMAND CONFIG …` on one GPU or several. The six scripts beside this one call it.
#
#   scripts/launch.sh COMMAND CONFIG [options] [mslora-cr options] [KEY=VALUE …]
#
#   --gpus N              processes, one per GPU           (GPUS; all GPUs there are, or 1)
#   --launcher NAME       none, torchrun, deepspeed, accelerate   (LAUNCHER; none for one process, else torchrun)
#   --per-device-batch N  most samples per GPU at once; the global batch stays as configured (PER_DEVICE_BATCH)
#   --deepspeed FILE      a DeepSpeed configuration        (DEEPSPEED; zero2 with the deepspeed launcher)
#   MODEL, DATA           environment: the base model's folder and the data root, instead of the configuration's
#
# Run it again after an interruption: finished tasks are skipped, the one that was cut goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
[[ $# -ge 2 ]] || { usage; exit 2; }
command=$1 config=$2
shift 2

gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
launcher=${LAUNCHER:-} per_device=${PER_DEVICE_BATCH:-} deepspeed=${DEEPSPEED:-}
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --gpus) gpus=$2; shift 2 ;;
    --launcher) launcher=$2; shift 2 ;;
    --per-device-batch) per_device=$2; shift 2 ;;
    --deepspeed) deepspeed=$2; shift 2 ;;
    --help | -h) usage; exit 0 ;;
    *) rest+=("$1"); shift ;;
  esac
done
[[ $gpus -gt 0 ]] || gpus=1
[[ -n $launcher ]] || { [[ $gpus -gt 1 ]] && launcher=torchrun || launcher=none; }
[[ $launcher != deepspeed || -n $deepspeed ]] || deepspeed=configs/deepspeed/zero2.json

[[ -z ${MODEL:-} ]] || rest+=("model.path=$MODEL")
[[ -z ${DATA:-} ]] || rest+=("data.root=$DATA")
if [[ $command == train ]]; then
  [[ -z $per_device ]] || rest+=("training.per_device_train_batch_size=$per_device")
  [[ -z $deepspeed ]] || rest+=("training.deepspeed=$deepspeed")
elif [[ -n $per_device ]]; then
  rest+=("evaluation.batch_size=$per_device")
fi

python=python
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
program=(mslora_cr "$command" "$config" "${rest[@]}")
case $launcher in
  none) exec "$python" -m "${program[@]}" ;;
  torchrun) exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$gpus" -m "${program[@]}" ;;
  deepspeed)
    exec "$python" -m deepspeed.launcher.runner --num_gpus "$gpus" --master_port "$(free_port)" --module "${program[@]}" ;;
  accelerate)
    exec "$python" -m accelerate.commands.launch --num_processes "$gpus" --num_machines 1 --mixed_precision no \
      --dynamo_backend no --main_process_port "$(free_port)" $([[ $gpus -gt 1 ]] && echo --multi_gpu) --module "${program[@]}" ;;
  *) echo "launch.sh: unknown launcher '$launcher'; use none, torchrun, deepspeed or accelerate" >&2; exit 2 ;;
esac
