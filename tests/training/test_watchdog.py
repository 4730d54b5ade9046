"""A rank that hangs or died is reported, and the others exit within the timeout."""

import json
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from conftest import FOREVER, ROOT

from flatgpt import errors
from flatgpt.errors import one_line_errors
from flatgpt.runtime import Runtime, is_lost_connection
from flatgpt.training.watchdog import PHASES, Watchdog, is_sibling

GLOO = '[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:12. Typically'


@pytest.fixture
def crew(monkeypatch):
    """Watchdogs of several ranks in one process, and the report of each -> (start, said)."""
    said, store, started = {}, dist.HashStore(), []

    class Watch(Watchdog):
        def _exit(self, what, why, mine=None):
            said.setdefault(self.runtime.rank, (what, why, mine))

    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    one_line_errors()
    monkeypatch.setenv('MASTER_ADDR', 'first.host')

    def start(world, timeout=0.3, store=store):
        ranks = [Runtime('cpu', torch.float32, rank, world, store) for rank in range(world)]
        started.extend(Watch(runtime, timeout) for runtime in ranks)
        return started

    yield start, said
    for each in started:
        each.close()


def wait_for(said, rank):
    deadline = time.monotonic() + 10
    while rank not in said:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return said[rank]


def wait_for_speaker(said):
    """The report of the rank that prints it."""
    deadline = time.monotonic() + 10
    while not (spoken := [(what, why) for what, why, mine in said.values() if mine]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (one,) = spoken
    return one


def keep_busy(*watches):
    """Let these ranks make progress all the time."""

    def work():
        while not all(each.closed.wait(0.01) for each in watches):
            for each in watches:
                each.enter_phase(each.phase[0] + 1, 'updating the weights')

    threading.Thread(target=work, daemon=True).start()


def test_no_rank_is_reported_while_all_make_progress(crew):
    start, said = crew
    keep_busy(*start(3, timeout=0.1))
    time.sleep(0.5)
    assert said == {}


def test_a_rank_that_waits_reports_the_rank_that_hangs(crew):
    start, said = crew
    watches = start(3)
    watches[0].enter_phase(7, 'computing gradients')
    watches[1].enter_phase(7, 'reading data')
    watches[2].enter_phase(7, 'computing gradients')
    what, why = wait_for_speaker(said)
    assert what == 'no progress for 0.3 s'
    assert re.fullmatch(
        rf'rank 1 \(process {os.getpid()} on \S+\) has been reading data in step 7 for \d s; '
        r'this rank was computing gradients in step 7',
        why,
    )
    for rank in range(3):  # all leave, one says why
        wait_for(said, rank)
    assert [mine for *_, mine in said.values()].count(True) == 1


def test_the_rank_that_hangs_is_reported_even_if_it_times_out_first(crew):
    start, said = crew
    watches = start(3)
    watches[0].enter_phase(7, 'saving a checkpoint')
    for each in watches[1:]:
        each.enter_phase(7, 'computing gradients')
    assert re.fullmatch(
        rf'rank 0 \(process {os.getpid()} on \S+\) has been saving a checkpoint in step 7 '
        r'for \d s; '
        r'this rank was computing gradients in step 7',
        wait_for_speaker(said)[1],
    )
    assert not wait_for(said, 0)[2]


@pytest.mark.parametrize(
    'behind', [(7, 'updating the weights'), (8, 'evaluating'), (8, 'generating a sample')]
)
def test_ranks_are_ordered_by_step_and_then_by_phase(crew, behind):
    start, said = crew
    watches = start(2)
    watches[0].enter_phase(8, 'reading data')
    watches[1].enter_phase(*behind)
    assert wait_for_speaker(said)[1].startswith('rank 1 ')


def test_the_phases_are_those_of_train_py_in_order():
    places = {
        path: re.findall(
            r"watchdog\.(?:enter_phase|keep_alive)[(,] ?\w+, '(.*?)'",
            (ROOT / path).read_text(encoding='utf-8'),
        )
        for path in ('train.py', 'flatgpt/training/resume.py')
    }
    set_up, (checks, update, *loop) = places['flatgpt/training/resume.py'], places['train.py']
    set_up = sorted(set_up, key=PHASES.index)
    # the loop calls update(), which stands before it
    assert ['starting up', checks, *set_up, *loop, update] == list(PHASES)


def test_a_slow_rank_that_no_other_waits_for_is_not_reported(crew):
    start, said = crew
    watches = start(2)
    watches[1].enter_phase(1, 'reading data')
    keep_busy(watches[1])
    time.sleep(1)
    assert said == {}  # rank 0 is behind, but rank 1 gets on


def wait_together(*watches):
    """Let these ranks wait while another copies, as Runtime.wait_for_all() does."""

    def work():
        while not all(each.closed.wait(0.01) for each in watches):
            for each in watches:
                each.keep_alive(0, 'opening the dataset')

    threading.Thread(target=work, daemon=True).start()


def test_ranks_may_wait_long_while_another_copies_the_dataset(crew):
    start, said = crew
    watches = start(3)
    wait_together(*watches[:2])
    for _ in range(150):
        watches[2].keep_alive(0, 'copying the dataset')
        time.sleep(0.01)
    assert said == {}


def test_a_rank_that_dies_while_it_copies_the_dataset_is_reported(crew):
    start, said = crew
    watches = start(3)
    wait_together(*watches[:2])
    watches[2].keep_alive(0, 'copying the dataset')
    time.sleep(0.3)
    watches[2].close()
    _, why = wait_for_speaker(said)
    assert re.fullmatch(
        r'rank 2 \(.*\) sends no heartbeat \(the last while copying the dataset in step 0\); '
        'this rank was opening the dataset in step 0',
        why,
    )


def test_a_rank_that_hangs_while_it_copies_the_dataset_is_reported(crew):
    start, said = crew
    watches = start(2)
    wait_together(watches[0])
    watches[1].keep_alive(0, 'copying the dataset')
    assert wait_for_speaker(said)[1].startswith('rank 1 ')


def test_a_rank_without_heartbeats_is_reported(crew):
    start, said = crew
    watches = start(3, timeout=1)
    watches[1].enter_phase(4, 'saving a checkpoint')
    time.sleep(0.3)  # a sign of that
    watches[1].close()
    for each in watches[::2]:
        each.enter_phase(5, 'computing gradients')
    _, why = wait_for_speaker(said)
    assert re.match(
        r'rank 1 \(.*\) sends no heartbeat \(the last while saving a checkpoint in step 4\); ', why
    )
    assert 'rank 0' not in why


def test_ranks_that_are_slow_in_the_same_phase_are_not_reported(crew):
    start, said = crew
    start(2)
    time.sleep(2)
    assert said == {}


class Silent(dist.HashStore):
    """A store whose host is frozen: it accepts values but never answers."""

    def get(self, key):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(60)


@pytest.mark.parametrize(('agent', 'keeper'), [('True', 'torchrun'), ('False', 'rank 0')])
def test_a_store_that_does_not_answer_is_reported_within_the_timeout(
    crew, monkeypatch, agent, keeper
):
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', agent)
    start, said = crew
    started = time.monotonic()
    start(2, store=Silent())
    what, why, _ = wait_for(said, 1)
    assert time.monotonic() - started < 10  # and not 60
    assert what == 'no progress for 0.3 s'
    assert why.startswith(f'{keeper} on first.host, or the network to it, does not ans')


def test_a_lost_connection_reports_the_rank_that_died(crew):
    start, said = crew
    watches = start(2, timeout=3)
    time.sleep(0.5)
    watches[0].close()
    watches[1].enter_phase(9, 'computing gradients')
    sys.excepthook(RuntimeError, RuntimeError(GLOO), None)
    what, why, mine = said[1]
    assert what == 'a connection was lost (Connection closed by peer [10.0.0.2]:12)'
    assert why.startswith('rank 0 (')
    assert 'sends no heartbeat' in why
    assert mine


@pytest.mark.parametrize('meanwhile', ['it is late', 'another speaks'])
def test_a_watchdog_that_is_closed_during_a_check_stops_nothing(crew, monkeypatch, meanwhile):
    start, said = crew
    looks, seen = threading.Event(), threading.Event()

    def look(self):
        looks.set()
        return seen.wait(10) and 'rank 1 is behind'

    monkeypatch.setattr(
        Watchdog,
        '_find_stalled_ranks' if meanwhile == 'it is late' else '_another_rank_reports',
        look,
    )
    (watch,) = start(1, timeout=0.1)
    assert looks.wait(10)
    watch.close()
    seen.set()
    time.sleep(0.3)
    assert said == {}


def test_other_errors_are_not_reported_as_a_lost_connection(crew, capsys):
    start, said = crew
    start(2)
    sys.excepthook(RuntimeError, RuntimeError('shapes differ'), None)
    assert said == {}
    assert 'RuntimeError: shapes differ' in capsys.readouterr().err
    assert is_lost_connection(RuntimeError(GLOO))
    assert is_lost_connection(dist.DistNetworkError('closed'))
    assert not is_lost_connection(ValueError(GLOO))


def test_a_single_process_has_no_watchdog(monkeypatch):
    monkeypatch.setattr(threading.Thread, 'start', lambda self: pytest.fail('a thread'))
    explainers = [*errors._explainers]
    Watchdog(Runtime('cpu', torch.float32), 0.1).close()
    assert errors._explainers == explainers


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='needs /proc')
def test_only_a_process_of_the_same_parent_is_a_sibling():
    assert is_sibling(os.getpid())
    assert not is_sibling(1)
    assert not is_sibling(os.getppid())
    assert not is_sibling(2**22 + 1)  # there is no such process


