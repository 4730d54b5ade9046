"""
CUDA graphs: many small kernels are launched at once, without the time Python needs for each.

    replay, result = capture(lambda: layer(x), x.device)
    x.copy_(other)                # the input has a fixed place in memory
    replay()                      # result holds the new values, as soon as the stream computed them

What a captured function may do: launch kernels on tensors that stay where they are. It must not
wait for the device, and what Python decides during the capture holds for every replay.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

CAPTURING = threading.Lock()  # one stream captures one graph at a time


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The process's stream for captures: cuBLAS has a workspace per stream, and never frees it."""
    return torch.cuda.Stream(device)


def capture(
    function: Callable[[], Any], device: torch.device, pool=None, warm_up: bool = True
) -> tuple[Callable[[], None], Any]:
    """Capture function() as a CUDA graph -> a function that replays it, and its result.

    pool: a torch.cuda.graph_pool_handle() for the memory of several graphs; None: one for this
    graph alone. Graphs that share a pool must be replayed on one stream, and a replay may overwrite
    the results of the others. Memory returns to torch once all of them are deleted; no more graphs
    can use the pool then.
    warm_up: run the function first, since libraries allocate memory in their first call; its
    effects are the caller's to undo. False: it ran before.
    """
    with CAPTURING, torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), capture_stream(device)
        current = torch.cuda.current_stream()
        if warm_up:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function()
            current.wait_stream(stream)
        # thread_local: other threads may allocate memory meanwhile
        with torch.cuda.graph(graph, pool, stream, capture_error_mode='thread_local'):
            result = function()
        return graph.replay, result
