#!/bin/bash
# One training or measurement on several nodes, for as many time limits as it takes:
#
#     sbatch examples/slurm.sh models.train --preset paper-cifar100 --window 5 --out runs/csan5.pt
#     sbatch --nodes 8 examples/slurm.sh analysis.landscape --ckpt runs/csan5.pt --points 51
#
# Everything goes on where it was stopped, so the job is put back into the queue when its time is
# up or a node fails. Folders of checkpoints and results must be the same ones on all nodes.
#SBATCH --job-name=locality
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120

set -u

requeue() {
    echo "time is almost up: stopping, and back into the queue"
    scancel --signal=TERM "$SLURM_JOB_ID.$step" 2>/dev/null # progress is saved
    wait
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_PER_NODE))
step=0
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$SLURM_GPUS_PER_NODE" \
    --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$host:$((20000 + SLURM_JOB_ID % 10000))" \
    -m "$@" &
wait $!
