#!/usr/bin/env bash
# One diffjax job on all hosts of a TPU pod slice, each of which has the repository in the same place.
#
#     bash scripts/launch/tpu_pod.sh NAME ZONE train --config experiments/emoji.py --workdir /shared/runs/emoji
#
# NAME and ZONE are those of the TPU VM. jax finds the other hosts by itself. The workdir must be on a file system that all
# hosts see (Filestore). DIFFJAX_FOLDER says where the repository is there.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 NAME ZONE COMMAND..., such as: $0 pod us-east5-b train --config FILE --workdir DIR" >&2
    exit 2
fi

name=$1 zone=$2
shift 2
folder=${DIFFJAX_FOLDER:-diffjax}
command="cd $(printf '%q' "$folder") && . .venv/bin/activate && DIFFJAX_MULTIHOST=1 diffjax$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
