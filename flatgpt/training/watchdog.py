"""
Detects a rank that hangs or died, reports which one and in what phase, and stops the job.

    watchdog = Watchdog(runtime, timeout=600)
    watchdog.at(step, 'the gradients')    # at each phase in which a rank may wait for others

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

from flatgpt.errors import explain_errors
from flatgpt.runtime import Runtime, is_lost_connection

PHASES = (
    'the start, the check, the dataset copy, the dataset opening, the setup, '
    'the evaluation, the checkpoint, the sample, the data, the gradients, the update'
).split(', ')  # of a step, in the order of train.py


class Watchdog:
    def __init__(self, runtime: Runtime, timeout: float):
        self.runtime, self.timeout = runtime, timeout
        self.interval = min(0.5, timeout / 10)  # seconds between heartbeats
        self.at(0, PHASES[0])
        self.last_reply = time.monotonic()  # when the store last answered
        self.seen_heartbeats: set = set()  # of the others, when keep_alive() last saw new ones
        self.closed, self.exit_lock = threading.Event(), threading.Lock()
        self.frozen: list[int] = []  # processes of this machine
        if runtime.world_size > 1:
            self._catch_lost_connections()
            with suppress(Exception):
                self._send_heartbeat()  # so that a rank that dies at once is known, too
            threading.Thread(target=self._watch_store, daemon=True).start()
        if runtime.store:
            threading.Thread(target=self._watch_ranks, daemon=True).start()

    def at(self, step: int, what: str) -> None:
        """Enter the phase `what` of a step."""
        assert what in PHASES
        self.phase, self.since = (step, what), time.monotonic()

    def keep_alive(self, step: int, what: str) -> None:
        """Enter or stay in a phase that may take long: the timeout restarts whenever all other
        ranks have sent new heartbeats and none of them has stalled."""
        if self.runtime.world_size > 1 and self.phase == (step, what):
            if time.monotonic() - self.since < self.interval:
                return
            others = [
                beat for rank, beat in enumerate(self._heartbeats()) if rank != self.runtime.rank
            ]
            heartbeats = {(rank, beat[0]) for rank, beat in enumerate(others)}
            if heartbeats & self.seen_heartbeats or max(beat[5] for beat in others) > self.timeout:
                return  # one is frozen or has stalled: then this rank will stall, too
            self.seen_heartbeats = heartbeats
        self.at(step, what)

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
        step, what = self.phase
        return (
            f'{keeper} on {os.environ["MASTER_ADDR"]}, or the network to it, does not answer; '
            f'this rank waited in {what} of step {step}'
        )

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
        beat = [time.monotonic(), socket.gethostname(), os.getpid(), *self.phase, seconds]
        key = f'heartbeat/{self.runtime.rank}'
        self.runtime.store.set(key, json.dumps(beat))
        self.runtime.store.get(key)  # waits for the answer of the store; set() does not
        self.last_reply = time.monotonic()

    def _heartbeats(self) -> list[list]:
        keys = [f'heartbeat/{rank}' for rank in range(self.runtime.world_size)]
        return [json.loads(beat) for beat in self.runtime.store.multi_get(keys)]

    def _find_stalled_ranks(self) -> str:
        """The ranks that are frozen or dead, or else furthest behind, in one line.

        '' if this rank is among the last: the ranks that wait report it. If all are in the same
        phase, none waits for another, and the phase just takes long.
        """
        before, me = self._heartbeats(), self.runtime.rank
        for _ in range(max(3, round(1 / self.interval))):  # with new heartbeats for the others
            self._send_heartbeat()
            time.sleep(self.interval)
        gone, places = [], {}
        for rank, (old, new) in enumerate(zip(before, self._heartbeats(), strict=True)):
            at, host, pid, step, what, seconds = new
            who = f'rank {rank} (process {pid} on {host})'
            if rank != me and at == old[0]:
                self.frozen += [pid] if host == socket.gethostname() and is_sibling(pid) else []
                gone.append(f'{who} sends no heartbeat, last in {what} of step {step}')
                continue
            entry = f'{who} has been in {what} of step {step} for {seconds:.0f} s'
            places.setdefault((step, PHASES.index(what)), {})[rank] = entry
        last = places[min(places)]
        blamed = gone or ([] if me in last else list(last.values()))
        step, what = self.phase
        return '; '.join([*blamed, f'this rank waited in {what} of step {step}']) if blamed else ''

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
