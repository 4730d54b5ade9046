"""
The steps of a run without their numbers: what lies in memory when, found out before it is there.

    ledger = rehearse(Case(shape=GPTConfig(...), device='cpu', dtype=torch.float32, ...))
    ledger.most                     # bytes of each kind at the moment when most is held
    Heap().play(ledger.events)      # and how far the C library's heap grows for that

They are computed by model.py and optim.py themselves, on tensors that have shapes and nothing in
them, while a ledger notes when each is made and dropped: so all that autograd keeps is in it,
whatever the architecture. Of a sharded model it is what one rank sees, the rows of the others
coming and going.
"""

import gc
import weakref
from bisect import bisect_left, insort
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatgpt.checkpoint.save import SMALL
from flatgpt.errors import as_config_error
from flatgpt.lora import add_lora
from flatgpt.training.loss import loss_of
from flatgpt.training.optim import build_optimizers, orthogonalize, wide
from model import GPT, GPTConfig

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
TINY = 1024  # bytes; what is smaller lies in the gaps
BACKWARD, AGAIN = 'backward', 'a block again'  # of what events tell


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
    objective: str = 'lm'
    saves: bool = True  # checkpoints while it trains, not just at the end


def build(case: Case, dtype: torch.dtype = torch.float32) -> GPT:
    # what a random number is has torch import 800 modules for it
    with mock.patch('torch.nn.init.normal_'), mock.patch('torch.nn.init.kaiming_uniform_'):
        with torch.device(case.device), default_dtype(dtype):
            model = GPT(case.shape)
        if case.adapt:
            rank, targets = case.adapt
            add_lora(model, rank, rank, 0.0, targets, case.freeze or 0)
        elif case.freeze is not None:
            with as_config_error():
                model.freeze_lower(case.freeze)
    model.trunk.recompute = case.recompute
    if case.device != 'meta':
        gc.collect()  # what tying has replaced, in a cycle with its module
    return model.train()


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Ledger(TorchDispatchMode):
    """Notes every tensor's size when it is made, and when it goes.

    events: (number, bytes), the bytes negative for one that goes; or the name of a phase.
    most: bytes of each kind at the moment when most is held.
    """

    def __init__(self):
        super().__init__()
        self.events: list[tuple[int, int] | str] = []
        self.kind, self.held, self.most = 'parameters', Counter(), Counter()
        self._entries, self._number = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return
        size = storage.nbytes() if counted and tensor.device.type != 'meta' else 0
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

    def phase(self, name: str, kind: str = 'activations') -> None:
        """What is made from here on is of this kind."""
        self.kind = kind
        self.events.append(name)


def rehearse(case: Case) -> Ledger:
    """A few steps of a run, one process of it, on tensors without numbers."""
    ledger = Ledger()
    from torch._subclasses.fake_tensor import FakeTensorMode  # a fifth of a second to import

    with FakeTensorMode():
        if case.shard:
            run = Sharded(case, ledger)
        else:
            with ledger:
                run = Whole(case, ledger)
        with ledger:
            batch = batch_of(case)
            copies = []
            for step in range(3 if case.saves else 2):
                for part in range(min(case.parts, 2)):
                    run.last = part == min(case.parts, 2) - 1
                    ledger.phase('forward')
                    with torch.autocast(
                        case.device, case.dtype, enabled=case.dtype != torch.float32
                    ):
                        loss = loss_of(run.model, *batch)
                    ledger.phase(BACKWARD)
                    loss.backward()
                    del loss
                run.update()
                if step == 1:
                    ledger.phase('saving', 'copy to save')
                    state = run.state()
                    if case.device == 'cpu' and sum(t.nbytes for t in state) >= SMALL:
                        copies += [torch.empty_like(tensor) for tensor in state]
                    del state
            ledger.phase('end')
    return ledger


def batch_of(case: Case) -> list:
    """What loss_of() takes besides the model."""
    pairs = case.objective == 'dpo'
    rows = case.rows * (1 + pairs)
    idx = torch.zeros(rows, case.shape.block_size, dtype=torch.long, device=case.device)
    return [idx, idx, torch.zeros(rows, device=case.device), 0.1] if pairs else [idx, idx]


class Whole:
    """A model that is whole in every process."""

    def __init__(self, case: Case, ledger: Ledger):
        self.model, self.ledger = build(case), ledger
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: ledger.rename(p.grad, 'gradients')
            )
        for block in self.model.blocks if case.recompute else ():
            block.register_forward_pre_hook(lambda *_: ledger.events.append(AGAIN))
        self.optimizers = optimizers_of(case, self.model)
        ledger.kind = 'gradients'
        left = sum(p.nbytes for p in self.trained) if case.ranks > 1 else 0
        self.buckets = [
            torch.empty(min(BUCKET, left - start), dtype=torch.uint8, device=case.device)
            for start in range(0, left, BUCKET)
        ]

    def update(self) -> None:
        self.ledger.phase('clip')
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.ledger.phase('update', 'optimizer')
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def state(self) -> list:
        """What a checkpoint holds."""
        kept = [
            value for each in self.optimizers for s in each.state.values() for value in s.values()
        ]
        return [*self.model.parameters(), *kept]


