#!/usr/bin/env bash
# moesaic on Slurm: one Ray node per Slurm node, the recipe on the first of them.
#
#   sbatch clusters/slurm.sh recipes/smollm2.yaml --output runs/smollm2
#   sbatch --nodes=4 --gpus-per-node=8 clusters/slurm.sh recipes/mine.yaml
#
# Submit from a checkout on a file system that all nodes share, after `make install` there. Recipe,
# texts, store and --output must lie on shared file systems too; the model should (nodes that do not
# have it fetch it from the first). A job that was killed or ran out of time goes on where it stopped
# when the same command is submitted again. One that ended by SIGKILL leaves a file
# .moesaic-job-ID-* in the checkout; remove it.
#
# A node that fails is survived, except for the first: Ray and the run end with that one, but Slurm
# keeps the others for the job until its time is over. Then: scancel JOBID, and submit again.
#
#SBATCH --job-name=moesaic
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Without it one node that fails ends the whole job.
#SBATCH --no-kill
# Whole nodes: Ray takes a node for its own and stops when another Ray runs there.
#SBATCH --exclusive
# With GPUs: add `#SBATCH --gpus-per-node=N` here or on the command line.

set -euo pipefail

if (($# < 1)); then
  echo "usage: sbatch clusters/slurm.sh RECIPE [options of moesaic run]" >&2
  exit 2
fi

checkout=$SLURM_SUBMIT_DIR
if [[ ! -x $checkout/.venv/bin/moesaic ]]; then
  echo "$checkout/.venv/bin/moesaic is missing: run make install there, and submit from there" >&2
  exit 2
fi
export PATH="$checkout/.venv/bin:$PATH"

# Ray listens on the cluster's network: only who knows this job's token is let in. It travels in
# the environment, which other users cannot read, and never stands on a command line.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# /tmp/ray may belong to somebody else; a short path, because Ray keeps sockets there.
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
# The head's first address that is not the loopback. On machines with several networks, set
# HEAD_ADDRESS to the one that Ray shall use.
addresses=${HEAD_ADDRESS:-$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses)}
read -r head_ip _ <<<"$addresses"
# Below the ports that Linux hands out by itself, above those of Ray's workers.
address=$head_ip:$((20000 + SLURM_JOB_ID % 10000))

# `ray symmetric-run` exits 0 even where its head node did not start, and srun fails where any node
# did. This file tells how the run went: empty, `begun`, or its exit status.
status=$(mktemp "$checkout/.moesaic-job-$SLURM_JOB_ID-XXXXXX")
trap 'rm -f "$status"' EXIT

everywhere=(srun --no-kill "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
step=0
"${everywhere[@]}" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
  -- bash -c '
    trap : TERM  # who is told to stop is moesaic; this shell waits for what it says
    file=$1 RAY_ADDRESS=$2
    export RAY_ADDRESS
    shift 2
    echo begun > "$file"
    ended=0
    moesaic run "$@" || ended=$?
    echo "$ended" > "$file"
    exit "$ended"
  ' moesaic "$status" "$address" "$@" || step=$?

ended=$(<"$status")
if [[ -z $ended ]]; then
  echo "Ray did not start on $head ($address): see the messages above" >&2
  exit $((step ? step : 1))
elif [[ $ended == begun ]]; then
  echo "the run on $head was ended from outside; finished work is kept: submit the same command again" >&2
  exit $((step ? step : 1))
elif ((ended)); then
  exit "$ended" # Ray's logs stay where they are
fi

if ((step)); then
  echo "the run is done; on a node that failed $RAY_TMPDIR stays" >&2
fi
# Where the job has lost a node, srun cannot have as many as there were.
timeout 120 "${everywhere[@]}" rm -rf "$RAY_TMPDIR" || echo "$RAY_TMPDIR stays on the nodes" >&2
