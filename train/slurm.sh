#!/usr/bin/env bash
# A stage on several nodes that share this folder:  sbatch --nodes 2 --gpus-per-node 4 train/slurm.sh 2a fsdp [--key=value ...]
#SBATCH --ntasks-per-node=1
set -euo pipefail
usage='usage: sbatch --nodes 2 --gpus-per-node 4 train/slurm.sh RECIPE PROFILE [--key=value ...]'
: "${2:?$usage}" "${SLURM_JOB_NODELIST:?$usage}"
export AXOLOTL_DO_NOT_TRACK=1 HF_HUB_OFFLINE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
program='import sys; from train.stage import *; run(lambda: print(*as_arguments(load_profile(*sys.argv[1:])[1]), sep="\n"))'
overrides=$(.venv/bin/python -c "$program" "$2" "$1") # a profile that does not exist ends the job
mapfile -t overrides < <(printf %s "$overrides")
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" -m axolotl.cli.train "recipes/$1.yml" "${overrides[@]}" "${@:3}"
