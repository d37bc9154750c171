#!/bin/bash
# Train a text-to-image model on this machine and draw:  bash scripts/demo.sh ["a red heart" "another prompt" ...]
# What an earlier call has installed, prepared, trained or drawn is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh emoji

[ $# -gt 0 ] || set -- "red heart" "pizza" "cat face" "rainbow" "sun with face" "soccer ball" "green apple" "rocket"
run=$(.venv/bin/python -c 'from diffjax.files import home; print(home() / "runs" / "emoji")')
pictures=$run/pictures/$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1)
prompts=()
for prompt in "$@"; do prompts+=(--prompt "$prompt"); done

.venv/bin/diffjax doctor
.venv/bin/diffjax train --config experiments/emoji.py --workdir "$run"
.venv/bin/diffjax evaluate --run "$run"
.venv/bin/diffjax sample --run "$run" "${prompts[@]}" --num 2 --out "$pictures"
echo "Look at the pictures in $pictures (grid.png shows them all)."
