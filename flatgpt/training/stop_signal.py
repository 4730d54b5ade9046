"""Signals that stop a run after its current step, on all ranks."""

import math
import os
import signal
from contextlib import suppress

import torch

from flatgpt.errors import UserError
from flatgpt.runtime import Runtime, to_device


class StopSignal:
    """Records a signal that asks this process to stop, which the training loop checks each step.

    A second Ctrl-C exits at once, except under torchrun, which forwards the first one again.
    An error while reading data stops a run like a signal: see fail().
    """

    FAILED = 2**10  # instead of a signal number, and larger than any

    def __init__(self, runtime: Runtime):
        self.signal, self.runtime, self.numbers = 0, runtime, []
        self.error: UserError | None = None  # of this process
        self.nothing = torch.zeros(0, dtype=runtime.sum_dtype, device=runtime.device)
        for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP'):
            number = getattr(signal, name, None)  # Windows has only the first two
            under_nohup = name == 'SIGHUP' and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not under_nohup:
                self.numbers.append(number)
                signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if self.signal == number == signal.SIGINT and self.runtime.world_size == 1:
            raise KeyboardInterrupt
        if not self.signal and self.runtime.is_main:  # print() is not safe inside a signal handler
            with suppress(OSError):  # the terminal may be closed
                os.write(2, b'\nstopping after this step ...\n')
        # torchrun sends its own signal after the first, which decides the exit status
        if not self.signal or (self.runtime.world_size == 1 and not self.failed):
            self.signal = number

    def fail(self, error: UserError) -> None:
        """Stop because of an error; all ranks skip the update in progress."""
        self.error = self.error or error
        self.signal = self.FAILED

    @property
    def failed(self) -> bool:
        return self.signal == self.FAILED

    def to_device(self) -> torch.Tensor:
        """What the other ranks must know: 1 after a signal, NaN after fail(), else 0.

        Empty if there are none.
        """
        if self.runtime.world_size == 1:
            return self.nothing
        value = math.nan if self.failed else float(self.signal > 0)
        return to_device(torch.tensor([value], dtype=self.runtime.sum_dtype), self.runtime.device)

    def sync_ranks(self) -> None:
        """Give all ranks the signal that one received, so that they exit with the same status."""
        (number,) = self.runtime.all_reduce([self.signal], 'MAX')
        self.signal = int(number)

    @property
    def status(self) -> int:
        """The exit status: 128 + the signal's number, as shells expect; 0 without a signal."""
        if self.failed:
            return 2
        return 128 + self.signal if self.signal else 0

    def raise_interrupts(self) -> None:
        """From now on a signal raises KeyboardInterrupt."""
        for number in self.numbers:
            signal.signal(number, signal.default_int_handler)
