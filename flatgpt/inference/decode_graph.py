"""
Decoding steps as CUDA graphs: one launch runs the forward pass and the sampling of all rows.

    graphs = DecodeGraphs(model, cache)
    graphs.upload(rows, settings, tokens)
    graphs.replay(forward, Step(8, cache.columns(1), SORT))
    graphs.read_tokens(rows)                       # the only wait for the GPU
"""

import copy
import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from flatgpt.cuda_graph import capture
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.sampling import NUM_SETTINGS, sample_rows
from model import GPT


def can_capture(tensor) -> bool:
    return tensor.is_cuda


class Step(NamedTuple):
    """What a graph computes for the first `rows` of the cache."""

    rows: int
    columns: int  # of the cache, to attend to; 0: no forward pass, `logits` has been filled
    work: int | None  # of the sampling: ARGMAX, DRAW or SORT of sampling.py; None: no sampling


class DecodeGraphs:
    """The graphs of one KV cache, and the tensors at fixed addresses that they read and write.

    A graph is captured when first needed. All share a pool of memory, in which one may overwrite
    the results of another, so `logits` and `tokens` are outside of it. No reference to the model is
    kept.
    """

    def __init__(self, model: GPT, cache: KVCache):
        device, rows, vocab_size = cache.kv.device, cache.pos.numel(), model.config.vocab_size
        pinned = {'pin_memory': True} if device.type == 'cuda' else {}  # or copies would wait
        self.cache, self.graphs, self.weights = cache, {}, weights_of(model)
        self.pool = torch.cuda.graph_pool_handle() if pinned else None
        self.suppressed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, vocab_size, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.host_tokens = torch.zeros(rows, dtype=torch.long, **pinned)
        # of each row: its token, the number of its tokens (0: a free row), and the settings of
        # sample_rows(), floats as their bits, so that one copy brings everything to the device
        self.host_inputs = torch.zeros(2 + NUM_SETTINGS, rows, dtype=torch.int32, **pinned)
        self.inputs = torch.zeros_like(self.host_inputs, device=device, pin_memory=False)

    @torch.inference_mode()
    def reset(self) -> None:
        """Empty the cache."""
        self.cache.kv.zero_()
        self.cache.pos.zero_()

    @torch.inference_mode()
    def suppress(self, suppressed) -> None:
        """Never sample the ids of this mask (V,)."""
        self.suppressed.copy_(suppressed)

    def upload(self, rows: list[int], settings: np.ndarray, tokens: list[int] | None = None):
        """Set the inputs of some rows: settings (NUM_SETTINGS, R), and the tokens to compute.

        The previous step must be finished: read_tokens() waits for it.
        """
        inputs = self.host_inputs.numpy()
        inputs[:] = 0
        inputs[2:, rows] = settings.view(np.int32)
        if tokens:
            inputs[0, rows], inputs[1, rows] = tokens, 1
        self.inputs.copy_(self.host_inputs, non_blocking=True)

    def replay(self, forward: Callable, step: Step) -> None:
        """Compute a step: `logits` of the next token, and `tokens` sampled from them.

        forward: the model's arguments -> its logits; called only if the step is not captured yet.
        """
        if step not in self.graphs:
            inputs = self.inputs.clone()
            self.capture(forward, step)
            self.inputs.copy_(inputs)
        self.graphs[step]()

    def capture(self, forward: Callable, step: Step) -> None:
        """Capture a step. Clears the inputs, so that running it changes no row of the cache."""
        rows, columns, work = step
        cache = copy.copy(self.cache)
        settings = self.inputs[2:, :rows].view(torch.float32)
        logits = self.logits[:rows]

        def compute():
            if columns:
                # as if the columns were full: an empty cache would have no mask; the mask's values
                # come from `pos`, on the device
                cache.max_pos = min(columns, cache.max_length) - 1
                tokens, lengths = self.inputs[:2, :rows].long()
                logits.copy_(forward(tokens[:, None], cache=cache, lengths=lengths))
            if work is not None:
                allowed = logits.masked_fill(self.suppressed, -math.inf)
                self.tokens[:rows] = sample_rows(allowed, settings, work)

        self.inputs.zero_()
        self.graphs[step], _ = capture(compute, self.inputs.device, self.pool)

    def read_tokens(self, rows: list[int]) -> list[int]:
        self.host_tokens.copy_(self.tokens, non_blocking=True)
        if self.tokens.is_cuda:
            torch.cuda.current_stream(self.tokens.device).synchronize()
        tokens = self.host_tokens.tolist()
        return [tokens[row] for row in rows]


# -----------------------------------------------------------------------------
# kept for the next generate()

KEPT: weakref.WeakKeyDictionary[GPT, DecodeGraphs] = weakref.WeakKeyDictionary()


def keep_graphs(model: GPT, graphs: DecodeGraphs | None) -> None:
    """Keep the last cache of a model with its graphs, so that they are not captured again."""
    if graphs:
        KEPT[model] = graphs


def take_graphs(model: GPT, rows: int, max_length: int) -> DecodeGraphs | None:
    """The kept graphs of a model, their cache emptied; if the cache is too small or the weights
    have moved, the graphs are freed instead.

    The values of the weights may have changed, as in training: graphs read them at their address.
    """
    graphs = KEPT.pop(model, None)
    if graphs is None or graphs.weights != weights_of(model):
        return None
    if graphs.cache.pos.numel() < rows or graphs.cache.max_length < max_length:
        return None
    graphs.reset()
    return graphs


def free_graphs(model: GPT) -> None:
    """Free the memory of a model's kept cache and graphs."""
    KEPT.pop(model, None)


def weights_of(model: GPT) -> tuple:
    """What the graphs of a model depend on: the dtype of products and the addresses of weights."""
    weight = model.embedding.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return dtype, *(parameter.data_ptr() for parameter in model.parameters())
