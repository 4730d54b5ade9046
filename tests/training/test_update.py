"""How an update is launched: its result is read later, and a CUDA graph may replay it.

The streams, the events and the capture of a GPU are replaced by doubles. tests/test_gpu.py has the
real ones.
"""

import contextlib
import math
import signal

import pytest
import torch
from conftest import hashes, metrics, steps

from flatgpt.checkpoint.load import list_checkpoints, load_model
from flatgpt.runtime import Runtime
from flatgpt.training import metrics as metrics_module
from flatgpt.training import update as update_module
from flatgpt.training.compiling import ComputeWorkload
from flatgpt.training.optim import set_lr
from flatgpt.training.update import EAGER_UPDATES, GraphedUpdate, should_capture
from model import GPT

MODERN = ['--arch=modern', '--optimizer=muon']


@pytest.fixture
def one_in_flight(monkeypatch):
    monkeypatch.setattr(Runtime, 'max_in_flight', 1)


# -----------------------------------------------------------------------------
# the result is read one update late


@pytest.mark.parametrize('args', [[], MODERN, ['--dropout=0.1', '--save_interval=3']])
def test_a_run_is_the_same_whether_its_losses_are_read_at_once_or_later(
    run_here, tmp_path, monkeypatch, args
):
    args = [*args, '--max_iters=8', '--eval_interval=4', '--dtype=float32']
    for in_flight, name in enumerate(['now', 'later']):
        monkeypatch.setattr(Runtime, 'max_in_flight', in_flight)
        assert run_here(f'--out_dir={tmp_path / name}', *args) == 0
    now, later = (list_checkpoints(tmp_path / name) for name in ('now', 'later'))
    assert steps(tmp_path / 'now') == steps(tmp_path / 'later')
    assert [hashes(path) for path in now] == [hashes(path) for path in later]
    for key in ('loss', 'grad_norm', 'lr', 'val_loss'):
        assert metrics(tmp_path / 'now', key) == metrics(tmp_path / 'later', key)


def spoil_update(monkeypatch, number):
    """Make the training loss of one update NaN."""
    seed, forward, begun = Runtime.seed, GPT.forward, []

    def begin(self, *args):
        begun.append(args)
        seed(self, *args)

    def spoil(self, *args, **options):
        logits, loss = forward(self, *args, **options)
        return logits, loss * math.nan if self.training and len(begun) == number else loss

    monkeypatch.setattr(Runtime, 'seed', begin)
    monkeypatch.setattr(GPT, 'forward', spoil)


