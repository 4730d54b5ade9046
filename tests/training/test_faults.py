"""Runs that are killed, run out of disk or memory, or are damaged on purpose, many times.

$ python -m pytest -m faults                        # some minutes
$ FLATGPT_FAULTS=25 python -m pytest -m faults      # a quarter of the repetitions
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import MODERN, ROOT, SHARE, hashes, metrics, steps

from flatgpt import errors, files
from flatgpt.checkpoint import save
from flatgpt.checkpoint.load import find_checkpoint
from flatgpt.training import metrics as metrics_module

pytestmark = pytest.mark.faults
posix = pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
# dropout is on, and nothing depends on max_iters, so that a run can be ended anywhere
FIXED = ('--dropout=0.2', '--lr_decay_iters=1000')


def times(count):
    return range(max(1, round(count * SHARE)))


@pytest.fixture
def launch(environment, tiny):
    """Start train.py, as a group of its own -> the process; all are gone when the test ends."""
    started = []

    def start(*args, python=()):
        command = [sys.executable, *python, str(ROOT / 'train.py'), str(tiny), *map(str, args)]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(process, number):
    for line in process.stdout:
        if line.startswith(f'step {number}/'):
            return
    pytest.fail(f'no step {number}: {process.stderr.read()}')


# -----------------------------------------------------------------------------
# stopped and killed


@pytest.fixture(scope='module')
def whole(run_here, tmp_path_factory):
    """The run of 21 steps that nothing interrupts."""
    out_dir = tmp_path_factory.mktemp('whole') / 'run'
    run_here(f'--out_dir={out_dir}', '--max_iters=21', '--eval_interval=7', *FIXED)
    return out_dir


@pytest.mark.parametrize('at', range(1, 21))
def test_a_run_stopped_and_resumed_at_any_step_equals_an_uninterrupted_one(
    run_here, whole, tmp_path, monkeypatch, at
):
    log = metrics_module.Tracker.log

    def log_and_stop(self, step, **values):
        log(self, step, **values)
        if step == at and 'loss' in values:
            signal.raise_signal(signal.SIGTERM)

    args = (f'--out_dir={tmp_path}', '--max_iters=21', '--eval_interval=7', *FIXED)
    with monkeypatch.context() as patch:
        patch.setattr(metrics_module.Tracker, 'log', log_and_stop)
        assert run_here(*args) == 128 + signal.SIGTERM
    assert steps(tmp_path)[-1] >= at
    assert run_here(*args, '--init_from=resume') == 0
    assert hashes(find_checkpoint(tmp_path, 'last')) == hashes(find_checkpoint(whole, 'last'))
    for key in ('loss', 'val_loss'):
        assert metrics(tmp_path, key) == metrics(whole, key)


LONG = ('--max_iters=120', '--eval_interval=1000', '--save_interval=5', *FIXED)


@pytest.fixture(scope='module')
def long(run_here, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('long') / 'run'
    started = time.perf_counter()
    run_here(f'--out_dir={out_dir}', *LONG)
    return out_dir, time.perf_counter() - started


@posix
@pytest.mark.parametrize('number', times(100))
def test_a_kill_at_any_time_loses_at_most_five_steps(run_here, ranks, long, tmp_path, number):
    reference, duration = long
    (process,) = ranks(0, f'--out_dir={tmp_path}', *LONG)
    process.says('step 6/')
    time.sleep(np.random.default_rng(number).uniform(0, 0.8 * duration))
    process.send(signal.SIGKILL)
    process.end()
    reached = max(line['step'] for line in metrics_module.read_metrics(tmp_path))
    saved = steps(tmp_path)[-1]
    assert saved >= reached - 5
    assert run_here(f'--out_dir={tmp_path}', *LONG, '--init_from=resume') == 0
    assert hashes(find_checkpoint(tmp_path, 'last')) == hashes(find_checkpoint(reference, 'last'))
    assert metrics(tmp_path) == metrics(reference)


SAVES = """
import json, os, signal, sys
import torch
from flatgpt.checkpoint import load
from flatgpt.checkpoint.save import save_checkpoint
from model import GPT, GPTConfig

