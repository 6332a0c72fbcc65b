#!/usr/bin/env bash
# Train MSLoRA-CR-ORTHO on all eight tasks. Options: scripts/launch.sh --help
set -euo pipefail
exec "$(dirname "$0")/launch.sh" train configs/finetune_mslora_cr_ortho.yaml "$@"
