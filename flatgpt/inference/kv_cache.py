"""The keys and values of the texts that are being written."""

import copy
import math

import torch

from flatgpt.runtime import to_device
from model import GPT


class KVCache:
    """Keys and values of the tokens each row has seen, so that a new token costs one token's work.

    Rows stand at their own positions and share nothing: `pos` (rows,) counts the tokens each holds.
    A forward pass of fewer rows continues the first ones. Nothing here is ever moved to other
    memory, so that cuda_graph.py can record a step as a CUDA graph.
    """

    def __init__(self, model: GPT, rows: int, length: int | None = None):
        c, weight = model.config, model.embedding.weight
        self.length = length or c.block_size
        # without AMX, torch's CPU kernel takes for one query in bfloat16 five times as long as in
        # float32; with it, less
        slow = weight.device.type == 'cpu' and not torch.cpu._is_amx_tile_supported()
        dtype = torch.float32 if slow else weight.dtype
        # the column after the last takes the keys of padding, which nothing ever reads
        shape = (c.n_layer, 2, rows, c.kv_heads, self.length + 1, c.n_embd // c.n_head)
        self.kv = torch.zeros(shape, device=weight.device, dtype=dtype)
        self.pos = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.rows = torch.arange(rows, device=weight.device)[:, None]  # (rows, 1)
        self.count = torch.arange(self.length, device=weight.device)
        self.zeros = torch.zeros(self.length, device=weight.device, dtype=dtype)
        self.span = 0  # no row holds more; kept on the host, so that no step waits for the device
        self.graphs = {}  # steps that cuda_graph.py recorded on this memory

    def columns(self, T: int) -> int:
        """How many a step of T more tokens attends over: on a GPU one of a few fixed counts."""
        stride = 16 if self.kv.device.type == 'cpu' else 256
        return min(self.length, -(-(self.span + T) // stride) * stride)

    def extend(self, B: int, T: int, lengths=None):
        """Make room for T more tokens in B rows, `lengths` of them real -> positions (B, T)."""
        assert self.span + T <= self.length, 'the cache is full'
        pos = self.pos[:B, None] + self.count[:T]
        self.slots = pos.clamp(max=self.length)
        if lengths is not None:
            self.slots = self.slots.where(self.count[:T] < lengths[:, None], self.length)
        self.mask = None  # rows that were empty attend to what they are given
        if self.span:
            unseen = self.count[: self.columns(T)] > pos[..., None]
            self.mask = self.zeros[: unseen.size(-1)].masked_fill(unseen, -math.inf)
            self.mask = self.mask[:, None]  # (B, 1, T, S), added to the scores
        self.pos[:B] += T if lengths is None else lengths
        self.span += T
        return pos.clamp(max=self.length - 1)  # a finished row that is still computed may be beyond

    def append(self, layer: int, k, v):
        """Store a layer's keys and values (B, G, T, D) -> all that is attended to, (B, G, S, D).

        Where every row was empty these are k and v themselves, causally.
        """
        B = k.size(0)
        both = torch.stack((k, v)).permute(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        self.kv[layer, :, self.rows[:B], :, self.slots] = both.to(self.kv.dtype)
        if self.mask is None:
            return k, v
        return self.kv[layer, :, :B, :, : self.mask.size(-1)].unbind()

    def part(self, rows: list[int], span: int) -> 'KVCache':
        """One row as a cache of its own, or several that are empty, on the same memory.

        span: how many tokens the row holds. Its owner has to set `pos` of the rows afterwards.
        """
        assert len(rows) == 1 or not span, 'rows that lie apart cannot be attended to together'
        part = copy.copy(self)
        part.kv = self.kv[:, :, rows[0] : rows[0] + 1] if len(rows) == 1 else self.kv
        if len(rows) == 1:
            part.rows = self.rows[:1]
        else:
            part.rows = to_device(torch.tensor(rows), self.rows.device)[:, None]
        part.pos, part.span, part.graphs = self.pos.new_full((len(rows),), span), span, {}
        return part

    def copy(self, source: int, target: int, count: int) -> None:
        """Have a row hold the first `count` tokens of another, or of its own."""
        if source != target:
            self.kv[:, :, target, :, :count] = self.kv[:, :, source, :, :count]
        self.set_pos(target, count)

    def set_pos(self, row: int, count: int) -> None:
        """A row holds so many tokens; an assignment to pos[row] would wait for a GPU."""
        self.pos[row].fill_(count)
