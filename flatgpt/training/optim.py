"""
Muon (Jordan et al. 2024), an optimizer for the matrices of the blocks, used together with AdamW.

    optimizers = build_optimizers('muon', model, learning_rate=4e-3, muon_lr=0.02, ...)

The update is Nesterov momentum with its singular values set to about 1, so that all directions of a
matrix learn at the same rate. https://kellerjordan.github.io/posts/muon/. torch.optim.Muon computes
the same, one matrix at a time. AdamW trains the embeddings, the head, norms and biases. Muon treats
GPT-2's fused query, key and value matrix as one matrix.
"""

import inspect
import math
from itertools import groupby

import torch

from flatgpt.errors import ConfigError
from flatgpt.parallel import MatrixExchange, compute_device, shard_count, to_local

BUCKET_SIZE = 2**27  # matrix elements that Muon updates at once: bounds its temporary memory


def orthogonalize(x, steps: int = 5, dtype=torch.bfloat16):
    """Set the singular values of x (N, R, C), R <= C, to about 1 by Newton-Schulz iteration.

    The coefficients of the quintic are Jordan's: steep at zero, so that few steps suffice, but the
    values end between 0.7 and 1.2, a spread that hides the rounding errors of 16 bits.

    dtype: of the matrix products. The result is bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
    # the largest singular value becomes at most 1
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT  # (N, R, R)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.bfloat16()


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float16 on GPUs before Ampere, which would emulate bfloat16."""
    if device.type != 'cuda' or not torch.cuda.is_available():  # --plan has fake CUDA tensors
        return torch.bfloat16
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


