#!/usr/bin/env bash
# One diffjax job on several hosts of a Slurm cluster, one process a host, with all of its GPUs.
#
#     sbatch --nodes=4 scripts/launch/slurm.sh train --config experiments/emoji.py --workdir /shared/runs/emoji \
#         --config.train.shard=fsdp --config.train.replicas=4
#
# The folder of the repository (or of `diffjax init`) and the workdir must be on a file system that all hosts see. Slurm
# sends SIGTERM two minutes before the time is up: the job then saves, ends, and is queued again, going on from there.
#SBATCH --job-name=diffjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -euo pipefail

if [ $# -eq 0 ]; then
    echo "give the command: sbatch --nodes=N $0 train --config FILE --workdir DIR" >&2
    exit 2
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 20000))"
export JAX_NUM_PROCESSES=$SLURM_NNODES

status=0
# shellcheck disable=SC2016  # each host fills in its own number
srun --kill-on-bad-exit=0 bash -c 'JAX_PROCESS_ID=$SLURM_NODEID exec diffjax "$@"' diffjax "$@" || status=$?

# 143: stopped by SIGTERM with a checkpoint; 1 and above 128: a host was lost. 2 is an error that comes again.
if [ "$status" -eq 1 ] || [ "$status" -gt 128 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
