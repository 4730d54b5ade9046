"""One step of generation as a CUDA graph: its many small kernels are launched at once."""

import functools
import threading

import torch

from flatgpt.inference.kv_cache import KVCache
from model import GPT


def is_recorded(given) -> bool:
    return given.is_cuda


def replay(model: GPT, given, cache: KVCache):
    """model() for one more token a row, as a CUDA graph; given (2, R): the tokens, the lengths.

    Launching its hundreds of small kernels one by one takes longer than computing them. There is
    one graph for each number of rows and of columns, recorded when first needed, which takes as
    long as a few steps.

    What Python decides while a step is recorded stays so in every replay. So it is recorded for the
    longest texts of so many columns, whatever the rows hold by then: then there is a mask, which a
    cache that is still empty would do without, and its values come from `pos`, on the device.
    """
    key = _, columns = given.size(1), cache.columns(1)
    if key not in cache.graphs:
        pos, span, held = cache.pos.clone(), cache.span, given.clone()

        def step():
            cache.span = columns - 1
            return model(held[0, :, None], cache=cache, lengths=held[1])[0]

        undo = lambda: cache.pos.copy_(pos)  # noqa: E731
        cache.graphs[key] = held, *record(step, undo, given.device)
        cache.span = span
    held, again, logits = cache.graphs[key]
    held.copy_(given)
    again()
    return logits


RECORDING = threading.Lock()


@functools.cache
def side_stream(device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS has a workspace for each stream, and never gives it back."""
    return torch.cuda.Stream(device)


def record(step, undo, device):
    """Record what step() does on a GPU -> a function that does it again, and its result.

    undo(): takes back what step() changed, since libraries must run once to set themselves up.
    """
    with RECORDING, torch.cuda.device(device):
        graph, aside = torch.cuda.CUDAGraph(), side_stream(device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        undo()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode='thread_local'):
            result = step()
        return graph.replay, result