class UnwrappedOptimizer(torch.optim.Optimizer):
    """An optimizer without torch's wrappers that exclude its methods from torch.compile.

    The wrappers import the compiler, which takes a second, and no optimizer step is compiled here.

    found_inf: None, or a float32 scalar tensor; step() changes nothing if it is 1.
    """

    found_inf = None
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(UnwrappedOptimizer, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def _init_group(self, group, *lists):
        """Collect the tensors of an update; of a sharded model, this rank's rows.

        With DTensors instead, a step would be slower, and found_inf, which is not sharded, could
        not skip it.
        """
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [to_local(tensor) for tensor in tensors]
        return has_complex


class Muon(UnwrappedOptimizer):
    """Muon for 2-dimensional parameters; matrices of equal shape are orthogonalized together.

    lr is for a square matrix; a tall one (R, C) gets lr * sqrt(R / C). Weight decay is decoupled,
    as in AdamW. Under DDP every rank computes the same update from the same gradients. With a
    sharded model, each rank orthogonalizes its share of the matrices, on its GPU if it has one.
    """

    def __init__(self, params, lr, weight_decay, momentum, compile=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        # one graph per shape: dynamic ones would depend on the order in which shapes come
        self.orthogonalize = (
            torch.compile(orthogonalize, dynamic=False) if compile else orthogonalize
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for bucket in make_buckets([p for p in group['params'] if p.grad is not None]):
                self.update(bucket, group)

    def update(self, bucket: list, group: dict) -> None:
        """Update the matrices of a bucket, with a few kernels for all of them."""
        exchange = MatrixExchange(bucket)
        parameters, skip = exchange.parameters, self.should_skip(bucket[0])
        flat = self.nesterov(parameters, group['momentum'], skip)
        flat = flat.to(compute_device(bucket[0]), torch.bfloat16)
        flat = exchange.scatter(self.orthogonalize_all(exchange.gather(flat)), like=flat)
        apply_updates(parameters, flat, group, skip)

    def should_skip(self, parameter):
        """Whether found_inf is set, on the parameter's device; None without found_inf."""
        if self.found_inf is None:
            return None
        return self.found_inf.to(to_local(parameter).device) > 0

    def nesterov(self, parameters: list, momentum: float, skip):
        """The Nesterov momentum, flat: the running mean of the gradient, one step ahead."""
        means = [to_local(self.state_of(p)['momentum_buffer']) for p in parameters]
        flat = flatten([to_local(p.grad) for p in parameters])
        if skip is not None:  # a gradient equal to the mean does not change it, as NaN would
            torch.where(skip, flatten(means), flat, out=flat)
        rows = split_like(flat, means)
        torch._foreach_lerp_(means, rows, 1 - momentum)
        torch._foreach_lerp_(rows, means, momentum)
        return flat

    def state_of(self, parameter) -> dict:
        state = self.state[parameter]
        if not state:
            state['momentum_buffer'] = torch.zeros_like(parameter)
        return state

    def orthogonalize_all(self, stacks: list) -> list:
        """The orthogonalized stacks, which come sorted by matrix_key()."""
        updates = []
        for _, same in groupby(stacks, lambda stack: sorted(stack.shape[1:])):
            same = list(same)
            # tall matrices are transposed, to share a stack with wide ones
            joined = torch.cat([transpose_tall(stack) for stack in same])
            joined = self.orthogonalize(joined, dtype=product_dtype(joined.device))
            parts = joined.split([len(stack) for stack in same])
            updates += [p.mT if is_tall(s) else p for p, s in zip(parts, same, strict=True)]
        return updates


def make_buckets(matrices: list) -> list[list]:
    """Sort matrices by shape and divide them into lists of about BUCKET_SIZE elements per rank.

    All stacks of a shape but the last have the same number of matrices, since torch.compile
    compiles each number.
    """
    buckets, free = [], 0
    for _, same in groupby(sorted(matrices, key=matrix_key), lambda m: sorted(m.shape)):
        same = list(same)
        size = BUCKET_SIZE * shard_count(same[0])
        stacks = -(-len(same) // max(1, size // same[0].numel()))
        height = -(-len(same) // stacks)
        for start in range(0, len(same), height):
            stack = same[start : start + height]
            if len(stack) * stack[0].numel() > free:
                buckets.append([])
                free = size
            buckets[-1] += stack
            free -= len(stack) * stack[0].numel()
    return buckets


def matrix_key(matrix) -> tuple:
    return *sorted(matrix.shape), is_tall(matrix)


def is_tall(matrix) -> bool:
    return matrix.size(-2) > matrix.size(-1)


def transpose_tall(matrix):
    return matrix.mT if is_tall(matrix) else matrix


def flatten(tensors: list):
    """A copy of all elements of the tensors, one after the other."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def split_like(flat, tensors: list) -> list:
    """The inverse of flatten(): views of `flat` in the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def apply_updates(parameters: list, flat, group: dict, skip) -> None:
    """Decay the weights and subtract the updates; exactly no change if `skip` is set."""
    lr, weights = group['lr'], [to_local(p) for p in parameters]
    flat, keep = flat.to(weights[0].device).float(), 1 - lr * group['weight_decay']
    if skip is not None:
        flat.masked_fill_(skip, 0.0)
        keep = torch.where(skip, 1.0, keep)
    if isinstance(lr, torch.Tensor):  # alpha below must be a number
        flat, lr = flat.mul_(lr), 1.0
    updates = split_like(flat, weights)
    torch._foreach_mul_(weights, keep)
    ratios = [max(1, p.size(0) / p.size(1)) for p in parameters]
    for ratio in {*ratios}:
        some = [i for i, each in enumerate(ratios) if each == ratio]
        alpha = -lr * math.sqrt(ratio)
        torch._foreach_add_([weights[i] for i in some], [updates[i] for i in some], alpha=alpha)


def build_optimizers(
    name: str,
    model,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    muon_lr: float,
    muon_momentum: float,
    weight_decay: float,
    compile: bool = False,
    capturable: bool = False,
) -> list[torch.optim.Optimizer]:
    """'adamw': AdamW for all. 'muon': Muon for the matrices of the blocks, AdamW for the rest.

    The lr_ratio of a group is its learning rate divided by AdamW's: one schedule serves both.

    capturable: a CUDA graph can capture step(). The learning rates are tensors on the device, which
    set_lr() fills in place before a replay; load_state_dict() replaces them.
    """
    if name == 'adamw':
        groups, muon = model.param_groups(weight_decay), []
    else:
        if not learning_rate:
            raise ConfigError(
                "learning_rate=0: optimizer='muon' scales its schedule by it; use "
                'a --learning_rate above 0 or --optimizer=adamw'
            )
        matrices = model.block_matrices()
        if not matrices:
            raise ConfigError(
                "optimizer='muon': the model has no matrix to train; use --optimizer=adamw"
            )
        # no weight decay for the embeddings and the head, as in nanochat
        groups = model.param_groups(weight_decay=0.0, exclude=matrices)
        muon = [Muon(matrices, muon_lr, weight_decay, muon_momentum, compile)]
    adamw = AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    for optimizer in (adamw, *muon):
        for group in optimizer.param_groups:
            group['lr_ratio'] = group['lr'] / learning_rate if muon else 1.0
            if capturable:
                device = compute_device(next(model.parameters()))
                group |= {'capturable': True, 'lr': torch.tensor(group['lr'], device=device)}
    return [adamw, *muon]


def set_lr(group: dict, lr: float) -> None:
    """Set the learning rate of a parameter group, in place if a CUDA graph reads it."""
    if isinstance(group['lr'], torch.Tensor):
        group['lr'].fill_(lr)
    else:
        group['lr'] = lr
