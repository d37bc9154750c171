#!/bin/bash
# Train a text-to-image model on this machine and draw what no training picture shows:
#     bash scripts/demo.sh ["a purple panda" "another prompt" ...]
# What an earlier call has installed, prepared, trained or drawn is used again, so that other prompts take seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh emoji

mixes=drawn/demo-mixes
[ -f $mixes/grid.png ] || .venv/bin/diffjax sample --config experiments/closed_form.py --num 1 --out $mixes \
    --prompt "frog + red heart" --prompt "panda + strawberry" --prompt "ghost + rainbow" --prompt "fox + rocket"
echo "Before any training, out of 200 pictures alone: $PWD/$mixes/grid.png, and in $mixes/provenance where each pixel is from"

[ $# -gt 0 ] || set -- "a purple panda" "a blue penguin" "unicorn, green" "yellow rockets" "an orange cat" "a crimson robot" \
    "a red heart" "pizza"
run=runs/emoji
page=drawn/demo-page
pictures=drawn/demo-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1)
prompts=()
for prompt in "$@"; do prompts+=(--prompt "$prompt"); done

if [ ! -f $run/evaluation.json ]; then
    .venv/bin/diffjax doctor
    .venv/bin/diffjax train --config experiments/emoji.py --workdir $run
fi
if [ ! -f $page/index.html ]; then # beside what follows: compiling keeps one core busy, seldom two
    .venv/bin/diffjax explain --run $run --prompt "$1" --out $page >$page.log 2>&1 &
    explaining=$!
    trap 'kill $explaining 2>/dev/null || true' EXIT
fi
[ -f $run/evaluation.json ] || .venv/bin/diffjax evaluate --run $run --num 200
.venv/bin/diffjax sample --run $run "${prompts[@]}" --num 1 --out "$pictures"
.venv/bin/python scripts/demo_sheet.py $run "$pictures" "$pictures/sheet.png"
[ -z "${explaining:-}" ] || wait $explaining || { cat $page.log; exit 1; }
cat <<END

Your pictures, pairs that no training picture shows, and the figures: $PWD/$pictures/sheet.png
How a picture was made, for a browser: $PWD/$page/index.html

Next, in $(printf '%q' "$PWD") after \`source .venv/bin/activate\`:
    diffjax sample --run $run --prompt "a green unicorn" --num 4 --out drawn/unicorns    # draw more
    diffjax words --run $run                                                             # what prompts can say
    diffjax --help                                                                       # all there is to do
END
