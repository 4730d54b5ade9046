"""
What a run will need of memory, before it is there.

    case = case_of(config, shape, runtime)
    needs = rehearse(case)                       # {'parameters': bytes, 'gradients': ..., ...}
    print(report(case, runtime))

A few steps are computed by model.py and optim.py themselves on tensors without numbers, and a
ledger notes when each is made and dropped: all that autograd keeps is in it, whatever the
architecture. What lies where is then laid out as the C library would. A sharded model is rehearsed
as one rank sees it, with the rows of the others coming and going.
"""

import math
import os
import re
import weakref
from bisect import bisect_left, insort
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from optim import build_optimizers, orthogonalize, wide
from runtime import Runtime
from saver import SMALL

LATER = 60e6  # bytes that libraries take between here and the end of a run, measured on Linux
LATER_RANKS = 40e6  # and more of them where there are several processes
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
TINY = 1024  # bytes; what is smaller lies in the gaps
GIBI = 2**30


@dataclass(frozen=True)
class Case:
    """All that the memory of one process depends on."""

    shape: GPTConfig
    device: str  # 'cpu', 'cuda' or 'mps'
    dtype: torch.dtype
    optimizer: str
    rows: int  # computed at a time
    parts: int = 1  # micro-batches per update
    ranks: int = 1
    shard: bool = False
    offload: bool = False
    recompute: bool = False  # gradient checkpointing
    adapt: tuple | None = None  # rank and targets of LoRA
    freeze: int | None = None
    saves: bool = True  # checkpoints while it trains, not just at the end

    def batch(self) -> int:
        """Sequences per update and process."""
        return self.rows * self.parts


def case_of(config: dict, shape: GPTConfig, runtime: Runtime) -> Case:
    """The case of these settings on this machine."""
    batch, rows = runtime.share(
        config['gradient_accumulation_steps'] * config['batch_size'], config['batch_size']
    )
    every = [config[name] for name in ('eval_interval', 'save_interval') if config[name]]
    rank = config.get('lora_rank')
    return Case(
        shape=shape,
        device=runtime.device_type,
        dtype=runtime.dtype,
        optimizer=config['optimizer'],
        rows=rows,
        parts=batch // rows,
        ranks=runtime.world_size,
        shard=config['shard'],
        offload=config['offload'],
        recompute=config.get('gradient_checkpointing', False),
        adapt=(rank, config['lora_targets']) if rank else None,
        freeze=config.get('freeze'),
        saves=min(every, default=math.inf) < config['max_iters'],
    )


def parameters(case: Case) -> tuple[int, int]:
    """How many there are, and how many of them are trained."""
    with FakeTensorMode():
        model = build(case)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def build(case: Case, dtype: torch.dtype = torch.float32) -> GPT:
    # what a random number is has torch import 800 modules for it
    with mock.patch('torch.nn.init.normal_'), mock.patch('torch.nn.init.kaiming_uniform_'):
        with torch.device(case.device), default_dtype(dtype):
            model = GPT(case.shape)
        if case.adapt:
            from lora import add_lora

            rank, targets = case.adapt
            add_lora(model, rank, rank, 0.0, targets, case.freeze or 0)
        elif case.freeze is not None:
            model.freeze_lower(case.freeze)
    model.trunk.recompute = case.recompute
    return model.train()


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -----------------------------------------------------------------------------
# a rehearsal


class Ledger(TorchDispatchMode):
    """Notes every tensor's size when it is made, and when it goes.

    events: (number, bytes), the bytes negative for one that goes; None between two phases.
    most: bytes of each kind at the moment when most is held.
    """

    def __init__(self):
        super().__init__()
        self.events: list[tuple[int, int] | None] = []
        self.kind, self.held, self.most = 'parameters', Counter(), Counter()
        self._entries, self._number = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage, counted: bool = True) -> None:
        key = storage._cdata
        if key in self._entries:
            return
        size = storage.nbytes() if counted else 0
        self._number += 1
        self._entries[key] = self._number, size, self.kind
        weakref.finalize(storage, self.drop, key)
        self.events.append((self._number, size))
        self.held[self.kind] += size
        if self.held.total() > self.most.total():
            self.most = self.held.copy()

    def drop(self, key: int) -> None:
        number, size, kind = self._entries.pop(key)
        self.events.append((number, -size))
        self.held[kind] -= size

    def rename(self, tensor, kind: str) -> None:
        """A tensor turns out to be of another kind than was thought."""
        key = tensor.untyped_storage()._cdata
        number, size, before = self._entries[key]
        self._entries[key] = number, size, kind
        self.held[before] -= size
        self.held[kind] += size

    def phase(self, kind: str) -> None:
        """What is made from here on is of this kind."""
        self.kind = kind
        self.events.append(None)


