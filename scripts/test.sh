#!/bin/bash
# Set up, then run the tests:  bash scripts/test.sh [--reference] [pytest's own arguments]
# --reference also installs torch, diffusers and transformers and compares with them live; torch comes as its CPU build
# wherever the indexes or folders that pip is set to look in (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) offer one.
# --notebooks also installs a kernel and runs the notebooks.
# --accelerators only compiles for TPUs and GPUs that need not be here; what the extras tpu and cuda would bring is
# skipped where they are not installed.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="emoji test docs"
for argument in "$@"; do
    case $argument in
        --reference | --notebooks) extras="$extras ${argument#--}" ;;
        --accelerators) set -- "$@" -m accelerators -rs ;;
    esac
done
bash scripts/setup.sh $extras
export PYTHONUTF8=1 # names of files are UTF-8, whatever the locale says
exec .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0 "$@"