out_dir, number = sys.argv[1], 0
torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16))
optimizer = torch.optim.AdamW(model.parameters())
events, kill_at, killing = 0, None, False

def hook(event, args):
    global events
    if killing and (event == 'open' or event.startswith(('os.', 'shutil.'))):
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

def step(number):
    for parameter in model.parameters():
        parameter.data += 0.01
    state = {'step': number, 'val_loss': 1.0 + number, 'evaluated': True}
    return save_checkpoint(out_dir, model, [optimizer], None, state)

sys.addaudithook(hook)
for number in (1, 2, 3):
    step(number)
died, stages = True, []
while died and number < 999:
    kill_at = len(stages) + 1
    number += 1
    child = os.fork()
    if child == 0:
        killing = True
        step(number)
        os._exit(0)
    died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    last = load.find_checkpoint(out_dir, 'last')
    best = load.find_checkpoint(out_dir, 'best')
    model_, _, state = load.load_checkpoint(last)
    whole = all(p.isfinite().all() for p in model_.parameters())
    stages.append([number, state['step'], load.step_of(best), bool(whole)])
    number += 1
    step(number)
    folder = os.path.join(out_dir, 'checkpoints')
    stages[-1].append(sorted(os.listdir(folder)))
print(json.dumps(stages))
"""


@posix
def test_a_kill_at_any_file_operation_of_a_save_keeps_the_previous_checkpoint(
    tmp_path, environment
):
    command = [sys.executable, '-W', 'ignore', '-c', SAVES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''  # no checkpoint was ever found damaged
    stages = json.loads(done.stdout)
    assert len(stages) > 15  # as many places to be killed at
    reached = [loaded - number for number, loaded, *_ in stages]
    assert set(reached) == {-1, 0}
    for number, loaded, best, whole, left in stages:
        assert whole
        assert best == 1
        assert left == [f'step-{n:08d}' for n in (1, loaded, number + 1)]


@posix
@pytest.mark.parametrize(
    'what', ['background', 'again', 'part-0', 'part-1', 'mirror', 'mirror-again']
)
def test_a_kill_at_any_file_operation_leaves_a_complete_last_checkpoint(
    tmp_path, environment, what
):
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tests' / 'killed.py'), what, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''  # none was ever found damaged
    stages = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(stages) > (5 if what == 'part-1' else 15)  # as many places to be killed at
    again = what.endswith('again')  # a step that is there already is never lost
    for number, reached, left in stages[:-1]:
        assert reached in ((number,) if again else (number - 1, number))
        assert [name[:13] for name in left] == [f'step-{n:08d}' for n in (1, reached, number + 1)]
    assert {reached - number for number, reached, _ in stages} == ({0} if again else {-1, 0})


# -----------------------------------------------------------------------------
# for a long time


@posix
def test_a_supervised_run_that_is_killed_repeatedly_has_the_same_result(ranks, tmp_path):
    """What SLURM or a loop in a shell does: start with --auto_resume until there is DONE."""
    steps_in_all, chance = max(200, round(2000 * SHARE)), np.random.default_rng(0)
    args = (f'--max_iters={steps_in_all}', '--eval_interval=50', '--save_interval=5')
    args += ('--lr_decay_iters=5000', '--dropout=0.2', '--hang_timeout=3', '--auto_resume')
    args += ('--always_save_checkpoint=False',)
    starts = reached = 0
    while not (tmp_path / 'many' / 'DONE').exists():
        crew = ranks(2, f'--out_dir={tmp_path}/many', *args, f'--checkpoint_mirror={tmp_path}/copy')
        aim, starts = reached + round(chance.uniform(50, 150)), starts + 1
        if aim < steps_in_all:
            crew[0].says(f'step {aim}/')
            crew[chance.integers(2)].send(signal.SIGKILL)
            statuses = crew.end(30)
            assert -signal.SIGKILL in statuses
            assert 'Traceback' not in crew.err
            reached = max(metrics(tmp_path / 'many'))
            assert steps(tmp_path / 'many')[-1] >= reached - 5
        else:
            assert crew.end() == [0, 0], crew.err
    assert starts > steps_in_all / 150
    crew = ranks(2, f'--out_dir={tmp_path}/one', *args)
    assert crew.end() == [0, 0], crew.err
    assert hashes(find_checkpoint(tmp_path / 'many', 'last')) == hashes(
        find_checkpoint(tmp_path / 'one', 'last')
    )
    for key in ('loss', 'val_loss'):
        assert metrics(tmp_path / 'many', key) == metrics(tmp_path / 'one', key)
    assert hashes(find_checkpoint(tmp_path / 'copy', 'last')) == hashes(
        find_checkpoint(tmp_path / 'one', 'last')
    )
    assert steps(tmp_path / 'copy') == steps(tmp_path / 'one')


def megabytes(pid, key):
    """VmRSS, what a process holds now, or VmHWM, the most it held."""
    with open(f'/proc/{pid}/status', encoding='utf-8') as file:
        return int(re.search(rf'{key}:\s+(\d+) kB', file.read())[1]) / 1024


linux = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')


@linux
@pytest.mark.parametrize('world', [0, 2])
def test_memory_does_not_grow(ranks, tmp_path, world):
    """With evaluations, checkpoints in the background, a mirror; sharded if there are two."""
    args = ('--eval_interval=20', '--save_interval=5', '--max_iters=100000', '--n_embd=64')
    args += (f'--checkpoint_mirror={tmp_path}/copy', '--always_save_checkpoint=False')
    args += (f'--out_dir={tmp_path}/run', f'--shard={world > 0}')
    crew = ranks(
        world, *args, before='from flatgpt.checkpoint import save; save.SYNC_SAVE_BYTES = 0'
    )
    last, held = max(300, round(2000 * SHARE)), []
    for step in (last // 3, last):
        crew[0].says(f'step {step}/', 300)
        held.append([megabytes(rank.pid, 'VmRSS') for rank in crew])
    for before, after in zip(*held, strict=True):
        assert after < before + 8, held
    for rank in crew:
        rank.send(signal.SIGTERM)
    assert set(crew.end()) == {128 + signal.SIGTERM}


PEAK = """
import atexit, runpy, sys
def tell():
    with open('/proc/self/status') as file:
        print(*[line for line in file if line.startswith('VmHWM')])
