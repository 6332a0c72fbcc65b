#!/usr/bin/env bash
# Link the data and the pretrained models to the paths that the configurations use:
#
#   MSLORA_DATA      data root                                              -> data/MSLoRA_CR
#   LLAVA_MED_V1_5   LLaVA-Med v1.5                                         -> pretrained_models/llava_med_v1.5
#   CLIP_PATH        the folder that contains clip-vit-large-patch14-336    -> pretrained_models/openai
#
# Relative folders are resolved from where it is called.
# Safe to rerun; replaces links only, never files or folders. Exits with 1 if anything is missing.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0

link() {
    local variable=$1 place=$2 content=$3
    local target=${!variable:-}
    [[ -z $target || $target == /* ]] || target=$caller/$target
    if [[ -z $target ]]; then
        if [[ -e $place ]]; then
            echo "ok       $place (already there; $variable is not set)"
        else
            echo "missing  $place: set $variable to the folder to link" >&2
            status=1
        fi
    elif [[ ! -d $target ]]; then
        echo "missing  $place: $variable names $target, which is not a folder" >&2
        status=1
    elif [[ -e $place && ! -L $place ]]; then
        if [[ $place -ef $target ]]; then
            echo "ok       $place"
        else
            echo "refused  $place is not a link; move it out of the way to link to $target" >&2
            status=1
        fi
    else
        ln -sfn "$(realpath "$target")" "$place"
        echo "ok       $place -> $(readlink "$place")"
    fi
    if [[ -d $place && -n $content && ! -e $place/$content ]]; then
        echo "missing  $place/$content" >&2
        status=1
    fi
}

mkdir -p data pretrained_models checkpoints
link MSLORA_DATA data/MSLoRA_CR ""
link LLAVA_MED_V1_5 pretrained_models/llava_med_v1.5 config.json
link CLIP_PATH pretrained_models/openai clip-vit-large-patch14-336
exit "$status"
