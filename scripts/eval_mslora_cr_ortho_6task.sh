#!/usr/bin/env bash
# Answer and score the test questions of: MSLoRA-CR-ORTHO on six tasks. Options: scripts/launch.sh --help
# Published checkpoints are evaluated as they are with: --banks checkpoints
set -euo pipefail
exec "$(dirname "$0")/launch.sh" evaluate configs/finetune_mslora_cr_ortho_6task.yaml "$@"