def rehearse(case: Case) -> Ledger:
    """A few steps of a run, one process of it, on tensors without numbers."""
    ledger = Ledger()
    with FakeTensorMode():
        if case.shard:
            run = Sharded(case, ledger)
        else:
            with ledger:
                run = Whole(case, ledger)
        with ledger:
            idx = torch.zeros(case.rows, case.shape.block_size, dtype=torch.long).to(case.device)
            copies = []
            for step in range(3 if case.saves else 2):
                for part in range(min(case.parts, 2)):
                    run.last = part == min(case.parts, 2) - 1
                    ledger.phase('activations')
                    with torch.autocast(
                        case.device, case.dtype, enabled=case.dtype != torch.float32
                    ):
                        loss = run.model(idx, idx)[1]
                    ledger.phase('activations')
                    loss.backward()
                    del loss
                run.update()
                if step == 1:
                    ledger.phase('a copy to save')
                    state = run.state()
                    if case.device == 'cpu' and sum(t.nbytes for t in state) >= SMALL:
                        copies += [torch.empty_like(tensor) for tensor in state]
                    del state
            ledger.phase('activations')
    return ledger


class Whole:
    """A model that is whole in every process."""

    def __init__(self, case: Case, ledger: Ledger):
        self.model, self.ledger = build(case), ledger
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.rename(p.grad, 'gradients')
            )
        self.optimizers = optimizers_of(case, self.model)
        ledger.kind = 'gradients'
        left = sum(p.nbytes for p in self.trained) if case.ranks > 1 else 0
        self.buckets = [
            torch.empty(min(BUCKET, left - start), dtype=torch.uint8, device=case.device)
            for start in range(0, left, BUCKET)
        ]

    def update(self) -> None:
        self.ledger.phase('activations')
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.ledger.phase('optimizer')
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def state(self) -> list:
        """What a checkpoint holds."""
        kept = [value for each in self.optimizers for s in each.state.values() for value in s.values()]
        return [*self.model.parameters(), *kept]


