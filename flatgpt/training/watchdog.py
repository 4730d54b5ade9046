"""
Detects a rank that hangs or died, reports which one and in what phase, and stops the job.

    watchdog = Watchdog(runtime, timeout=600)
    watchdog.enter_phase(step, 'computing gradients')  # before anything that may wait for others

Each rank writes heartbeats with its phase to the shared store. A rank that stays in one phase for
longer than the timeout, or loses a connection, reads all heartbeats twice: a rank whose heartbeat
does not change is frozen or dead; one that is behind the others, in the order of PHASES,
makes them wait. Without a watchdog all ranks would wait, or fail with a timeout or traceback that
does not show the cause.
"""

import json
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from flatgpt.errors import explain_errors
from flatgpt.runtime import Runtime, is_lost_connection

# in the order of train.py: the first five before the loop, at step 0; the others in each step
PHASES = (
    'starting up',
    'running the checks',
    'copying the dataset',
    'opening the dataset',
    'setting up',
    'evaluating',
    'saving a checkpoint',
    'generating a sample',
    'reading data',
    'completing prompts',
    'computing gradients',
    'updating the weights',
)


class Heartbeat(NamedTuple):
    """What a rank last wrote to the store, as JSON."""

    time: float  # on its own clock: only a change matters
    host: str
    pid: int
    step: int
    phase: str
    seconds: float  # in this phase


