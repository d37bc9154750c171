#!/bin/bash
# Set up, then run the tests:  bash scripts/test.sh [--reference] [pytest's own arguments]
# --reference also installs torch, diffusers and transformers and compares with them live.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="emoji test"
for argument in "$@"; do
    [ "$argument" = --reference ] && extras="$extras reference"
done
bash scripts/setup.sh $extras
exec .venv/bin/python -m pytest "$@"