class Sharded:
    """One rank's rows of a model: the whole ones come and go as FSDP2 has them."""

    def __init__(self, case: Case, ledger: Ledger):
        self.case, self.ledger, self.last = case, ledger, True
        self.model = build(case, case.dtype)  # the rows travel in it
        self.units = [list(block.parameters()) for block in self.model.blocks]
        inside = {id(p) for unit in self.units for p in unit}
        self.root = [p for p in self.model.parameters() if id(p) not in inside]
        for parameter in self.model.parameters():  # others' rows: counted when they are gathered
            ledger.note(parameter.untyped_storage(), counted=False)
        self.whole, self.sums, self.grads, self.states = {}, {}, [], []
        with ledger:
            self.rows = [self.share(p) for p in self.model.parameters()]
        for block, unit in zip(self.model.blocks, self.units, strict=True):
            block.register_forward_pre_hook(lambda *_, unit=unit: self.gather(unit))
            block.register_forward_hook(lambda *_, unit=unit: self.let_go(unit))
            block.register_full_backward_pre_hook(lambda *_, unit=unit: self.gather(unit))
        self.model.register_forward_pre_hook(lambda *_: self.gather(self.root))
        for unit in (*self.units, self.root):
            for parameter in unit:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, unit=unit: self.scatter(unit)
                )

    def share(self, parameter, dtype=torch.float32):
        """An empty tensor as large as this rank's rows."""
        rows = -(-parameter.size(0) // self.case.ranks)
        return torch.empty((rows, *parameter.shape[1:]), dtype=dtype, device=self.case.device)

    def flat(self, unit, dtype):
        count = sum(p.numel() for p in unit if p.requires_grad or dtype != torch.float32)
        return torch.empty(count, dtype=dtype, device=self.case.device)

    def gather(self, unit) -> None:
        if id(unit) not in self.whole:
            kind, self.ledger.kind = self.ledger.kind, 'parameters'
            received = self.flat(unit, self.case.dtype)  # from all ranks, and then in order
            self.whole[id(unit)] = [torch.empty_like(p) for p in unit]
            del received
            self.ledger.kind = kind

    def let_go(self, unit) -> None:
        self.whole.pop(id(unit), None)

    def scatter(self, unit) -> None:
        """Once all gradients of a unit are there: to the ranks, or into this rank's sum."""
        trained = [p for p in unit if p.requires_grad]
        if any(p.grad is None for p in trained):
            return
        kind, self.ledger.kind = self.ledger.kind, 'gradients'
        if not self.last:
            self.sums.setdefault(id(unit), self.flat(unit, torch.float32))
        else:
            sent = self.sums.pop(id(unit), None)
            sent = self.flat(unit, torch.float32)
            self.grads += [self.share(p) for p in trained]
            del sent
        for parameter in trained:
            parameter.grad = None
        self.let_go(unit)
        self.ledger.kind = kind

    def update(self) -> None:
        self.ledger.phase('optimizer')
        trained = [p for p in self.model.parameters() if p.requires_grad]
        muon = self.model.block_matrices() if self.case.optimizer == 'muon' else []
        alike, ids = {}, {id(p) for p in muon}
        for parameter in muon:
            alike.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        if not self.states:
            for parameter in trained:
                self.states += [self.share(parameter) for _ in range(1 if id(parameter) in ids else 2)]
        for matrices in alike.values():
            stack = [wide(torch.empty_like(p, dtype=torch.bfloat16)) for p in matrices]
            orthogonalize(torch.stack(stack))
        self.grads.clear()

    def state(self) -> list:
        return [*self.rows, *self.states]


def optimizers_of(case: Case, model: GPT) -> list:
    return build_optimizers(
        case.optimizer,
        model,
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        muon_lr=1e-3,
        muon_momentum=0.9,
        weight_decay=0.0,
    )


# -----------------------------------------------------------------------------
# the heap


class Heap:
    """Where glibc puts what a CPU computes with, when it gives nothing back (keep_freed_memory()).

    The smallest hole that is large enough, cut to size, or else the end; free neighbours become
    one. What aligning takes beside a block is soon some small object's, and free again only after
    the phase: so a hole never takes a tensor of its own size, of which there are many.
    """

    SLACK = 96  # an alignment of 64 and the least that malloc(3) leaves over

    def __init__(self):
        self.end, self.blocks, self.slack = 0, {}, []
        self.holes, self.sizes, self.ends = [], {}, {}  # (size, start) sorted; start: size; end: start

    def play(self, events: list) -> int:
        """How far the heap has grown, in bytes, after these events."""
        for event in events:
            if event is None:
                for start, size in self.slack:
                    self.release(start, size)
                self.slack.clear()
            elif event[1] >= TINY:
                self.take(*event)
            elif event[1] <= -TINY:
                self.release(*self.blocks.pop(event[0]))
        return self.end

    def take(self, number: int, size: int) -> None:
        size = -(-(size + 8) // 16) * 16
        at = bisect_left(self.holes, (size + self.SLACK, 0))
        if at < len(self.holes):
            found, start = self.holes[at]
            self.remove(start)
        else:
            found, start = size + self.SLACK, self.end
            self.end += found
        self.blocks[number] = start, size
        self.slack.append((start + size, self.SLACK))
        if found > size + self.SLACK:
            self.release(start + size + self.SLACK, found - size - self.SLACK)

    def release(self, start: int, size: int) -> None:
        if start in self.ends:
            before = self.ends[start]
            size += self.remove(before)
            start = before
        if start + size in self.sizes:
            size += self.remove(start + size)
        insort(self.holes, (size, start))
        self.sizes[start], self.ends[start + size] = size, start

    def remove(self, start: int) -> int:
        size = self.sizes.pop(start)
        del self.ends[start + size]
        self.holes.pop(bisect_left(self.holes, (size, start)))
        return size
