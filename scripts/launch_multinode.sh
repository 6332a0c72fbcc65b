#!/usr/bin/env bash
# Start `mslora-cr COMMAND CONFIG …` on several hosts that share the repository, data and run folders.
#
#   scripts/launch_multinode.sh COMMAND CONFIG [options] [mslora-cr options] [KEY=VALUE …]
#
# With torchrun: the same line on each host, but for its number.
#   --hosts N         hosts of the run                              (HOSTS)
#   --host-rank R     this host's number, from 0                    (HOST_RANK; Slurm's own inside srun)
#   --master HOST     the name or address of host 0, as the others reach it    (MASTER)
# With DeepSpeed: one line on host 0, which reaches the others by pdsh and ssh; or, with --host-rank, a line on each.
#   --hostfile FILE   lines of `HOST slots=GPUS`, host 0 first       (HOSTFILE)
# Both:
#   --gpus N          processes per host, one per GPU                (GPUS; all GPUs there are, or 1; not with --hostfile)
#   --port P          a free port of host 0                          (MASTER_PORT; 29500)
#   --interface NAME  the network interface between the hosts        (INTERFACE; NCCL and gloo choose)
#
# Run it again on all hosts after an interruption or the loss of a host: the run goes on from its last checkpoint.
#
#   scripts/launch_multinode.sh train configs/finetune_mslora_cr_ortho.yaml --hosts 2 --host-rank 0 --master node1
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,21s/^# \{0,1\}//p' "$0"; }
[[ $# -ge 2 ]] || { usage; exit 2; }
command=$1 config=$2
shift 2

hosts=${HOSTS:-} host_rank=${HOST_RANK:-${SLURM_NODEID:-}} master=${MASTER:-} hostfile=${HOSTFILE:-}
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)} port=${MASTER_PORT:-29500} interface=${INTERFACE:-}
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --hosts) hosts=$2; shift 2 ;;
    --host-rank) host_rank=$2; shift 2 ;;
    --master) master=$2; shift 2 ;;
    --hostfile) hostfile=$2; shift 2 ;;
    --gpus) gpus=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --interface) interface=$2; shift 2 ;;
    --help | -h) usage; exit 0 ;;
    *) rest+=("$1"); shift ;;
  esac
done
[[ $gpus -gt 0 ]] || gpus=1
[[ -z $interface ]] || export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface
python=python
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
program=(mslora_cr "$command" "$config" "${rest[@]}")

if [[ -n $hostfile ]]; then
  options=(--hostfile "$hostfile" --master_port "$port")
  [[ -z $master ]] || options+=(--master_addr "$master")
  [[ -z $host_rank ]] || options+=(--no_ssh --node_rank "$host_rank")
  exec "$python" -m deepspeed.launcher.runner "${options[@]}" --module "${program[@]}"
fi
[[ -n $hosts && -n $host_rank && -n $master ]] ||
  { echo "launch_multinode.sh: give --hosts, --host-rank and --master, or --hostfile; see --help" >&2; exit 2; }
exec "$python" -m torch.distributed.run --nnodes "$hosts" --node_rank "$host_rank" --nproc_per_node "$gpus" \
  --master_addr "$master" --master_port "$port" -m "${program[@]}"
