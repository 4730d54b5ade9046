"""
Keep a run to its time: the number of steps follows the speed of the machine.

    deadline = Deadline(ends, cost, max_iters)         # rank 0 of a run with --minutes
    new = deadline.refit(step, max_iters)              # None, or another number of steps

A change is an event, which the checkpoint keeps: the rest of the schedule, with its decay of the
learning rate, is compressed or stretched to the new number of steps. A resumed run follows the
events and never the clock, so that it computes what the first one would have.
"""

import time
from collections import deque
from collections.abc import Callable

CHECKS = 50  # in a run: how often the speed is compared with the plan
WINDOW = 5  # checks that the speed is a mean over
WARM_UP = 3  # steps that are slower than all others
TOLERANCE = 0.02  # of the time: a smaller deviation changes nothing
LEAST_TOLERANCE = 1.0  # seconds


class Deadline:
    """ends: when training has to end, in seconds of time.perf_counter().

    cost(first, last): seconds that the steps from `first` to `last` were planned to take, with
    the evaluations among them.
    """

    def __init__(self, ends: float, cost: Callable[[int, int], float], max_iters: int):
        self.ends, self.cost = ends, cost
        self.interval = max(1, max_iters // CHECKS)
        self.tolerance = max(LEAST_TOLERANCE, TOLERANCE * (ends - time.perf_counter()))
        self.passed: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # step, time
        self.slowdown = 1.0  # the measured time of a step, relative to the plan

    def is_due(self, step: int) -> bool:
        return step >= WARM_UP and (step - WARM_UP) % self.interval == 0

    def refit(self, step: int, max_iters: int) -> int | None:
        """The number of steps that ends in time; None if the present one does."""
        now = time.perf_counter()
        if self.passed and step > self.passed[0][0]:
            first, began = self.passed[0]
            self.slowdown = (now - began) / self.cost(first, step)
        self.passed.append((step, now))
        left, needed = self.ends - now, self.slowdown * self.cost(step, max_iters)
        if step >= max_iters or abs(needed - left) <= self.tolerance:
            return None
        # a run whose time is over still lowers its learning rate, in a hundredth of its steps
        steps = max((max_iters - step) * left / needed, step / 100, 1)
        new = step + round(steps)
        return None if new == max_iters else new
