"""How the time of a computation grows with the size of its input."""

import gc
import time
from collections.abc import Callable

LEAST_SECONDS = 0.3  # shorter times measure the processor's cache instead
MOST = 2.3**2  # times as long for four times as much
ATTEMPTS = 3


def check_growth(run: Callable[[int], object]) -> None:
    """run(4) takes at most 5.3 times as long as run(1), in the time of this process.

    The best times count, for run(4) of a few attempts if needed: other programs, which use the same
    memory, may slow down any one of them. Python's garbage collector, which comes when it likes, is
    off.
    """
    small, large = min(seconds_of(run, 1) for _ in range(ATTEMPTS)), float('inf')
    for _ in range(ATTEMPTS):
        large = min(large, seconds_of(run, 4))
        if large < MOST * max(small, LEAST_SECONDS):
            return
    raise AssertionError(f'{small:.3f} s, and {large:.3f} s for four times as much')


def seconds_of(run: Callable[[int], object], size: int) -> float:
    gc.collect()
    gc.disable()
    start = time.process_time()
    try:
        run(size)
    finally:
        seconds = time.process_time() - start
        gc.enable()
    return seconds
