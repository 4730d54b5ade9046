"""
Notices that a process hangs, says which one and where, and ends the run.

    watchdog = Watchdog(runtime, timeout=600)
    watchdog.at(step, 'the exchange of gradients')    # wherever a process may wait for others

Each process leaves signs of life in the store that they share, with what it is doing. Whoever has
been at one thing for longer than the timeout, or has lost its connection to another, looks at the
signs of all, twice: a process whose sign stands still is frozen or gone, and one that is behind the
others, in the order of PHASES, keeps them waiting. Without this all would wait, or end in a timeout
or a traceback that names nobody.
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
    'the start, the check, the copying of the data, the opening of the data, the set-up, '
    'the evaluation, the saving, the sample, the data, the gradients, the update'
).split(', ')  # where a process may be, in the order in which train.py comes there


class Watchdog:
    def __init__(self, runtime: Runtime, timeout: float):
        self.runtime, self.timeout = runtime, timeout
        self.interval = min(0.5, timeout / 10)  # seconds between signs
        self.at(0, PHASES[0])
        self.last_reply = time.monotonic()  # when the store last answered
        self.seen_heartbeats: set = set()  # the others' signs when together() last found them new
        self.closed, self.exit_lock = threading.Event(), threading.Lock()
        self.frozen: list[int] = []  # processes of this machine
        if runtime.world_size > 1:
            self._catch_lost_connections()
            with suppress(Exception):
                self._send_heartbeat()  # so that who ends at once is known, too
            threading.Thread(target=self._watch_store, daemon=True).start()
        if runtime.store:
            threading.Thread(target=self._watch_ranks, daemon=True).start()

    def at(self, step: int, what: str) -> None:
        """This process comes to `what` of a step."""
        assert what in PHASES
        self.phase, self.since = (step, what), time.monotonic()

    def keep_alive(self, step: int, what: str) -> None:
        """The same, but `what` may last: the time begins anew whenever all others have given new
        signs of life, and none of them is late."""
        if self.runtime.world_size > 1 and self.phase == (step, what):
            if time.monotonic() - self.since < self.interval:
                return
            others = [
                sign for rank, sign in enumerate(self._heartbeats()) if rank != self.runtime.rank
            ]
            signs = {(rank, sign[0]) for rank, sign in enumerate(others)}
            if signs & self.seen_heartbeats or max(sign[5] for sign in others) > self.timeout:
                return  # one stands still, or is late: if that lasts, this process will be, too
            self.seen_heartbeats = signs
        self.at(step, what)

    def close(self) -> None:
        self.closed.set()

    def _is_stalled(self) -> bool:
        return not self.closed.is_set() and time.monotonic() - self.since > self.timeout

    def _watch_ranks(self) -> None:
        parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        while not self.closed.wait(self.interval):
            if parent and os.getppid() != parent:  # it was killed: save, and leave, as it would ask
                os.kill(os.getpid(), signal.SIGTERM)
                parent = None
            try:
                self._send_heartbeat()
                if (
                    self._another_rank_reports() and not self.closed.is_set()
                ):  # late or not: all leave
                    self._exit('another process said why', '', mine=False)
                if (
                    self._is_stalled()
                    and (why := self._find_stalled_ranks())
                    and self._is_stalled()
                ):
                    self._exit(f'no progress for {self.timeout:g} s', why, self._claim_report())
            except Exception:  # whoever keeps the store may be what is gone: see _watch_store()
                continue

    def _watch_store(self) -> None:
        """End a process that is late and cannot ask why: a call of the store may never return."""
        while not self.closed.wait(self.interval):
            if self._is_stalled() and time.monotonic() - self.last_reply > max(
                3, 5 * self.interval
            ):
                self._exit(f'no progress for {self.timeout:g} s', self._unreachable_store())

    def _unreachable_store(self) -> str:
        at_torchrun = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
        keeper = 'torchrun' if at_torchrun else 'rank 0'
        step, what = self.phase
        return (
            f'{keeper} on {os.environ["MASTER_ADDR"]}, or the network on the way there, does not '
            f'answer; waited for at {what} of step {step}'
        )

    def _catch_lost_connections(self) -> None:
        """End with one line where the main thread would with a traceback out of torch."""

        def explain(error: BaseException) -> None:
            if is_lost_connection(error):
                asking = threading.Thread(
                    target=self._report_lost_connection, args=[error], daemon=True
                )
                asking.start()
                asking.join(max(5, 10 * self.interval))
                self._exit('a connection is lost', self._unreachable_store())

        explain_errors(explain)

    def _report_lost_connection(self, error: BaseException) -> None:
        with suppress(Exception):
            why = self._find_stalled_ranks() or 'no other process is gone, or behind'
            self.frozen = []  # gone, and the numbers of their processes may be others' by now
            said = re.sub(r'^\[.*?\] ', '', str(error).splitlines()[0]).split('. ')[0][:100]
            self._exit(f'a connection is lost ({said})', why, self._claim_report())

    def _send_heartbeat(self) -> None:
        seconds = time.monotonic() - self.since
        sign = [time.monotonic(), socket.gethostname(), os.getpid(), *self.phase, seconds]
        key = f'heartbeat/{self.runtime.rank}'
        self.runtime.store.set(key, json.dumps(sign))
        self.runtime.store.get(key)  # which waits for an answer; set() does not
        self.last_reply = time.monotonic()

    def _heartbeats(self) -> list[list]:
        keys = [f'heartbeat/{rank}' for rank in range(self.runtime.world_size)]
        return [json.loads(sign) for sign in self.runtime.store.multi_get(keys)]

    def _find_stalled_ranks(self) -> str:
        """Who is gone, or else furthest behind, so that this process waits for them.

        '' where that is this one: it is for those who wait to say so, and where all are at the
        same, what they do, each for itself, takes long.
        """
        before, me = self._heartbeats(), self.runtime.rank
        for _ in range(max(3, round(1 / self.interval))):  # signing on, for others look as well
            self._send_heartbeat()
            time.sleep(self.interval)
        gone, places = [], {}
        for rank, (old, new) in enumerate(zip(before, self._heartbeats(), strict=True)):
            at, host, pid, step, what, seconds = new
            who = f'rank {rank} (process {pid} on {host})'
            if rank != me and at == old[0]:
                self.frozen += [pid] if host == socket.gethostname() and is_sibling(pid) else []
                gone.append(f'{who} gives no sign of life, last at {what} of step {step}')
                continue
            said = f'{who} has been at {what} of step {step} for {seconds:.0f} s'
            places.setdefault((step, PHASES.index(what)), {})[rank] = said
        last = places[min(places)]
        blamed = gone or ([] if me in last else list(last.values()))
        step, what = self.phase
        return '; '.join([*blamed, f'waited for at {what} of step {step}']) if blamed else ''

    def _another_rank_reports(self) -> bool:
        store, me = self.runtime.store, str(self.runtime.rank).encode()
        return store.check(['reporter']) and store.get('reporter') != me

    def _claim_report(self) -> bool:
        """Whether it is for this process to say it: the first that asks."""
        me = str(self.runtime.rank)
        return self.runtime.store.compare_set('reporter', '', me) == me.encode()

    def _exit(self, what: str, why: str, mine: bool | None = None) -> None:
        """End this process, from here: its main thread waits. mine: see _claim_report(); None if it
        cannot be known."""
        self.exit_lock.acquire()  # for good, so that this is done by one thread
        line = f'error (rank {self.runtime.rank}): {what}: {why}\n'
        if mine is not False:
            with suppress(OSError):  # nobody may read it, and this process has to end
                os.write(2, line.encode())
        if mine is not None:
            time.sleep(2 * self.interval)  # for all to hear of it: rank 0 may keep the store
        for pid in self.frozen:  # a process that stands still does not hear torchrun's SIGTERM
            with suppress(OSError):
                os.kill(pid, getattr(signal, 'SIGKILL', signal.SIGTERM))
        os._exit(1)


def is_sibling(pid: int) -> bool:
    """Whether the same parent, such as torchrun, started that process of this machine."""
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8') as file:
            return int(file.read().rpartition(')')[2].split()[1]) == os.getppid()
    except OSError:
        return False