atexit.register(tell)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@linux
def test_resuming_takes_no_more_memory_than_training(script, tiny, tmp_path):
    """25M parameters: 100 MB, and another 200 MB of the optimizer's state."""
    args = ('--n_layer=8', '--n_embd=512', '--n_head=8', '--eval_interval=100', '--eval_iters=1')
    args += ('--save_interval=2', '--batch_size=1', '--gradient_accumulation_steps=1')
    peaks = []
    for name, last, flag in (('a', 4, 'scratch'), ('b', 2, 'scratch'), ('b', 4, 'resume')):
        run = (f'--out_dir={tmp_path}/{name}', f'--max_iters={last}', f'--init_from={flag}')
        done = script('train.py', tiny, *args, *run, '--lr_decay_iters=9', python=('-c', PEAK))
        assert done.returncode == 0, done.stderr
        peaks.append(int(re.search(r'VmHWM:\s+(\d+) kB', done.stdout)[1]) / 1024)
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )
    whole, _, resumed = peaks
    assert whole > 700  # so that it is the model that is measured
    assert resumed < 1.05 * whole, peaks


# -----------------------------------------------------------------------------
# a disk that is full


@pytest.fixture
def disk(tmp_path):
    """A file system of six megabytes."""
    mount = tmp_path / 'disk'
    mount.mkdir()
    if not shutil.which('mount') or not hasattr(os, 'geteuid') or os.geteuid() != 0:
        pytest.skip('mounting a small file system needs root')
    command = ['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    yield mount
    subprocess.run(['umount', str(mount)], check=True)


LARGER = ('--n_embd=64', '--n_layer=2', '--eval_interval=1', '--max_iters=9')  # 1.2 MB each


def test_a_disk_that_fills_up_during_a_save_keeps_the_previous_checkpoint(
    run_here, disk, monkeypatch, capsys
):
    monkeypatch.setattr(save, 'check_free_space', lambda folder, tensors: None)
    with pytest.raises(errors.UserError, match='free disk space'):
        run_here(f'--out_dir={disk}/run', *LARGER)
    assert 'No space left' in capsys.readouterr().out
    saved = steps(disk / 'run')
    assert saved == list(range(1, len(saved) + 1))
    names = sorted(path.name for path in (disk / 'run' / 'checkpoints').iterdir())
    assert names == [f'step-{step:08d}' for step in saved]  # and nothing half-written
    assert list(metrics(disk / 'run')) == list(range(1, 10))
    assert find_checkpoint(disk / 'run', 'last').name == names[-1]


def test_a_completely_full_disk_does_not_stop_training(run_here, disk, monkeypatch, capsys):
    log = metrics_module.Tracker.log

    def fill_up(self, step, **values):
        if step == 2:
            with contextlib.suppress(OSError), (disk / 'filler').open('wb', buffering=0) as file:
                while file.write(b'x' * 4096):
                    pass
        log(self, step, **values)

    monkeypatch.setattr(metrics_module.Tracker, 'log', fill_up)
    args = (f'--out_dir={disk}/run', '--eval_interval=1', '--max_iters=80', '--log_interval=1')
    with pytest.raises(errors.UserError, match='free disk space'):
        run_here(*args, '--save_interval=1')
    assert 'step 80/80' in capsys.readouterr().out
    monkeypatch.undo()
    (disk / 'filler').unlink()
    find_checkpoint(disk / 'run', 'last')
    monkeypatch.setattr(save, 'check_free_space', lambda folder, tensors: None)
    assert run_here(*args, '--init_from=resume', '--max_iters=6') == 0


def test_a_full_mirror_does_not_stop_training(run_here, disk, tmp_path, capsys):
    mirror = f'--checkpoint_mirror={disk}/mirror'
    assert run_here(f'--out_dir={tmp_path}/run', mirror, *LARGER) == 0
    assert 'No space left' in capsys.readouterr().out
    assert steps(tmp_path / 'run') == list(range(1, 10))
    shutil.rmtree(tmp_path / 'run')
    assert run_here(f'--out_dir={tmp_path}/run', mirror, *LARGER, '--auto_resume') == 0
    assert list(metrics(tmp_path / 'run')) == list(range(1, 10))


def test_a_mirror_that_becomes_read_only_does_not_stop_training(
    run_here, disk, tmp_path, monkeypatch, capsys
):
    log = metrics_module.Tracker.log

    def change(self, step, **values):
        if step == 5 and 'loss' in values:
            remount = ['mount', '-o', 'remount,ro', str(disk)]
            while (
                steps(disk / 'mirror')[-1:] != [4]
                # fails while a file is still being written there
                or subprocess.run(remount, capture_output=True).returncode
            ):
                time.sleep(0.01)
        log(self, step, **values)

    monkeypatch.setattr(metrics_module.Tracker, 'log', change)
    args = (f'--out_dir={tmp_path}/run', f'--checkpoint_mirror={disk}/mirror')
    assert run_here(*args, '--max_iters=8', '--eval_interval=2') == 0
    assert 'Read-only file system' in capsys.readouterr().out
    assert steps(tmp_path / 'run') == [2, 4, 6, 8]
    assert steps(disk / 'mirror') == [2, 4]
    with pytest.raises(errors.UserError, match='cannot be written: Read-only file system'):
        run_here(*args, '--init_from=resume', '--max_iters=9', '--eval_interval=2')


# -----------------------------------------------------------------------------
# several processes


@posix
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_a_signal_through_torchrun_loses_no_step(script, launch, tiny, tmp_path, name):
    listen = '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1'
    args = ('--eval_interval=100000', *FIXED)
    process = launch(
        f'--out_dir={tmp_path}/a', '--max_iters=100000', *args, python=(*TORCHRUN, listen)
    )
    wait_for_step(process, 3)
    process.send_signal(getattr(signal, name))
    out, error = process.communicate()
    assert 'stopped at step' in out, error
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no one is left behind
    (step,) = steps(tmp_path / 'a')
    assert list(metrics(tmp_path / 'a'))[-1] == step
    assert not (tmp_path / 'a' / 'DONE').exists()
    args = (*args, f'--max_iters={step + 3}')
    resume = (f'--out_dir={tmp_path}/a', '--init_from=resume')
    for out_dir in (resume, (f'--out_dir={tmp_path}/b',)):
        done = script('train.py', tiny, *out_dir, *args, python=TORCHRUN)
        assert done.returncode == 0, done.stderr
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )


