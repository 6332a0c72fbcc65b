#!/usr/bin/env bash
# Train one bank per task, each from the base alone. Options: scripts/launch.sh --help
set -euo pipefail
exec "$(dirname "$0")/launch.sh" train configs/finetune_lora_each.yaml "$@"
