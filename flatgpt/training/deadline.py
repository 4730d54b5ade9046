"""
Keep a run to its time: the number of steps follows the speed of the machine.

    deadline = Deadline(ends, cost, max_iters)     # of a run with --minutes
    if deadline.is_due(step):                      # the same on all ranks
        new = deadline.refit(step, max_iters)      # rank 0: None, or another number of steps

A change is an event, which the checkpoint keeps: the rest of the schedule, with its decay of the
learning rate, is compressed or stretched to the new number of steps. A resumed run follows the
events and never the clock, so that it computes what the first one would have.
"""

import time
from collections import deque
from statistics import median

from flatgpt.training.speed import StepCost

CHECKS = 50  # in a run: how often the speed is compared with the plan
WINDOW = 5  # checks that the speed is the median of, so that a pause does not count
WARM_UP = 3  # steps that are slower than all others
TOLERANCE = 0.02  # of the time: a smaller deviation changes nothing
LEAST_TOLERANCE = 1.0  # seconds
EARLY_TOLERANCE = 0.1  # of the time that is left, in addition: later checks correct the rest


class Deadline:
    """ends: when training has to end, in seconds of time.perf_counter().

    cost: what the steps were planned to take.
    alone: whether this is the only rank; otherwise all must check at the same steps.
    """

    def __init__(self, ends: float, cost: StepCost, max_iters: int, alone: bool = True):
        self.ends, self.cost, self.alone = ends, cost, alone
        self.interval = max(1, max_iters // CHECKS)
        self.tolerance = max(LEAST_TOLERANCE, TOLERANCE * (ends - time.perf_counter()))
        self.last: tuple[int, float] | None = None  # step and time of the last check
        self.ratios: deque[float] = deque(maxlen=WINDOW)  # measured time to planned time
        self.slowdown = 1.0  # their median

    def is_due(self, step: int) -> bool:
        """Whether to check now: CHECKS times in a run, and earlier if steps become slow."""
        if step < WARM_UP:
            return False
        if (step - WARM_UP) % self.interval == 0:
            return True
        last, then = self.last if self.alone and self.last else (step, 0.0)
        return last < step and time.perf_counter() - then > max(
            1.0, 3 * self.slowdown * self.cost.seconds(last, step)
        )

    def refit(self, step: int, max_iters: int) -> int | None:
        """The number of steps that ends in time; None if the present one does."""
        now = time.perf_counter()
        if self.last:
            last, then = self.last
            self.ratios.append((now - then) / self.cost.seconds(last, step))
            self.slowdown = median(self.ratios)
        self.last = step, now
        left, needed = self.ends - now, self.slowdown * self.cost.seconds(step, max_iters)
        if abs(needed - left) <= self.tolerance + EARLY_TOLERANCE * max(0.0, left):
            return None
        # past the deadline, the learning rate is still decayed, in 1 % of the steps so far
        steps = max((max_iters - step) * left / needed, step / 100, 1)
        new = step + round(steps)
        self.cost = self.cost.stretched(step, (new - step) / (max_iters - step))
        return None if new == max_iters else new