SLOW = """
import time, torch
from model import GPT
forward = GPT.forward
def slow(self, *args, **kwargs):
    if not torch.is_grad_enabled():
        print('evaluating', flush=True)
        time.sleep(0.1)
    return forward(self, *args, **kwargs)
GPT.forward = slow
"""


@posix
@pytest.mark.parametrize('shard', [False, True])
def test_a_signal_to_one_rank_stops_the_evaluation_on_all(ranks, tmp_path, shard):
    """Which would take half a minute; what was trained before it is saved."""
    args = ('--eval_interval=3', '--eval_iters=4', '--eval_train=False', f'--shard={shard}')
    crew = ranks(2, f'--out_dir={tmp_path}', '--max_iters=1000', *args, before=SLOW)
    crew[0].says('step 3/')
    crew[1].send(signal.SIGTERM)
    assert crew.end() == [128 + signal.SIGTERM] * 2, crew.err
    assert 'stopped at step 3' in crew.out
    assert steps(tmp_path) == [3]
    assert list(metrics(tmp_path, 'val_loss')) == [0]


@posix
def test_if_torchrun_is_killed_the_ranks_save_and_exit(launch, tmp_path):
    process = launch(
        f'--out_dir={tmp_path}/a', '--max_iters=1000000', '--eval_interval=1000000', python=TORCHRUN
    )
    wait_for_step(process, 8)
    process.kill()
    out, _ = process.communicate(timeout=20)  # whose other end the ranks hold
    assert 'stopped at step' in out
    assert list(metrics(tmp_path / 'a'))[-1:] == steps(tmp_path / 'a')


