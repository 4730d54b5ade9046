"""Reinforcement learning that is killed or stopped at random moments, and resumed."""

import os
import signal
import time

import numpy as np
import pytest
from conftest import SHARE, hashes, metrics
from rl_runs import tuning

from flatgpt.checkpoint.load import find_checkpoint
from flatgpt.inference.engine import Engine
from flatgpt.training import run as run_module
from flatgpt.training.rollout import Rollouts

pytest_plugins = ['rl_runs']
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals'),
]
MOMENTS = {  # where a signal arrives: during the completions, the reward, or the update
    'completions': (Engine, 'step'),
    'reward': (Rollouts, 'score'),
    'update': (run_module.Progress, 'advance'),
}


def times(count):
    return range(max(1, round(count * SHARE)))


def flags(base, asked, letters):
    return (*tuning(base, asked, letters), '--rl_kl=0.1', '--max_iters=12', '--save_interval=3')


@pytest.fixture(scope='module')
def whole(run_here, base, asked, letters, tmp_path_factory):
    """The run that nothing interrupts, and its seconds."""
    out_dir, started = tmp_path_factory.mktemp('whole') / 'run', time.perf_counter()
    run_here(f'--out_dir={out_dir}', *flags(base, asked, letters))
    return out_dir, time.perf_counter() - started


def assert_equal(out_dir, whole):
    assert hashes(find_checkpoint(out_dir, 'last')) == hashes(find_checkpoint(whole, 'last'))
    for key in ('reward', 'val_reward', 'loss'):
        assert metrics(out_dir, key) == metrics(whole, key)


@pytest.mark.parametrize('number', times(20))
def test_a_kill_at_any_time_changes_nothing(
    run_here, ranks, whole, base, asked, letters, tmp_path, number
):
    arguments = (f'--out_dir={tmp_path}', *flags(base, asked, letters))
    (process,) = ranks(0, *arguments)
    process.says('step 1/')
    time.sleep(np.random.default_rng(number).uniform(0, whole[1]))
    process.send(signal.SIGKILL)
    process.end()
    assert run_here(*arguments, '--auto_resume') == 0
    assert_equal(tmp_path, whole[0])


@pytest.mark.parametrize('number', times(20))
def test_a_stop_at_any_moment_loses_no_step(
    run_here, whole, base, asked, letters, tmp_path, monkeypatch, number
):
    arguments = (f'--out_dir={tmp_path}', *flags(base, asked, letters))
    owner, name = list(MOMENTS.values())[number % len(MOMENTS)]
    method, calls = getattr(owner, name), iter(range(10**6))
    # the engine takes some six steps for each call of the others
    at = np.random.default_rng(number).integers(1, 60 if name == 'step' else 10)

    def stop_then(self, *args):
        if next(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_then)
        assert run_here(*arguments) == 128 + signal.SIGTERM
    assert run_here(*arguments, '--auto_resume') == 0
    assert_equal(tmp_path, whole[0])
