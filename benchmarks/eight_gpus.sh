#!/usr/bin/env bash
# The reference table, ours against cache-dit 1.5.3, on all GPUs of this machine (up to eight).
#
#   benchmarks/eight_gpus.sh [SECONDS] [FOLDER]
#
# Begins no row after SECONDS (default 420), and keeps figures in FOLDER (default: here): call it again with the same
# FOLDER until nothing is left, and it prints the whole table. FLUX.2-dev first, then Qwen-Image, then (with
# COMFYUI_PATH, and WEIGHTS for a folder with 62 GiB of disk) a FLUX.2-dev picture in ComfyUI on all GPUs.
# Needs torch with CUDA, diffusers, transformers and `pip install cache-dit==1.5.3`; about 80 GB of each GPU.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
seconds=${1:-420}
folder=${2:-.}
began=$SECONDS
status=0
for shape in flux2-dev qwen-image; do
    left=$((seconds - (SECONDS - began)))
    "${PYTHON:-python3}" "$here/eight_gpus.py" --shape "$shape" --seconds "$((left > 0 ? left : 0))" \
        --json "$folder/eight_gpus_$shape.json" || status=1
done
if [ -n "${COMFYUI_PATH:-}" ] && [ -n "${WEIGHTS:-}" ] && [ $((SECONDS - began)) -lt "$seconds" ]; then
    "${PYTHON:-python3}" "$here/comfyui_picture.py" "$WEIGHTS" --json "$folder/comfyui_picture.json" || status=1
fi
exit $status
