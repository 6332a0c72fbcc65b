# What launch.sh and launch_multinode.sh share; both source it, from the repository root.

refuse() { echo "$(basename "$0"): $1" >&2; exit 2; }

# Check the number of GPUs; where none is asked for, it is that of the visible ones, or 1.
settle_gpus() {
  if [[ -z $gpus ]]; then
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    else gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true); fi
    [[ $gpus -gt 0 ]] || gpus=1
  fi
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "--gpus is '$gpus'; it must be an integer of at least 1"
}

# Overrides that the environment and the launcher's own options ask for.
settings=()
[[ -z ${MODEL:-} ]] || settings+=("model.path=$MODEL")
[[ -z ${DATA:-} ]] || settings+=("data.root=$DATA")

# The program's words: the settings go before the first KEY=VALUE of the command line, since the last one wins.
assemble() {
  local word
  program=(mslora_cr "$command" "$config")
  for word in "${rest[@]}"; do
    if [[ $word == *=* && $word != -* ]]; then
      program+=("${settings[@]}")
      settings=()
    fi
    program+=("$word")
  done
  program+=("${settings[@]}")
}

python=python
[[ ! -x .venv/bin/python ]] || python=$PWD/.venv/bin/python
