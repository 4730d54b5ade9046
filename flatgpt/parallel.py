"""
One model sharded over several processes (FSDP2). For replicated models train.py uses DDP.

    model = apply_fsdp(raw_model, runtime, offload=False)

The parameters of a sharded model, their gradients and the optimizer state are DTensors, sharded by
rows in equal chunks, rounded up: the last ranks may have fewer rows, or none. The parameters of a
block are gathered while it is computed, and then freed. Embeddings, head and last norm are sharded
together at the root, where GPT-2's tied matrix is one parameter (Zhao et al. 2023, FSDP).
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, cycle, groupby

import torch
import torch.distributed as dist

from flatgpt.runtime import Runtime
from model import GPT


def apply_fsdp(model: GPT, runtime: Runtime, offload: bool = False):
    """Shard a model in place over all processes.

    offload: keep the shards in host memory, and so the optimizer state.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    how = {'mesh': init_device_mesh(runtime.device_type, (runtime.world_size,))}
    if offload:
        how['offload_policy'] = CPUOffloadPolicy()
    for block in model.blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def compile_blocks(model: GPT, runtime: Runtime, print0: Callable) -> bool:
    """Compile the blocks of a model in place, before it is sharded -> whether that works here.

    Tests on a small model first: a failure in a sharded model would leave parameters gathered.
    """
    small = GPT(replace(model.config, n_layer=1, vocab_size=64)).to(runtime.device)
    x = torch.zeros(1, model.config.block_size, dtype=torch.long, device=runtime.device)
    batches = [{'x': x, 'y': x}]
    _, works = runtime.try_compile(small, batches, print0, lambda m, x, y: m(x, y)[1])
    for block in model.blocks if works else ():
        block.compile(dynamic=False)
    return works


def sync_gradients(model, last: bool) -> None:
    """Synchronize gradients in the next backward pass only if it is the last of the step."""
    if hasattr(model, 'set_requires_gradient_sync'):
        model.set_requires_gradient_sync(last)
    else:
        model.require_backward_grad_sync = last  # as DDP's no_sync() does


def reshard(model) -> None:
    """Free gathered parameters: those of the root stay gathered after an evaluation."""
    if hasattr(model, 'reshard'):
        model.reshard()


def to_local(tensor):
    """This rank's rows of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def full_tensor(tensor):
    """All rows of a tensor. A collective: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def weights_are_finite(model: GPT, runtime: Runtime) -> bool:
    """Whether all weights of all ranks are finite. A collective: every rank must call it."""
    bad = any(not to_local(p.detach()).isfinite().all() for p in model.parameters())
    return runtime.all_reduce([bad], 'MAX')[0] == 0


def shard_like(full, like):
    """`full`, sharded like the tensor `like` and on its device; unchanged if `like` is not sharded.

    Not a collective.
    """
    if not hasattr(like, 'device_mesh'):
        return full
    from torch.distributed.tensor import distribute_tensor

    # shards on the GPU, even for offloaded tensors
    rows = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return rows.to(to_local(like).device)


def compute_device(tensor) -> torch.device:
    """The device to compute with a tensor on: the GPU of this process if it is offloaded."""
    mesh = getattr(tensor, 'device_mesh', None)
    if mesh is None or mesh.device_type == to_local(tensor).device.type:
        return to_local(tensor).device
    return torch.device(mesh.device_type)


class MatrixExchange:
    """Gathers sharded matrices so that each is whole on one rank, and scatters the results.

    Each rank gets a share of the matrices: it receives their rows from the other ranks, and sends
    each of them its rows of that rank's share. A flat tensor has this rank's rows of one matrix
    after the other, in the order of `parameters`: the first rank's share, then the second's.
    Without sharding, the only share has all matrices.
    """

    def __init__(self, matrices: list):
        mesh, ranks = getattr(matrices[0], 'device_mesh', None), shard_count(matrices[0])
        rank = mesh.get_local_rank() if mesh else 0
        self.group = mesh.get_group() if ranks > 1 else None
        shares = [matrices[each::ranks] for each in range(ranks)]
        self.parameters = [*chain(*shares)]
        # (N, R, C) of the stacks of this rank's share: adjacent matrices of equal shape
        self.shapes = [(len([*n]), *shape) for shape, n in groupby(m.shape for m in shares[rank])]
        rows = {size: rows_per_rank(size, ranks) for size in {m.size(0) for m in matrices}}
        # elements of this rank's stacks, by rank; of this rank's rows, by share
        self.stacks = [[n * rows[r][each] * c for n, r, c in self.shapes] for each in range(ranks)]
        self.rows = [sum(rows[m.size(0)][rank] * m.size(1) for m in share) for share in shares]

    def gather(self, flat) -> list:
        """This rank's rows, flat -> the stacks (N, R, C) of its share. A collective."""
        flat = self._exchange(flat, self.rows, [sum(sizes) for sizes in self.stacks])
        parts, count = flat.split([*chain(*self.stacks)]), len(self.shapes)
        parts = [
            part.view(n, part.numel() // (n * columns), columns)
            for part, (n, _, columns) in zip(parts, cycle(self.shapes))
        ]
        return [torch.cat(parts[i::count], dim=1) for i in range(count)] if self.group else parts

    def scatter(self, stacks: list, like):
        """The inverse of gather(): flat, like the tensor `like` in dtype. A collective."""
        ranks = len(self.stacks)
        parts = [stack.split(rows_per_rank(stack.size(1), ranks), dim=1) for stack in stacks]
        parts = [part.flatten() for of_rank in zip(*parts, strict=True) for part in of_rank]
        flat = torch.cat(parts) if parts else like[:0]
        return self._exchange(flat, [sum(sizes) for sizes in self.stacks], self.rows)

    def sum_over_ranks(self, tensor):
        """The sum over all ranks, of what each has of its rows. A collective."""
        if self.group:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _exchange(self, flat, sizes: list[int], received: list[int]):
        """Send `sizes[r]` elements to each rank r, receive `received[r]` from it."""
        if not self.group:
            return flat
        result = flat.new_empty(sum(received))
        dist.all_to_all_single(result, flat, received, sizes, group=self.group)
        return result


def shard_count(tensor) -> int:
    """How many ranks a tensor is sharded over, 1 if it is not sharded."""
    return tensor.device_mesh.size() if hasattr(tensor, 'device_mesh') else 1


def rows_per_rank(rows: int, ranks: int) -> list[int]:
    """How many rows of a sharded tensor each rank has."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]
