"""
Notices that a process hangs, says which one and where, and ends the run.

    watch = Watch(runtime, timeout=600)
    watch.at(step, 'the exchange of gradients')    # wherever a process may wait for others

Each process leaves signs of life in the store that they share, with what it is doing. Whoever has
been at one thing for longer than the timeout looks at the signs of the others, twice: a process
whose sign stands still is frozen or gone, and one that is at something else keeps the others
waiting. Without this all would wait, or end in a timeout that names nobody.
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress

from runtime import Runtime


class Watch:
    def __init__(self, runtime: Runtime, timeout: float):
        self.runtime, self.timeout = runtime, timeout
        self.beat = min(1.0, timeout / 10)  # seconds between signs
        self.place, self.since = (0, 'the start'), time.monotonic()
        self.ended = threading.Event()
        self.frozen: list[int] = []  # processes of this machine
        if runtime.world_size > 1:
            threading.Thread(target=self._run, daemon=True).start()

    def at(self, step: int, what: str) -> None:
        """This process comes to `what` of a step."""
        self.place, self.since = (step, what), time.monotonic()

    def close(self) -> None:
        self.ended.set()

    def _run(self) -> None:
        count = 0
        while not self.ended.wait(self.beat):
            count += 1
            late = time.monotonic() - self.since > self.timeout
            try:
                self._sign(count)
                if late:
                    self._end(*self._blame())
            except Exception as error:  # whoever keeps the store may be what is gone
                if late:
                    reason = str(error).splitlines()[0][:100]
                    self._end(f'the store of the processes is out of reach ({reason})')

    def _sign(self, count: int) -> None:
        sign = [
            count,
            socket.gethostname(),
            os.getpid(),
            *self.place,
            time.monotonic() - self.since,
        ]
        self.runtime.store.set(f'sign/{self.runtime.rank}', json.dumps(sign))

    def _signs(self) -> list[list]:
        keys = [f'sign/{rank}' for rank in range(self.runtime.world_size)]
        return [json.loads(sign) for sign in self.runtime.store.multi_get(keys)]

    def _blame(self) -> tuple[str, bool]:
        """Whom this process waits for, and whether it is the one to say so."""
        before, me = self._signs(), self.runtime.rank
        self._sign(before[me][0] + 1)
        time.sleep(3 * self.beat)
        self._sign(before[me][0] + 2)
        others, alive = [], [me]
        for rank, (old, new) in enumerate(zip(before, self._signs(), strict=True)):
            count, host, pid, step, what, seconds = new
            who = f'rank {rank} (process {pid} on {host})'
            if rank != me and count == old[0]:
                self.frozen += [pid] if host == socket.gethostname() else []
                others.append(f'{who} gives no sign of life, last at {what} of step {step}')
                continue
            alive.append(rank)
            if [step, what] != list(self.place):
                others.append(f'{who} has been at {what} of step {step} for {seconds:.0f} s')
        step, what = self.place
        why = '; '.join(others) or 'no process is elsewhere'
        return f'{why}; waited for at {what} of step {step}', me == min(alive)

    def _end(self, why: str, mine: bool = True) -> None:
        """End this process, from here: its main thread waits."""
        line = f'error (rank {self.runtime.rank}): no progress for {self.timeout:g} s: {why}\n'
        if mine:
            os.write(2, line.encode())
        else:
            time.sleep(2)  # torchrun ends all when the first one leaves
        for pid in self.frozen:  # a process that stands still does not hear torchrun's SIGTERM
            with suppress(OSError):
                os.kill(pid, getattr(signal, 'SIGKILL', signal.SIGTERM))
        os._exit(1)
