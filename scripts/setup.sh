#!/bin/bash
# Make .venv hold the exact versions of requirements.lock:  bash scripts/setup.sh [emoji] [test] [reference]
# Repeat it or interrupt it freely: it goes on where it stopped, and returns at once when there is nothing to do.
#   PYTHON=...              the interpreter to build .venv from (3.11 or newer; default: the newest tested one found)
#   JAX_BUILD=cpu|cuda|tpu  the jax build to install (default: what this machine can use)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/setup-complete
log=$venv/setup.log
oldest_driver=525 # what the CUDA 12 build of jax needs

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

driver_version() {
    cat /sys/module/nvidia/version 2>/dev/null && return
    nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1
}

tpu_chip() { # the PCI ids of TPU v2 to v7
    local vendor
    for vendor in $(grep -lsx 0x1ae0 /sys/bus/pci/devices/*/vendor); do
        grep -qsE '^0x00(27|56|5e|62|63|6f|76)$' "${vendor%vendor}device" && return
    done
    return 1
}

choose_build() { # sets build and why
    local driver
    if [ -n "${JAX_BUILD:-}" ]; then
        build=$JAX_BUILD why="JAX_BUILD asks for it"
    elif tpu_chip; then
        build=tpu why="a TPU is attached"
    elif driver=$(driver_version) && [ -n "$driver" ]; then
        build=cuda why="NVIDIA driver $driver found"
        [ "${driver%%.*}" -ge $oldest_driver ] ||
            build=cpu why="NVIDIA driver $driver is older than $oldest_driver: update it and run this again"
    else
        build=cpu why="no NVIDIA driver and no TPU found"
    fi
    case $build in cpu | cuda | tpu) ;; *) fail "JAX_BUILD is '$build'; it can be cpu, cuda or tpu" ;; esac
}

usable_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        usable_python "$candidate" && printf '%s' "$candidate" && return
    done
    fail "no usable Python 3.11 or newer${PYTHON:+ at $PYTHON}: install one (on Debian and Ubuntu python3 and" \
        "python3-venv), or name one: PYTHON=/path/to/python3 bash scripts/setup.sh"
}

venv_works() {
    ls $venv/lib/python3*/site-packages/pip-*.dist-info/RECORD >/dev/null 2>&1 &&
        $venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    local python
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    rm -rf $venv
    "$python" -m venv $venv
}

# pip writes RECORD last and moves what it replaces to ~name: without the one, or with the other, it was interrupted.
drop_half_installed() {
    local info
    for info in $venv/lib/python3*/site-packages/*.dist-info; do
        [ -f "$info/RECORD" ] || rm -rf "$info"
    done
    rm -rf $venv/lib/python3*/site-packages/~*
}

show_progress() { # reads pip's output: one line rewritten on a terminal, only the milestones elsewhere
    local line commas
    while IFS= read -r line; do
        case $line in
            Installing\ collected*)
                commas=${line//[!,]/}
                say "packages to install: $((${#commas} + 1))" ;;
            Collecting* | *Downloading* | *"Using cached"*)
                [ ! -t 1 ] || printf '\r\033[K%.79s\r' "$line" ;;
        esac
    done
}

install() {
    $venv/bin/python -m pip install --no-input --disable-pip-version-check --constraint requirements.lock "$@" 2>&1 |
        tee $log | show_progress && return
    grep -i '^error' $log >&2 || tail -n 5 $log >&2
    fail "pip stopped (all it said is in $log); with the cause removed, run this again: it goes on from here"
}

choose_build
key="$build $PWD $(cat pyproject.toml requirements.lock | cksum)"
extras="$*"
if [ -f $stamp ]; then
    { read -r old_key && read -r old_extras; } <$stamp
    missing=$(for extra in $extras; do [[ " $old_extras " == *" $extra "* ]] || echo "$extra"; done)
    [ "$old_key" = "$key" ] && [ -z "$missing" ] && exit 0
    extras="$old_extras $missing"
    [ "${old_key%% *}" = "$build" ] || rm -rf $venv
fi

say "jax for ${build}: $why"
venv_works || make_venv
rm -f $stamp
drop_half_installed
list=$(printf '%s\n' $extras $([ "$build" = cpu ] || echo "$build") | sort -u | paste -sd, -)
say "installing diffjax${list:+[$list]} into $venv: one to five minutes the first time"
install --editable ".${list:+[$list]}"
$venv/bin/python -c 'import diffjax, jax, flax, grain, orbax.checkpoint' || fail "remove $venv and run this again"
printf '%s\n' "$key" "$(echo $extras)" >$stamp
say "ready"