class Sharded:
    """One rank's rows of a model: the whole ones come and go as FSDP2 has them."""

    def __init__(self, case: Case, ledger: Ledger):
        self.case, self.ledger, self.last = case, ledger, True
        self.model = build(case)
        self.units = [list(block.parameters()) for block in self.model.blocks]
        self.order = {id(unit): i for i, unit in enumerate(self.units)}
        inside = {id(p) for unit in self.units for p in unit}
        self.root = [p for p in self.model.parameters() if id(p) not in inside]
        for parameter in self.model.parameters():  # others' rows: counted when they are gathered
            ledger.note(parameter, counted=False)
        self.whole, self.sums, self.grads, self.states = {}, {}, [], []
        self.received = self.sent = None
        with ledger:
            # train.py has every rank make the whole model first, on the host
            built = build(case) if case.device == 'cpu' else None
            self.rows = [self.share(p) for p in self.model.parameters()]
            del built
        for block, unit in zip(self.model.blocks, self.units, strict=True):
            block.register_forward_pre_hook(lambda *_, unit=unit: self.gather(unit))
            if case.recompute:
                block.register_forward_pre_hook(lambda *_: ledger.events.append(AGAIN))
            block.register_forward_hook(lambda _, __, y, unit=unit: self.leave(unit, y))
        self.model.register_forward_pre_hook(lambda *_: self.gather(self.root))
        for unit in (*self.units, self.root):
            for parameter in (p for p in unit if p.requires_grad):
                parameter.register_post_accumulate_grad_hook(
                    lambda p, unit=unit: self.scatter(unit)
                )

    def share(self, parameter):
        """An empty tensor as large as this rank's rows, where those are kept."""
        rows = -(-parameter.size(0) // self.case.ranks)
        device = 'meta' if self.case.offload else self.case.device
        return torch.empty((rows, *parameter.shape[1:]), device=device)

    def flat(self, unit, dtype):
        count = sum(p.numel() for p in unit if p.requires_grad or dtype != torch.float32)
        return torch.empty(count, dtype=dtype, device=self.case.device)

    def gather(self, unit) -> None:
        if id(unit) not in self.whole:
            kind, self.ledger.kind = self.ledger.kind, 'parameters'
            # what came from all ranks, then in order; FSDP keeps the former until the next comes
            self.received = self.flat(unit, torch.float32)
            self.whole[id(unit)] = [torch.empty_like(p) for p in unit]
            self.ledger.kind = kind

    def leave(self, unit, output) -> None:
        """A block is computed; its gradient will need it again."""
        self.let_go(unit)
        if output.requires_grad:
            output.register_hook(lambda _: self.gather_back(unit))

    def gather_back(self, unit) -> None:
        """Going backwards, the block before is on its way already."""
        for each in self.units[max(0, self.order[id(unit)] - 1) : self.order[id(unit)] + 1][::-1]:
            self.gather(each)

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
            self.sums.pop(id(unit), None)
            sent = self.flat(unit, torch.float32)
            summed = torch.empty_like(sent) if self.case.device == 'cpu' else None  # gloo's own
            self.grads += [self.share(p) for p in trained]
            self.sent = sent, summed  # and these until the next go
            del sent, summed
        for parameter in trained:
            parameter.grad = None
        self.let_go(unit)
        self.ledger.kind = kind

    def update(self) -> None:
        self.sent = self.received = None
        self.ledger.phase('update', 'optimizer')
        trained = [p for p in self.model.parameters() if p.requires_grad]
        muon = self.model.block_matrices() if self.case.optimizer == 'muon' else []
        alike, ids = {}, {id(p) for p in muon}
        for parameter in muon:
            alike.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
        if not self.states:
            for parameter in trained:
                self.states += [
                    self.share(parameter) for _ in range(1 if id(parameter) in ids else 2)
                ]
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
    one. What aligning takes beside a block is soon some small object's, of autograd or Python: so a
    hole does not take a tensor of its own size until that is gone too.
    """

    SLACK = 96  # an alignment of 64 and the least that malloc(3) leaves over

    def __init__(self):
        self.end = 0
        self.holes, self.sizes, self.ends = [], {}, {}  # (size, start), start: size, end: start
        self.blocks, self.beside = {}, []  # number: (start, size); (number, start, size) of slack
        self.backward = False
        self.kept, self.first = [], 0  # slack beside the forward pass's, and its first number

    def play(self, events: list) -> int:
        """How far the heap has grown, in bytes, after these events."""
        for event in events:
            if isinstance(event, str):
                self.turn(event)
            elif event[1] >= TINY:
                self.take(*event)
            elif event[1] <= -TINY:
                number = event[0]
                self.release(*self.blocks.pop(number))
                while number >= self.first and self.kept and self.kept[-1][0] > number:
                    self.release(*self.kept.pop()[1:])
        return self.end

    def turn(self, phase: str) -> None:
        """What is small goes with the pass that made it; what the forward pass made, backwards.

        Gradient checkpointing drops it block by block, but for a quarter: fitted to measured runs.
        """
        gone, stays = self.beside, []
        if phase == AGAIN:
            few = () if self.backward else gone
            stays = [each for each in few if each[0] % 4 == 0]
            gone = [each for each in gone if self.backward or each[0] % 4]
        elif phase == BACKWARD:
            gone, self.kept = self.kept, gone
            self.first = self.kept[0][0] if self.kept else 0
        else:
            gone, self.kept = gone + self.kept, []
        if phase != AGAIN:
            self.backward = phase == BACKWARD
        for _, start, size in gone:
            self.release(start, size)
        self.beside = stays

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
        self.beside.append((number, start + size, self.SLACK))
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
