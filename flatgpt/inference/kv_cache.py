"""The KV cache: keys and values of the tokens of each row."""

import copy
import math

import torch

from flatgpt.runtime import to_device
from model import GPT


def cache_dtype(weights: torch.dtype, device: str) -> torch.dtype:
    """The dtype of keys and values.

    Without AMX, torch's CPU attention of one query takes five times as long in bfloat16 as in
    float32.
    """
    slow = device == 'cpu' and not torch.cpu._is_amx_tile_supported()
    return torch.float32 if slow else weights


class KVCache:
    """Keys and values of the tokens of each row, so that a new token costs one token's work.

    Rows are independent: `pos` (rows,) is the number of tokens each holds. An engine uses them as
    slots. A forward pass of fewer rows uses the first ones. Tensors are never reallocated, so that
    decode_graph.py can capture a step.
    """

    def __init__(self, model: GPT, rows: int, max_length: int | None = None):
        c, weight = model.config, model.embedding.weight
        self.stride = 16 if weight.device.type == 'cpu' else 256  # of columns(): few CUDA graphs
        self.max_length = max_length or c.block_size
        if weight.is_cuda:  # so that a later cache of another length has the same columns
            self.max_length = min(c.block_size, -(-self.max_length // self.stride) * self.stride)
        # whole strides, because torch rounds attention to an odd number of columns differently
        self.width = -(-self.max_length // self.stride) * self.stride
        dtype = cache_dtype(weight.dtype, weight.device.type)
        # one more column takes the keys and values of padding, which are never read
        shape = (c.n_layer, 2, rows, c.kv_heads, self.width + 1, c.n_embd // c.n_head)
        self.kv = torch.zeros(shape, device=weight.device, dtype=dtype)
        self.pos = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.row_ids = torch.arange(rows, device=weight.device)[:, None]  # (rows, 1)
        self.arange = torch.arange(self.width, device=weight.device)
        self.zeros = torch.zeros(self.width, device=weight.device, dtype=dtype)
        self.max_pos = 0  # upper bound of pos, on the host, so that no step waits for the device

    def columns(self, T: int) -> int:
        """How many columns T more tokens attend to, rounded up."""
        return -(-(self.max_pos + T) // self.stride) * self.stride

    def extend(self, B: int, T: int, lengths=None):
        """Make room for T more tokens in B rows, `lengths` of them real -> positions (B, T)."""
        assert self.max_pos + T <= self.max_length, 'the cache is full'
        pos = self.pos[:B, None] + self.arange[:T]
        self.write_columns = pos.clamp(max=self.width)
        if lengths is not None:
            is_real = self.arange[:T] < lengths[:, None]
            self.write_columns = self.write_columns.where(is_real, self.width)
        self.mask = None  # for empty rows: plain causal attention
        if self.max_pos:
            unseen = self.arange[: self.columns(T)] > pos[..., None]
            self.mask = self.zeros[: unseen.size(-1)].masked_fill(unseen, -math.inf)
            self.mask = self.mask[:, None]  # (B, 1, T, S), added to the scores
        self.pos[:B] += T if lengths is None else lengths
        self.max_pos += T
        return pos.clamp(max=self.max_length - 1)  # a free row may be past the end

    def append(self, layer: int, k, v):
        """Store a layer's keys and values (B, G, T, D) -> all keys and values (B, G, S, D).

        If every row was empty these are k and v, for causal attention.
        """
        B = k.size(0)
        both = torch.stack((k, v)).permute(1, 3, 0, 2, 4)  # (B, T, 2, G, D)
        self.kv[layer, :, self.row_ids[:B], :, self.write_columns] = both.to(self.kv.dtype)
        if self.mask is None:
            return k, v
        return self.kv[layer, :, :B, :, : self.mask.size(-1)].unbind()

    def unpack(self, q):
        """Queries (B, H, T, D) of one forward pass, a row of them for each row of the cache."""
        return q

    def pack(self, y):
        """The opposite of unpack()."""
        return y

    def view(self, rows: list[int], max_pos: int) -> 'KVCache':
        """A view of one row, or of several empty ones, as a cache of its own.

        max_pos: tokens in the row. The caller must set `pos` of the rows afterwards.
        """
        assert len(rows) == 1 or not max_pos, 'several rows must be empty'
        view = copy.copy(self)
        view.kv = self.kv[:, :, rows[0] : rows[0] + 1] if len(rows) == 1 else self.kv
        if len(rows) == 1:
            view.row_ids = self.row_ids[:1]
        else:
            view.row_ids = to_device(torch.tensor(rows), self.row_ids.device)[:, None]
        view.pos = self.pos.new_full((len(rows),), max_pos)
        view.max_pos = max_pos
        return view

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of a row to another, or truncate it to them."""
        if source != target:
            self.kv[:, :, target, :, :count] = self.kv[:, :, source, :, :count]
        self.set_pos(target, count)

    def set_pos(self, row: int, count: int) -> None:
        """Set the number of tokens in a row; pos[row] = count would wait for the GPU."""
        self.pos[row].fill_(count)

    def clear_columns(self, row: int, begin: int, end: int) -> None:
        """Overwrite entries that may not be finite: a mask does not hide NaN."""
        self.kv[:, :, row, :, begin:end] = 0


class PackedCache:
    """A view of a cache for one forward pass of several tokens of some rows, without padding.

    The N tokens are packed into one row (1, N): the matrices are applied to these alone, and only
    attention has a row for each row of the cache. `pos` of the cache is left as it was.
    places: (row of the cache, tokens in it). counts: new tokens of each, at least one.
    """

    def __init__(self, cache: KVCache, places: list[tuple[int, int]], counts: list[int]):
        self.kv, device = cache.kv, cache.kv.device
        self.shape = max(places)[0] + 1, max(counts)  # of attention: (R, T)
        packed, first, longest = [], [0] * self.shape[0], 0
        for (row, start), count in zip(places, counts, strict=True):
            packed += [(row, start + t, t) for t in range(count)]
            first[row], longest = start, max(longest, start + count)
        self.rows, self.columns, self.steps = to_device(torch.tensor(packed).T.contiguous(), device)
        pos = to_device(torch.tensor(first), device)[:, None] + cache.arange[: self.shape[1]]
        width = -(-longest // cache.stride) * cache.stride  # whole strides, see above
        unseen = cache.arange[:width] > pos[..., None]
        self.mask = cache.zeros[:width].masked_fill(unseen, -math.inf)[:, None]  # (R, 1, T, S)

    def extend(self, B: int, T: int, lengths=None):
        """Positions (1, N) of the tokens."""
        return self.columns[None]

    def append(self, layer: int, k, v):
        """Store a layer's keys and values (1, G, N, D) -> all of the rows (R, G, S, D)."""
        both = torch.stack((k[0], v[0])).permute(2, 0, 1, 3)  # (N, 2, G, D)
        self.kv[layer, :, self.rows, :, self.columns] = both.to(self.kv.dtype)
        return self.kv[layer, :, : self.shape[0], :, : self.mask.size(-1)].unbind()

    def unpack(self, q):
        """(1, H, N, D) -> (R, H, T, D), zeros where a row has fewer tokens."""
        R, T = self.shape
        rows = q.new_zeros(R, T, q.size(1), q.size(3))
        rows[self.rows, self.steps] = q[0].transpose(0, 1)
        return rows.transpose(1, 2)

    def pack(self, y):
        """(R, H, T, D) -> (1, H, N, D)."""
        return y.transpose(1, 2)[self.rows, self.steps].transpose(0, 1)[None]
