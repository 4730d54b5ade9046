"""
CUDA graphs: many small kernels are launched at once, without Python's overhead for each.

    replay, result = capture(lambda: layer(x), x.device)
    x.copy_(other)                # the input has a fixed address
    replay()                      # `result` gets the new values, in the order of the stream

A captured function may launch kernels on tensors that stay where they are. It must not wait for the
device, and a branch that Python takes during the capture is taken in every replay.
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
    warm_up: run the function once before the capture, since libraries allocate memory in their
    first call; the caller must undo its effects. False: it ran before.
    """
    with CAPTURING, torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), capture_stream(device)
        current = torch.cuda.current_stream()
        if warm_up:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                function()
            current.wait_stream(stream)
        # thread_local: other threads may allocate memory during the capture
        with torch.cuda.graph(graph, pool, stream, capture_error_mode='thread_local'):
            result = function()
        return graph.replay, result
