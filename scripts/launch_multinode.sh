#!/usr/bin/env bash
# Run `mslora-cr COMMAND CONFIG …` on several hosts that share the repository, the data and the run folder.
#
#   scripts/launch_multinode.sh COMMAND CONFIG [options] [mslora-cr options] [KEY=VALUE …]
#
# torchrun: run the same command on every host, changing only --host-rank.
#   --hosts N         number of hosts (HOSTS)
#   --host-rank R     rank of this host, from 0 (HOST_RANK; set by Slurm inside srun)
#   --master HOST     name or address at which the others reach host 0 (MASTER)
# DeepSpeed: run one command on host 0, which reaches the others through pdsh and ssh; or, with --host-rank, one per host.
#   --hostfile FILE   lines of `HOST slots=GPUS`, host 0 first (HOSTFILE)
# Both:
#   --gpus N          processes per host, one per GPU (GPUS; default: all visible GPUs, or 1; ignored with --hostfile)
#   --port P          free port on host 0 (MASTER_PORT; default: 29500)
#   --interface NAME  network interface between the hosts (INTERFACE; default: NCCL and gloo choose)
#   MODEL, DATA       environment variables: base model folder and data root, overriding the configuration;
#                     KEY=VALUE wins over them
#
# If the run is interrupted or a host is lost, rerun the same commands: the run resumes from its last checkpoint.
#
#   scripts/launch_multinode.sh train configs/finetune_mslora_cr_ortho.yaml --hosts 2 --host-rank 0 --master node1
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,23s/^# \{0,1\}//p' scripts/launch_multinode.sh; }
source scripts/common.sh

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit 0; }
[[ $# -ge 2 ]] || { usage >&2; exit 2; }
command=$1 config=$2
shift 2

hosts=${HOSTS:-} host_rank=${HOST_RANK:-${SLURM_NODEID:-}} master=${MASTER:-} hostfile=${HOSTFILE:-}
gpus=${GPUS:-} port=${MASTER_PORT:-29500} interface=${INTERFACE:-}
rest=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --hosts | --host-rank | --master | --hostfile | --gpus | --port | --interface)
      [[ $# -ge 2 ]] || refuse "$1 needs a value" ;;&
    --hosts) hosts=$2; shift 2 ;;
    --host-rank) host_rank=$2; shift 2 ;;
    --master) master=$2; shift 2 ;;
    --hostfile) hostfile=$2; shift 2 ;;
    --gpus) gpus=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --interface) interface=$2; shift 2 ;;
    *) rest+=("$1"); shift ;;
  esac
done
settle_gpus
[[ -z $interface ]] || export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface
assemble

if [[ -n $hostfile ]]; then
  options=(--hostfile "$hostfile" --master_port "$port")
  [[ -z $master ]] || options+=(--master_addr "$master")
  [[ -z $host_rank ]] || options+=(--no_ssh --node_rank "$host_rank")
  exec "$python" -m deepspeed.launcher.runner "${options[@]}" --module "${program[@]}"
fi
[[ -n $hosts && -n $host_rank && -n $master ]] ||
  refuse "give --hosts, --host-rank and --master, or --hostfile; see --help"
exec "$python" -m torch.distributed.run --nnodes "$hosts" --node_rank "$host_rank" --nproc_per_node "$gpus" \
  --master_addr "$master" --master_port "$port" -m "${program[@]}"