@posix
def test_a_killed_rank_is_restarted_and_the_run_has_the_same_result(
    script, launch, tiny, tmp_path, environment, monkeypatch
):
    args = ('--max_iters=300', '--eval_interval=100000', '--save_interval=5', *FIXED)
    args = (*args, '--auto_resume')
    # torch 2.13 otherwise lets the new processes look for the old ones
    monkeypatch.setitem(environment, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')
    process = launch(f'--out_dir={tmp_path}/a', *args, python=(*TORCHRUN, '--max-restarts=1'))
    wait_for_step(process, 8)
    children = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 0, error
    done = script('train.py', tiny, f'--out_dir={tmp_path}/b', *args, python=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )
    assert list(metrics(tmp_path / 'a')) == list(range(1, 301))


NAN = """
import model
forward = model.GPT.forward
calls = 0
def spoilt(self, *args, **options):
    global calls
    logits, loss, *rest = forward(self, *args, **options)
    if self.training:
        calls += 1
        loss = loss * float('nan') if calls in ({calls}) else loss
    return (logits, loss, *rest)
model.GPT.forward = spoilt
"""


@pytest.mark.parametrize('shard', [False, True])
def test_a_nan_on_one_rank_skips_the_update_on_all(ranks, tmp_path, shard):
    """Each rank computes one micro-batch a step, so call 5 is of step 5."""
    args = ('--max_iters=9', '--save_interval=1', '--eval_interval=9', f'--shard={shard}')
    ends = []
    for name, spoilt in (('one', [1]), ('both', [0, 1])):
        before = {rank: NAN.format(calls='5,') for rank in spoilt}
        crew = ranks(2, f'--out_dir={tmp_path}/{name}', *args, before=lambda r: before.get(r, ''))  # noqa: B023
        assert crew.end() == [0, 0], crew.err
        assert crew.out.count('update skipped') == 1
        path = find_checkpoint(tmp_path / name, 'last')
        names = sorted(file.name for file in path.glob('*.safetensors'))
        ends.append([files.sha256(path / name) for name in names])
    assert ends[0] == ends[1]
    before = NAN.format(calls='4, 5, 6')
    crew = ranks(2, f'--out_dir={tmp_path}/three', *args, before=lambda r: before if r else '')
    assert crew.end() == [2, 2]
    assert crew.err.count('not finite in three steps in a row, up to step 6') == 2
    assert 'Traceback' not in crew.err
    assert find_checkpoint(tmp_path / 'three', 'last').name == 'step-00000003'


@pytest.mark.parametrize('number', times(200))
def test_two_processes_exit_cleanly_every_time(ranks, tmp_path, number):
    crew = ranks(2, f'--out_dir={tmp_path}', f'--shard={number % 4 == 3}')
    assert crew.end() == [0, 0], crew.err
    assert crew.err == ''
    assert (tmp_path / 'DONE').exists()


def test_a_batch_that_cannot_be_divided_among_the_processes_is_one_line(script, tiny, tmp_path):
    args = ('--batch_size=3', '--gradient_accumulation_steps=1')
    done = script('train.py', tiny, f'--out_dir={tmp_path}/a', *args, python=TORCHRUN)
    assert done.returncode != 0
    line = r'gradient_accumulation_steps \* batch_size is 3 sequences'
    assert re.search(rf'^error( \(rank 1\))?: {line}', done.stderr, re.M)
    assert 'use --gradient_accumulation_steps=' in done.stderr
    assert not (tmp_path / 'a').exists()


@posix
def test_a_second_run_in_the_same_directory_is_refused_and_the_first_continues(
    script, launch, tiny, tmp_path
):
    process = launch(f'--out_dir={tmp_path}', '--max_iters=100000', '--save_interval=1', *FIXED)
    wait_for_step(process, 3)
    for args in ((), ('--init_from=resume',), ('--overwrite',), ('--auto_resume',)):
        done = script('train.py', tiny, f'--out_dir={tmp_path}', *args)
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.count('\n') == 1
        assert f'{tmp_path}: another run is writing here' in done.stderr
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert 'stopped at step' in out


# -----------------------------------------------------------------------------
# compilation


def compiled(script, tiny, tmp_path, *settings, **env):
    env = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'), **env}
    return script('train.py', tiny, f'--out_dir={tmp_path}/a', '--compile=True', *settings, env=env)


def test_without_a_c_compiler_training_is_not_compiled(script, tiny, tmp_path):
    done = compiled(script, tiny, tmp_path, CXX='/bin/false', CC='/bin/false')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('training without torch.compile, which failed') == 1
    assert (tmp_path / 'a' / 'DONE').exists()


def test_a_sharded_model_that_cannot_be_compiled_is_trained_uncompiled(script, tiny, tmp_path):
    env = {
        'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'),
        'CXX': '/bin/false',
        'CC': '/bin/false',
    }
    for name in ('True', 'False'):
        args = (f'--out_dir={tmp_path}/{name}', '--shard', f'--compile={name}', *FIXED)
        done = script('train.py', tiny, *args, python=TORCHRUN, env=env)
        assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / 'True') == metrics(tmp_path / 'False')


SHORT = ('--short_block_size=4', '--short_iters=2')


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler here')
@pytest.mark.parametrize('settings', [(), (*MODERN, *SHORT)], ids=['gpt2', 'modern'])
def test_a_compiled_model_trains_like_an_uncompiled_one(script, run_here, tiny, tmp_path, settings):
    done = compiled(script, tiny, tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    assert 'which failed' not in done.stdout
    run_here(f'--out_dir={tmp_path}/b', *settings)
    losses = [list(metrics(tmp_path / name).values()) for name in 'ab']
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if settings else 1e-4)
