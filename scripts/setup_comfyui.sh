#!/usr/bin/env bash
# Make a working CPU ComfyUI with this pack in it.
#
#   scripts/setup_comfyui.sh SOURCE DEST
#
# SOURCE is a git URL or a local git directory (bare or not); DEST is the folder to create or refresh.
# DEST/venv gets ComfyUI's requirements with CPU torch, DEST/custom_nodes gets a link to this pack.
# torchvision and torchaudio from the package index are CUDA builds that fail to import beside CPU torch;
# nothing in site-packages is edited for that: tests/comfyui/launch_server.py makes up for it at start-up.
set -euo pipefail

if [ $# -ne 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
source=$1
dest=$2
pack=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

if [ -d "$source" ] && ! git -C "$source" rev-parse --git-dir >/dev/null 2>&1; then
    echo "setup_comfyui: $source is not a git directory" >&2
    exit 1
fi

if [ ! -d "$dest/.git" ]; then
    mkdir -p "$(dirname "$dest")"
    git clone --quiet --no-checkout "$source" "$dest"
fi
# A partial mirror may lack large tokenizer files that a start does not need: check out all that is there.
commit=$(git -C "$dest" rev-parse HEAD)
missing=$(git -C "$dest" rev-list --objects --missing=print -n 1 "$commit" | sed -n 's/^?//p')
exclude=()
while IFS=$'\t' read -r meta path; do
    blob=${meta##* }
    if [ -n "$missing" ] && grep -qx "$blob" <<<"$missing"; then
        echo "setup_comfyui: $path is not in $source; left out" >&2
        exclude+=(":!$path")
    fi
done < <(git -C "$dest" ls-tree -r "$commit")
git -C "$dest" checkout --quiet "$commit" -- . "${exclude[@]+"${exclude[@]}"}"

[ -x "$dest/venv/bin/python" ] || "$python" -m venv "$dest/venv"
pip=("$dest/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
constraints="$pack/constraints.txt"

"${pip[@]}" -c "$constraints" torch
# These four would replace CPU torch by a CUDA build if pip followed their dependencies.
"${pip[@]}" -c "$constraints" --no-deps torchvision torchaudio kornia kornia_rs spandrel
rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
grep -vE '^(torch|torchvision|torchaudio|kornia|spandrel)([<>=~! ]|$)' "$dest/requirements.txt" >"$rest"
"${pip[@]}" -c "$constraints" -r "$rest"
"$dest/venv/bin/python" "$pack/install.py" --quiet --disable-pip-version-check

link="$dest/custom_nodes/hybrid-dit"
if [ "$(readlink "$link" 2>/dev/null || true)" != "$pack" ]; then
    rm -f "$link"
    ln -s "$pack" "$link"
fi

echo "ComfyUI $(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$dest/comfyui_version.py") is ready in $dest"
echo "start it:  cd $dest && venv/bin/python $pack/tests/comfyui/launch_server.py --cpu"