@pytest.mark.usefixtures('one_in_flight')
def test_a_bad_update_just_before_a_checkpoint_is_skipped_and_reported_before_it_is_saved(
    run_here, tmp_path, monkeypatch, capsys
):
    spoil_update(monkeypatch, 4)
    args = ('--eval_interval=100', '--save_interval=2', '--max_iters=7')
    assert run_here(f'--out_dir={tmp_path}', *args) == 0
    assert 'step 4: loss nan' in capsys.readouterr().out
    assert 4 not in steps(tmp_path)  # not saved, since its last update was skipped
    model = load_model(tmp_path, 'last')[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert metrics(tmp_path, 'skipped')[4] == 1
    assert metrics(tmp_path, 'skipped')[5] == 0


@pytest.mark.usefixtures('one_in_flight')
def test_a_signal_saves_every_update_that_was_launched(run_here, tmp_path, monkeypatch):
    log = metrics_module.Tracker.log

    def stop(self, step, **values):
        log(self, step, **values)
        if step == 3 and 'loss' in values:
            signal.raise_signal(signal.SIGTERM)

    args = ('--eval_interval=100', '--max_iters=10', '--dtype=float32')
    with monkeypatch.context() as patch:
        patch.setattr(metrics_module.Tracker, 'log', stop)
        assert run_here(f'--out_dir={tmp_path / "halves"}', *args) == 128 + signal.SIGTERM
    assert steps(tmp_path / 'halves') == [4]  # one was in flight
    assert run_here(f'--out_dir={tmp_path / "halves"}', *args, '--init_from=resume') == 0
    assert run_here(f'--out_dir={tmp_path / "whole"}', *args) == 0
    last = [list_checkpoints(tmp_path / name)[-1] for name in ('halves', 'whole')]
    assert hashes(last[0]) == hashes(last[1])


# -----------------------------------------------------------------------------
# a graph


class Recorder:
    """A double of capture(): a replay calls the function again and copies its result."""

    def __init__(self, error=None):
        self.captured, self.replayed, self.error = 0, 0, error

    def capture(self, function, device, pool=None, warm_up=True):
        assert not warm_up
        if self.error:
            raise self.error
        self.captured += 1
        result = torch.zeros(1)

        def replay():
            self.replayed += 1
            result.copy_(function())

        return replay, result


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(update_module, 'capture', recorder.capture)
    monkeypatch.setattr(update_module, 'capture_stream', lambda device: Stream())
    monkeypatch.setattr(torch.cuda, 'current_stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
    return recorder


def batch(value, width=4):
    return [({'x': torch.full((2, width), value), 'y': torch.full((2, width), 1)}, 1.0)]


def total(micro_batches, signals):
    return torch.stack([b['x'].sum() / divisor for b, divisor in micro_batches]).sum()[None]


def test_a_graph_is_captured_after_the_eager_updates_and_then_replayed(recorder):
    update = GraphedUpdate(total, list, print)
    results = [update(batch(number), torch.zeros(0)).item() for number in range(8)]
    assert results == [8 * number for number in range(8)]  # of the new batches, not the captured
    assert recorder.captured == 1
    assert recorder.replayed == 8 - EAGER_UPDATES


def test_each_shape_of_a_batch_has_a_graph_of_its_own(recorder):
    update = GraphedUpdate(total, list, print)
    for width in (2, 2, 2, 2, 4, 4, 4, 4, 2, 4):
        assert update(batch(1, width), torch.zeros(0)).item() == 2 * width
    assert recorder.captured == 2
    assert recorder.replayed == 4


def test_training_goes_on_eagerly_if_the_capture_fails(recorder, capsys):
    recorder.error = RuntimeError('operation not permitted when stream is capturing\ntraceback')
    update = GraphedUpdate(total, list, print)
    assert [update(batch(n), torch.zeros(0)).item() for n in range(6)] == [8 * n for n in range(6)]
    assert capsys.readouterr().out == (
        'training without a CUDA graph, whose capture failed: '
        'operation not permitted when stream is capturing\n'
    )


@pytest.mark.parametrize('scaled', [False, True])
def test_a_capture_that_fails_halfway_leaves_nothing_to_the_next_update(
    run_here, tmp_path, monkeypatch, recorder, scaled
):
    clip, scaler, capturing = torch.nn.utils.clip_grad_norm_, torch.amp.GradScaler, []

    def capture(function, device, pool=None, warm_up=True):
        capturing.append(True)
        return function()

    def fail(*args):  # after the backward pass
        if capturing and capturing.pop():
            raise RuntimeError('not permitted when stream is capturing')
        return clip(*args)

    def make_scaler(device, enabled):
        return scaler(device, enabled=scaled)

    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', fail)
    monkeypatch.setattr(torch.amp, 'GradScaler', make_scaler)
    monkeypatch.setattr(update_module, 'should_capture', lambda *args: True)
    args = ('--max_iters=6', '--eval_interval=6', *MODERN)
    recorder.error = RuntimeError('not supported')  # before anything is computed
    assert run_here(f'--out_dir={tmp_path / "at_once"}', *args) == 0
    monkeypatch.setattr(update_module, 'capture', capture)
    assert run_here(f'--out_dir={tmp_path / "halfway"}', *args) == 0
    at_once, halfway = (list_checkpoints(tmp_path / name)[-1] for name in ('at_once', 'halfway'))
    assert hashes(at_once) == hashes(halfway)


def test_training_goes_on_eagerly_if_a_capture_runs_out_of_memory(recorder):
    recorder.error = torch.OutOfMemoryError('CUDA out of memory')
    update = GraphedUpdate(total, list, print)
    assert [update(batch(n), torch.zeros(0)).item() for n in range(5)] == [8 * n for n in range(5)]


def test_a_learning_rate_that_a_graph_reads_is_set_in_place():
    group = {'lr': torch.zeros(())}
    held = group['lr']
    set_lr(group, 0.5)
    assert held.item() == 0.5
    group = {'lr': 0.1}
    set_lr(group, 0.5)
    assert group['lr'] == 0.5


# -----------------------------------------------------------------------------
# whether there is a graph

TINY_WORK = ComputeWorkload(1000, 1e9, 4)
LARGE_WORK = ComputeWorkload(1000, 1e13, 12)
CONFIG = {
    'cuda_graph': 'auto',
    'objective': 'lm',
    'shard': False,
    'gradient_checkpointing': False,
    'eval_only': False,
    'offload': False,
}


@pytest.mark.parametrize(
    ('expected', 'work', 'dtype', 'changes'),
    [
        (True, TINY_WORK, torch.bfloat16, {}),
        (False, LARGE_WORK, torch.bfloat16, {}),
        (False, TINY_WORK, torch.float16, {}),
        (False, TINY_WORK, torch.bfloat16, {'objective': 'sft'}),
        (False, TINY_WORK, torch.bfloat16, {'gradient_checkpointing': True}),
        (False, TINY_WORK, torch.bfloat16, {'eval_only': True}),
        (False, TINY_WORK, torch.bfloat16, {'cuda_graph': False}),
        (True, LARGE_WORK, torch.float16, {'cuda_graph': True}),
    ],
)
def test_by_default_only_updates_of_tiny_models_are_captured(expected, work, dtype, changes):
    runtime = Runtime('cuda:0', dtype)
    assert should_capture(CONFIG | changes, work, 989e12, runtime) is expected


def test_updates_of_several_processes_or_without_a_gpu_are_not_captured():
    assert not should_capture(CONFIG, TINY_WORK, 989e12, Runtime('cuda:0', torch.bfloat16, 0, 2))
    assert not should_capture(CONFIG, TINY_WORK, None, Runtime('cpu', torch.float32))
