#!/usr/bin/env bash
# One run on as many nodes as SLURM gives, for as many turns as it takes: before the time is up it
# is saved and queued again. From the folder of train.py, in the environment that has torch:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 launch/slurm.sh config/train_gpt2.py
#   sbatch --time=1:00:00 launch/slurm.sh config/quickstart.py --out_dir=out/mine   # one CPU node
#
# What follows the script goes to train.py. The folder of the run is on a disk that all nodes share.

#SBATCH --job-name=flatgpt
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append  # the log of one turn after that of another
#SBATCH --ntasks-per-node=1  # torchrun, which starts a process for each GPU
#SBATCH --requeue  # SLURM itself queues it again after a preemption or when a node fails
#SBATCH --signal=B:USR1@120  # to this script, 120 s before the end: for a step and a save

set -uo pipefail

set -- "--out_dir=out/slurm-$SLURM_JOB_ID" "$@" # unless they name one; the number stays the same
# the folder in the end, as train.py will understand it; what it would refuse ends the job here
settings='import sys, configurator as c; print(c.settings_of("train.py", sys.argv[1:])["out_dir"])'
out_dir=$(python -c "$settings" "$@" | tail -n 1) || exit

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD=$head:$((20000 + SLURM_JOB_ID % 10000)) # two jobs on a node must not meet at one port
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1         # torch 2.13 cannot restart processes without it

# Run on each node. c10d lets the nodes start in any order; is_host says which one they meet at,
# since a node may go by several names. USR1 is none of the signals that torchrun passes on by
# itself, and its 30 s until it kills may be too short for a save.
# shellcheck disable=SC2016 # it is that node's shell that has to fill in these
node='exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$HEAD" \
  --rdzv_conf=is_host="$((SLURM_NODEID == 0))" --max-restarts=3 --shutdown-timeout=100 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@"'

# bash runs a trap only between commands, so the step is in the background, where `wait` can be
# interrupted. The first node to end, well or not, must not take along another that is still saving
# or fills the mirror: srun would count from it, and 0 is without end. Nodes that wait for one that
# is lost end by themselves, when their torchrun has waited ten minutes.
srun --kill-on-bad-exit=0 --wait=0 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  bash -c "$node" torchrun "$@" --auto_resume &
step=$! again=
trap 'again=1; kill -USR1 $step' USR1
# scancel, or a preemption: SLURM knows whether to queue it again. It kills all after KillWait, 30 s
# unless slurm.conf says otherwise, whatever --shutdown-timeout says; a save that takes longer has
# its time after `scancel --batch --signal=TERM JOB`.
trap 'kill -USR1 $step' TERM
wait $step
status=$?
while kill -0 $step 2> /dev/null; do
  wait $step
  status=$?
done

# torchrun fails after a signal even if the run ended well: then what counts is DONE
if [ -z "$again" ]; then exit "$status"; fi
if [ -e "$out_dir/DONE" ]; then exit 0; fi
exec scontrol requeue "$SLURM_JOB_ID"