def last_line(rank):
    return rank.err.splitlines()[-1]


def test_a_killed_rank_is_reported_in_one_line(ranks, tmp_path):
    crew = ranks(3, f'--out_dir={tmp_path}', *FOREVER, '--hang_timeout=4')
    crew[0].says('step 3/')
    crew[1].send(signal.SIGKILL)
    assert crew.end(20) == [1, -signal.SIGKILL, 1]
    assert re.fullmatch(
        rf'error \(rank [02]\): a connection was lost \(.*\): rank 1 \(process {crew[1].pid} on '
        r'\S+\) sends no heartbeat \(the last while .* in step \d+\); this rank was [\w ]+ in step '
        r'\d+',
        *re.findall(r'^error.*', crew.err, re.M),
    )
    assert 'Traceback' not in crew.err


SLOW = """
import sys, time
from flatgpt.checkpoint import save
from flatgpt.data import dataset, mixture
def sleep(*args): time.sleep(60)
"""


@pytest.mark.parametrize(
    ('which', 'fault', 'place'),
    [
        (0, 'save.Saver.save = sleep', 'saving a checkpoint in step 2'),
        (1, 'dataset.Dataset.batch = sleep', 'reading data in step 0'),
    ],
)
def test_the_stuck_rank_of_three_is_reported_once(ranks, tmp_path, which, fault, place):
    before = lambda rank: SLOW + fault if rank == which else ''  # noqa: E731
    args = (f'--out_dir={tmp_path}', *FOREVER, '--save_interval=2', '--hang_timeout=2')
    crew = ranks(3, *args, before=before)
    assert crew.end(30) == [1, 1, 1]
    (line,) = re.findall(r'^error.*', crew.err, re.M)
    assert re.fullmatch(
        rf'error \(rank \d\): no progress for 2 s: rank {which} \(process {crew[which].pid} on '
        rf'\S+\) has been {place} for \d s; this rank was [\w ]+ in step \d',
        line,
    )
    assert 'Traceback' not in crew.err


