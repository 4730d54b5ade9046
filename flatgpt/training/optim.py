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
from collections import defaultdict

import torch

from flatgpt.errors import ConfigError
from flatgpt.parallel import compute_device, full_tensor, shard_like, to_local


def orthogonalize(stack, steps: int = 5):
    """Set the singular values of stack (N, R, C), R <= C, to about 1 by Newton-Schulz iteration.

    The coefficients of the quintic are Jordan's: steep at zero, so that few steps suffice, but the
    values end between 0.7 and 1.2. In bfloat16, whose rounding error is smaller than that.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = stack.bfloat16()
    # the largest singular value becomes at most 1
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, R, R)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


class UnwrappedOptimizer(torch.optim.Optimizer):
    """An optimizer without the wrappers that exclude its methods from torch.compile.

    They import the compiler, which takes a second, and nothing is compiled here.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(UnwrappedOptimizer, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(UnwrappedOptimizer):
    """Muon for 2-dimensional parameters; matrices of equal shape are orthogonalized together.

    lr is for a square matrix; a tall one (R, C) gets lr * sqrt(R / C). Weight decay is decoupled,
    as in AdamW. Under DDP every rank computes the same update from the same gradients. With a
    sharded model, every rank gathers the whole matrix, on its GPU if it has one.
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
            lr, decay, momentum = group['lr'], group['weight_decay'], group['momentum']
            # tall matrices are transposed, to share a stack with wide ones
            by_shape = defaultdict(list)
            for parameter in group['params']:
                if parameter.grad is not None and not getattr(self, 'found_inf', 0):
                    by_shape[tuple(sorted(parameter.shape))].append(parameter)
            for parameters in by_shape.values():
                stack = [
                    transpose_tall(gather_matrix(self.nesterov(p, momentum))) for p in parameters
                ]
                updates = self.orthogonalize(torch.stack(stack))
                for parameter, update in zip(parameters, updates, strict=True):
                    rows, columns = parameter.shape
                    update = shard_like(update.mT if rows > columns else update, parameter)
                    mine = to_local(parameter).mul_(1 - lr * decay)
                    mine.add_(to_local(update), alpha=-lr * math.sqrt(max(1, rows / columns)))

    def nesterov(self, parameter, momentum: float):
        """The Nesterov momentum: the running mean of the gradient, one step ahead."""
        state = self.state[parameter]
        if not state:
            state['momentum_buffer'] = torch.zeros_like(parameter)
        mean = state['momentum_buffer'].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


def gather_matrix(matrix):
    """The whole matrix in bfloat16; an offloaded one is copied to the GPU first."""
    return full_tensor(matrix.to(compute_device(matrix), torch.bfloat16))


def transpose_tall(matrix):
    return matrix.mT if matrix.size(0) > matrix.size(1) else matrix


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
    return [adamw, *muon]


def set_lr(group: dict, lr: float) -> None:
    """Set the learning rate of a parameter group, in place if a CUDA graph reads it."""
    if isinstance(group['lr'], torch.Tensor):
        group['lr'].fill_(lr)
    else:
        group['lr'] = lr
