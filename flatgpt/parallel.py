"""
One model over several processes, each holding its share of the rows (FSDP2). Where the model is
whole in each of them, train.py wraps it in DDP.

    model = apply_fsdp(raw_model, runtime, offload=False)

The parameters of a sharded model, their gradients and the optimizer's state are DTensors: the rows
are dealt out in equal runs, rounded up, so that the last ranks may have fewer, or none. A block's
rows are brought together while it is computed, and then dropped. Embeddings, head and last norm
stay together at the root, where GPT-2's tied matrix is one parameter (Zhao et al. 2023, FSDP).
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from flatgpt.runtime import Runtime
from model import GPT


def apply_fsdp(model: GPT, runtime: Runtime, offload: bool = False):
    """Cut a model in place into rows, to be trained by all processes together.

    offload: keep the rows, and the optimizer, on the host.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    how = {'mesh': init_device_mesh(runtime.device_type, (runtime.world_size,))}
    if offload:
        how['offload_policy'] = CPUOffloadPolicy()
    for block in model.blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def compile_blocks(model: GPT, runtime: Runtime, say: Callable) -> bool:
    """Compile the blocks of a model that is to be cut, in place -> whether that can be done here.

    Tried on a small one: where compiling fails, rows that were brought together do not part again.
    """
    small = GPT(replace(model.config, n_layer=1, vocab_size=64)).to(runtime.device)
    x = torch.zeros(1, model.config.block_size, dtype=torch.long, device=runtime.device)
    _, works = runtime.try_compile(
        torch.compile, small, [{'x': x, 'y': x}], say, lambda m, x, y: m(x, y)[1]
    )
    for block in model.blocks if works else ():
        block.compile(dynamic=False)
    return works


def sync_gradients(model, last: bool) -> None:
    """Have the ranks exchange gradients after this backward pass only if it is the step's last."""
    if hasattr(model, 'set_requires_gradient_sync'):
        model.set_requires_gradient_sync(last)
    else:
        model.require_backward_grad_sync = last  # what DDP's no_sync() sets


def settle(model) -> None:
    """Have each rank hold its rows again: after an evaluation the root's are still together."""
    if hasattr(model, 'reshard'):
        model.reshard()


def local(tensor):
    """This rank's rows of a tensor; all of one that is not sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def whole(tensor):
    """All rows of a tensor. Every rank has to ask."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def are_finite(model: GPT, runtime: Runtime) -> bool:
    """Whether no weight, of any rank, is infinite or NaN. Every rank has to ask."""
    bad = any(not local(p.detach()).isfinite().all() for p in model.parameters())
    return runtime.all_reduce([bad], 'MAX')[0] == 0


def cut_like(full, like):
    """`full` in rows as the tensor `like` is, and on the device where those lie; itself where
    `like` is whole. No rank waits."""
    if not hasattr(like, 'device_mesh'):
        return full
    from torch.distributed.tensor import distribute_tensor

    # cuts on the GPU, also what is then kept on the host
    rows = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return rows.to(local(like).device)


def computing_device(tensor) -> torch.device:
    """Where a tensor is computed with: of rows that lie on the host, the GPU of this process."""
    mesh = getattr(tensor, 'device_mesh', None)
    if mesh is None or mesh.device_type == local(tensor).device.type:
        return local(tensor).device
    return torch.device(mesh.device_type)
