#!/bin/bash
# Train a text-to-image model on this machine and draw:  bash scripts/demo.sh ["a red heart" "another prompt" ...]
# What an earlier call has installed, prepared, trained or drawn is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh emoji

[ $# -gt 0 ] || set -- "red heart" "pizza" "cat face" "rainbow" "sun with face" "soccer ball" "green apple" "rocket"
run=runs/emoji
pictures=drawn/demo-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1)
prompts=()
for prompt in "$@"; do prompts+=(--prompt "$prompt"); done

.venv/bin/diffjax doctor
.venv/bin/diffjax train --config experiments/emoji.py --workdir $run
.venv/bin/diffjax sample --run $run "${prompts[@]}" --num 2 --out "$pictures"
.venv/bin/diffjax evaluate --run $run
[ -f "$pictures-page/index.html" ] || .venv/bin/diffjax explain --run $run --prompt "$1" --out "$pictures-page"
cat <<END

Your pictures are in $PWD/$pictures: look at grid.png first.
How the first of them was made, open in a browser: $PWD/$pictures-page/index.html

To go on:

    cd $(printf '%q' "$PWD")
    source .venv/bin/activate
    diffjax words --run $run                                              # what your prompts can say
    diffjax sample --run $run --prompt "a red heart" --num 4 --out drawn/hearts
    diffjax COMMAND --help                                                # doctor, train, sample, evaluate, plan, ...
END
