"""
Muon (Jordan et al. 2024), an optimizer for the matrices of the blocks, used together with AdamW.

    optimizers = build_optimizers('muon', model, learning_rate=4e-3, muon_lr=0.02, ...)

The update is Nesterov momentum with its singular values set to about 1, so that all directions of a
matrix learn at the same rate. https://kellerjordan.github.io/posts/muon/. Then each neuron's part
is divided by its usual size (NorMuon, Li et al. 2025), so that all neurons learn at the same rate.
AdamW trains the embeddings, the head, norms and biases. Muon treats GPT-2's fused query, key and
value matrix as one matrix.
"""

import inspect
import math
from itertools import groupby

import torch

from flatgpt.errors import ConfigError
from flatgpt.parallel import MatrixExchange, compute_device, shard_count, to_local
from flatgpt.runtime import product_dtype

SMALL_MATRIX = 512  # up to this size, three polynomials; measured for 160, where five are no better
BUCKET_SIZE = 2**27  # matrix elements that Muon updates at once: bounds its temporary memory

# Coefficients of the polynomials that Amsel et al. (2025, "The Polar Express") give for singular
# values from 0.001 of the largest on: each is the best one after those before it
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(x, dtype=torch.bfloat16):
    """Set the singular values of x (N, R, C), R <= C, to about 1, in matrix products alone.

    Singular values that are small compared with the norm end below 1, with three polynomials more
    of them than with five. Measured for R = 160; with wider models the products matter less.

    dtype: of the matrix products. The result has update_dtype(dtype).
    """
    x = x.to(update_dtype(dtype))
    # the largest singular value becomes less than 1, also after rounding
    x = (x / (1.02 * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)).to(dtype)
    steps = 3 if x.size(1) <= SMALL_MATRIX else len(POLAR_EXPRESS)
    for a, b, c in POLAR_EXPRESS[:steps]:
        gram = x @ x.mT  # (N, R, R)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.to(update_dtype(dtype))


def update_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of updates before and after products in `dtype`: float16 could underflow."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


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

    beta2: decay of the mean square of each neuron's update, by whose root it is divided; 0: none.
    """

    def __init__(self, params, lr, weight_decay, momentum, *, beta2=0.95, compile=False):
        super().__init__(
            params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2)
        )
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
        device = compute_device(bucket[0])
        dtype = product_dtype(device)
        flat = flat.to(device, update_dtype(dtype))
        flat = exchange.scatter(self.orthogonalize_all(exchange.gather(flat), dtype), like=flat)
        flat = flat.to(to_local(parameters[0]).device).float()
        if group['beta2']:
            self.normalize_neurons(exchange, flat, group['beta2'], skip)
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

    def normalize_neurons(self, exchange: MatrixExchange, flat, beta2: float, skip) -> None:
        """Divide each row of the updates by its root mean square over the last steps, in place.

        Relative to the root mean square of its matrix over these steps, so that the norm of an
        update stays about the same. A collective if the matrices are sharded.
        """
        first = 0
        for shape, same in groupby(exchange.parameters, lambda p: p.shape):
            same = [*same]
            kept = [to_local(self.state_of(p)['second_moment']) for p in same]  # (R, 1) each
            size = sum(to_local(p).numel() for p in same)
            rows = flat[first : first + size].view(len(same), len(kept[0]), shape[1])  # (N, R, C)
            means = torch.stack(kept)  # (N, R, 1)
            new = torch.lerp(means, rows.square().mean(2, keepdim=True), 1 - beta2)
            if skip is not None:
                new = torch.where(skip, means, new)
            torch._foreach_copy_(kept, [*new])
            usual = exchange.sum_over_ranks(new.sum(1, keepdim=True)) / shape[0]  # (N, 1, 1)
            rows.mul_((usual / (new + 1e-20)).sqrt())
            first += size

    def state_of(self, parameter) -> dict:
        state = self.state[parameter]
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(parameter)
        if 'second_moment' not in state:
            state['second_moment'] = torch.zeros_like(parameter[:, :1])
        return state

    def orthogonalize_all(self, stacks: list, dtype: torch.dtype) -> list:
        """The orthogonalized stacks, which come sorted by matrix_key()."""
        updates = []
        for _, same in groupby(stacks, lambda stack: sorted(stack.shape[1:])):
            same = list(same)
            # tall matrices are transposed, to share a stack with wide ones
            joined = torch.cat([transpose_tall(stack) for stack in same])
            joined = self.orthogonalize(joined, dtype=dtype)
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
    keep = 1 - lr * group['weight_decay']
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
        muon = [Muon(matrices, muon_lr, weight_decay, muon_momentum, compile=compile)]
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
