#!/usr/bin/env bash
# One run on all nodes of a SLURM job, in as many jobs as it takes: before the time limit, the run is saved
# and the job requeued. From the folder of train.py, in the environment that has torch:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=4:00:00 launch/slurm.sh config/train_gpt2.py
#   sbatch --time=1:00:00 launch/slurm.sh config/quickstart.py --out_dir=out/mine   # one CPU node
#
# Arguments after the script are passed to train.py. All nodes must share the disk of the run directory.

#SBATCH --job-name=flatgpt
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append  # append after a requeue
#SBATCH --ntasks-per-node=1  # one torchrun, which starts a process per GPU
#SBATCH --requeue  # SLURM itself requeues after a preemption or a node failure
#SBATCH --signal=B:USR1@120  # to this script, 120 s before the time limit: time for one step and a save

set -uo pipefail

set -- "--out_dir=out/slurm-$SLURM_JOB_ID" "$@" # the default; the job id survives a requeue
# the run directory that train.py will use; wrong settings end the job here
settings='import sys, configurator as c; print(c.settings_of("train.py", sys.argv[1:])["out_dir"])'
out_dir=$(python -c "$settings" "$@" | tail -n 1) || exit

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD=$head:$((20000 + SLURM_JOB_ID % 10000)) # jobs on the same node need different ports
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1         # torch 2.13 cannot restart processes without it

# Runs on each node. c10d lets the nodes start in any order; is_host selects the rendezvous host, since
# a node may have several names. torchrun does not forward USR1 by default, and its 30 s before it
# kills the processes may be too short for a save.
# shellcheck disable=SC2016 # expanded by the shell of each node
node='exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$HEAD" \
  --rdzv_conf=is_host="$((SLURM_NODEID == 0))" --max-restarts=3 --shutdown-timeout=100 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@"'

# bash runs a trap only between commands, so srun runs in the background, where `wait` can be
# interrupted. When one node exits, srun must not kill the others, which may still be saving or copying
# to the mirror: --wait=0 means no limit. If a node is lost, torchrun on the others gives up after ten
# minutes.
srun --kill-on-bad-exit=0 --wait=0 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  bash -c "$node" torchrun "$@" --auto_resume &
step=$! again=
trap 'again=1; kill -USR1 $step' USR1
# scancel or a preemption: SLURM decides whether to requeue. It kills everything after KillWait (30 s
# by default), whatever --shutdown-timeout is. If a save takes longer, cancel with
# `scancel --batch --signal=TERM JOB`, which has no such limit.
trap 'kill -USR1 $step' TERM
wait $step
status=$?
while kill -0 $step 2> /dev/null; do
  wait $step
  status=$?
done

# after a signal torchrun fails even if the run is finished, so look for DONE
if [ -z "$again" ]; then exit "$status"; fi
if [ -e "$out_dir/DONE" ]; then exit 0; fi
exec scontrol requeue "$SLURM_JOB_ID"