class Watchdog:
    def __init__(self, runtime: Runtime, timeout: float):
        self.runtime, self.timeout = runtime, timeout
        self.interval = min(0.5, timeout / 10)  # seconds between heartbeats
        self.enter_phase(0, PHASES[0])
        self.last_reply = time.monotonic()  # when the store last answered
        self.seen_heartbeats: set = set()  # (rank, time) that keep_alive() last saw
        self.closed, self.exit_lock = threading.Event(), threading.Lock()
        self.frozen: list[int] = []  # processes of this machine
        if runtime.world_size > 1:
            self._catch_lost_connections()
            with suppress(Exception):
                self._send_heartbeat()  # so that a rank that dies at once is known, too
            threading.Thread(target=self._watch_store, daemon=True).start()
        if runtime.store:
            threading.Thread(target=self._watch_ranks, daemon=True).start()

    def enter_phase(self, step: int, phase: str) -> None:
        assert phase in PHASES
        self.phase, self.since = (step, phase), time.monotonic()

    def keep_alive(self, step: int, phase: str) -> None:
        """Enter or stay in a phase that may take long: the timeout restarts whenever all other
        ranks have sent new heartbeats and none of them has stalled."""
        if self.runtime.world_size > 1 and self.phase == (step, phase):
            if time.monotonic() - self.since < self.interval:
                return
            others = [
                beat for rank, beat in enumerate(self._heartbeats()) if rank != self.runtime.rank
            ]
            times = {(rank, beat.time) for rank, beat in enumerate(others)}
            longest = max(beat.seconds for beat in others)
            if times & self.seen_heartbeats or longest > self.timeout:
                return  # one is frozen or has stalled: then this rank will stall, too
            self.seen_heartbeats = times
        self.enter_phase(step, phase)

    def close(self) -> None:
        self.closed.set()

    def _is_stalled(self) -> bool:
        return not self.closed.is_set() and time.monotonic() - self.since > self.timeout

    def _watch_ranks(self) -> None:
        parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        while not self.closed.wait(self.interval):
            if parent and os.getppid() != parent:  # torchrun was killed: save and exit
                os.kill(os.getpid(), signal.SIGTERM)
                parent = None
            try:
                self._send_heartbeat()
                if self._another_rank_reports() and not self.closed.is_set():
                    self._exit('another rank reports the cause', '', mine=False)
                if (
                    self._is_stalled()
                    and (why := self._find_stalled_ranks())
                    and self._is_stalled()
                ):
                    self._exit(f'no progress for {self.timeout:g} s', why, self._claim_report())
            except Exception:  # the host of the store may be gone: see _watch_store()
                continue

    def _watch_store(self) -> None:
        """Exit if this rank stalls and the store does not answer; its calls may never return."""
        while not self.closed.wait(self.interval):
            silent = time.monotonic() - self.last_reply > max(3, 5 * self.interval)
            if self._is_stalled() and silent:
                self._exit(f'no progress for {self.timeout:g} s', self._unreachable_store())

    def _unreachable_store(self) -> str:
        at_torchrun = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
        keeper = 'torchrun' if at_torchrun else 'rank 0'
        return (
            f'{keeper} on {os.environ["MASTER_ADDR"]}, or the network to it, does not answer; '
            + self._own_phase()
        )

    def _own_phase(self) -> str:
        step, phase = self.phase
        return f'this rank was {phase} in step {step}'

    def _catch_lost_connections(self) -> None:
        """Exit with one line instead of torch's traceback."""

        def explain(error: BaseException) -> None:
            if is_lost_connection(error):
                report = threading.Thread(
                    target=self._report_lost_connection, args=[error], daemon=True
                )
                report.start()
                report.join(max(5, 10 * self.interval))
                self._exit('a connection was lost', self._unreachable_store())

        explain_errors(explain)

    def _report_lost_connection(self, error: BaseException) -> None:
        with suppress(Exception):
            why = self._find_stalled_ranks() or 'no other rank is dead or behind'
            self.frozen = []  # dead; their process ids may have been reused
            message = re.sub(r'^\[.*?\] ', '', str(error).splitlines()[0]).split('. ')[0][:100]
            self._exit(f'a connection was lost ({message})', why, self._claim_report())

    def _send_heartbeat(self) -> None:
        seconds = time.monotonic() - self.since
        beat = Heartbeat(time.monotonic(), socket.gethostname(), os.getpid(), *self.phase, seconds)
        key = f'heartbeat/{self.runtime.rank}'
        self.runtime.store.set(key, json.dumps(beat))
        self.runtime.store.get(key)  # waits for the answer of the store; set() does not
        self.last_reply = time.monotonic()

    def _heartbeats(self) -> list[Heartbeat]:
        keys = [f'heartbeat/{rank}' for rank in range(self.runtime.world_size)]
        return [Heartbeat(*json.loads(beat)) for beat in self.runtime.store.multi_get(keys)]

    def _find_stalled_ranks(self) -> str:
        """The ranks that are frozen or dead, or else furthest behind, in one line.

        '' if this rank is among the last: the ranks that wait report it. If all are in the same
        phase, none waits for another, and the phase just takes long.
        """
        before, me = self._heartbeats(), self.runtime.rank
        for _ in range(max(3, round(1 / self.interval))):  # with new heartbeats for the others
            self._send_heartbeat()
            time.sleep(self.interval)
        dead, places = [], {}  # places: (step, phase) -> {rank: text}
        for rank, (old, new) in enumerate(zip(before, self._heartbeats(), strict=True)):
            who = f'rank {rank} (process {new.pid} on {new.host})'
            if rank != me and new.time == old.time:
                here = new.host == socket.gethostname() and is_sibling(new.pid)
                self.frozen += [new.pid] if here else []
                dead.append(
                    f'{who} sends no heartbeat (the last while {new.phase} in step {new.step})'
                )
                continue
            text = f'{who} has been {new.phase} in step {new.step} for {new.seconds:.0f} s'
            places.setdefault((new.step, PHASES.index(new.phase)), {})[rank] = text
        last = places[min(places)]
        blamed = dead or ([] if me in last else list(last.values()))
        return '; '.join([*blamed, self._own_phase()]) if blamed else ''

    def _another_rank_reports(self) -> bool:
        store, me = self.runtime.store, str(self.runtime.rank).encode()
        return store.check(['reporter']) and store.get('reporter') != me

    def _claim_report(self) -> bool:
        """Whether this rank prints the report: the first that asks does."""
        me = str(self.runtime.rank)
        return self.runtime.store.compare_set('reporter', '', me) == me.encode()

    def _exit(self, what: str, why: str, mine: bool | None = None) -> None:
        """Exit from this thread, since the main thread hangs. mine: see _claim_report(); None if
        unknown."""
        self.exit_lock.acquire()  # never released: only one thread exits
        line = f'error (rank {self.runtime.rank}): {what}: {why}\n'
        if mine is not False:
            with suppress(OSError):  # stderr may be closed
                os.write(2, line.encode())
        if mine is not None:
            time.sleep(2 * self.interval)  # until all have read it: rank 0 may host the store
        for pid in self.frozen:  # a frozen process ignores torchrun's SIGTERM
            with suppress(OSError):
                os.kill(pid, getattr(signal, 'SIGKILL', signal.SIGTERM))
        os._exit(1)


def is_sibling(pid: int) -> bool:
    """Whether a local process has the same parent, such as torchrun."""
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
            return int(file.read().rpartition(')')[2].split()[1]) == os.getppid()
    except OSError:
        return False
