#!/usr/bin/env bash
# Answer and score the test questions of: one bank per task, each from the base alone. Options: scripts/launch.sh --help
# Published checkpoints are evaluated as they are with: --banks checkpoints
set -euo pipefail
exec "$(dirname "$0")/launch.sh" evaluate configs/finetune_lora_each.yaml "$@"