def while_opening(fault):
    """`before`, for rank 1."""
    lines = (
        f'import os, signal, time\nfrom flatgpt.data import mixture\ndef fails(*args): {fault}\n'
    )
    return lambda rank: f'{lines}mixture.open_data = fails' if rank == 1 else ''


def test_an_error_while_the_dataset_is_opened_stops_all_ranks(ranks, tmp_path):
    crew = ranks(2, f'--out_dir={tmp_path}/run', before=while_opening('raise OSError("no disk")'))
    assert crew.end(30) == [2, 1]
    assert crew[0].err == 'error: rank 1: OSError: no disk\n'
    assert last_line(crew[1]) == '[rank1]: OSError: no disk'


@pytest.mark.parametrize('number', ['SIGSTOP', 'SIGKILL'])
def test_a_rank_that_freezes_or_dies_while_the_dataset_is_opened_is_reported(
    ranks, tmp_path, number
):
    fault = while_opening(f'time.sleep(0.5); os.kill(os.getpid(), signal.{number})')
    crew = ranks(2, f'--out_dir={tmp_path}/run', '--hang_timeout=2', before=fault)
    assert crew.end(20) == [1, -signal.SIGKILL]  # a frozen one would not hear torchrun
    assert re.fullmatch(
        rf'error \(rank 0\): no progress for 2 s: rank 1 \(process {crew[1].pid} on \S+\) sends no '
        r'heartbeat \(the last while copying the dataset in step 0\); this rank was .*\n',
        crew.err,
    )


@pytest.mark.faults
@pytest.mark.parametrize('shard', [False, True])
@pytest.mark.parametrize('which', [0, 1])
def test_a_frozen_rank_is_reported_within_the_timeout_and_five_seconds(
    ranks, tmp_path, which, shard
):
    args = (f'--out_dir={tmp_path}', *FOREVER, '--hang_timeout=3', f'--shard={shard}')
    crew = ranks(2, *args)
    crew[0].says('step 3/')
    crew[which].send(signal.SIGSTOP)
    started, other = time.monotonic(), crew[1 - which]
    assert other.end(30) == 1
    assert 3 <= time.monotonic() - started < 3 + 5
    assert 'Traceback' not in other.err
    assert last_line(other).startswith(
        f'error (rank {1 - which}): no progress for 3 s: rank {which} '
    )
    if which == 1:  # and rank 0 keeps the store, without which there is no more to be known
        assert f'(process {crew[1].pid} on ' in other.err
        assert crew[1].end(5) == -signal.SIGKILL  # it would not hear torchrun


def test_a_heartbeat_can_be_read_by_every_rank(crew):
    start, _ = crew
    (first, *_) = start(2)
    first.enter_phase(3, 'reading data')
    first._send_heartbeat()
    _, host, pid, step, what, seconds = json.loads(first.runtime.store.get('heartbeat/0'))
    assert (pid, step, what) == (os.getpid(), 3, 'reading data')
    assert seconds < 5
    assert host
