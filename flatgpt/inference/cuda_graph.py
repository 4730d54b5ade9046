"""One decoding step as a CUDA graph: its many small kernels are launched at once."""

import functools
import threading

import torch

from flatgpt.inference.kv_cache import KVCache
from model import GPT


def can_capture(inputs) -> bool:
    return inputs.is_cuda


def replay(model: GPT, inputs, cache: KVCache):
    """model() for one more token per row, as a CUDA graph; inputs (2, R): tokens and lengths.

    Launching hundreds of small kernels one by one takes longer than computing them. There is one
    graph for each number of rows and of columns. It is captured when first needed, which takes as
    long as a few steps.

    The decisions of Python during the capture hold for every replay. So the step is captured as if
    the columns were full: then there is a mask, which an empty cache would not need, and its values
    come from `pos`, on the device.
    """
    key = _, columns = inputs.size(1), cache.columns(1)
    if key not in cache.graphs:
        pos, max_pos, static_inputs = cache.pos.clone(), cache.max_pos, inputs.clone()

        def step():
            cache.max_pos = columns - 1
            return model(static_inputs[0, :, None], cache=cache, lengths=static_inputs[1])[0]

        undo = lambda: cache.pos.copy_(pos)  # noqa: E731
        cache.graphs[key] = static_inputs, *capture(step, undo, inputs.device)
        cache.max_pos = max_pos
    static_inputs, run, logits = cache.graphs[key]
    static_inputs.copy_(inputs)
    run()
    return logits


CAPTURING = threading.Lock()


@functools.cache
def side_stream(device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS has a workspace per stream, and never frees it."""
    return torch.cuda.Stream(device)


def capture(step, undo, device):
    """Capture step() as a CUDA graph -> a function that replays it, and its result.

    undo(): reverts the changes of a first step(), which is a warm-up for the libraries.
    """
    with CAPTURING, torch.cuda.device(device):
        graph, stream = torch.cuda.CUDAGraph(), side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        undo()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
            result = step()
        return graph.replay, result
