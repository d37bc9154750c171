#!/bin/bash
# Set up, then read the code without running it: style by ruff, types by pyright:  bash scripts/lint.sh [--fix]
# --fix first mends and formats what ruff can.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev emoji explain # types of optional packages are read too

if [ "${1:-}" = --fix ]; then
    .venv/bin/ruff check --fix-only
    .venv/bin/ruff format
fi
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/pyright
