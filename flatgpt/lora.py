"""
Low-rank adaptation (LoRA, Hu et al. 2021): train a low-rank update of each frozen weight matrix.

    add_lora(model, rank=8, alpha=16, dropout=0.0, targets='all')   # freezes everything else
    merge_lora(model)                                               # back to a plain model

checkpoint/peft.py saves and loads adapters in the format of `peft`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from flatgpt.errors import ConfigError, did_you_mean
from model import GPT, dropout


class LoRALinear(nn.Module):
    """W x + b + alpha / r * B A x, with W and b of `linear`, A (r, in) and B (out, r).

    A is initialized like nn.Linear (He et al. 2015) and B to zero, so that the initial update is
    zero. In training, dropout is applied to the input of A.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        rows, columns = linear.weight.shape
        like = {'bias': False, 'device': linear.weight.device}
        self.lora_A = nn.Linear(columns, rank, **like)
        self.lora_B = nn.Linear(rank, rows, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = scale, dropout

    def forward(self, x):
        low = self.lora_A(dropout(x, self.dropout, self.training)) * self.scale  # (..., r)
        return F.linear(x, self.weight, self.bias) + self.lora_B(low)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The equivalent nn.Linear; the update is added to W in place."""
        rows, columns = self.weight.shape
        linear = nn.Linear(columns, rows, bias=self.bias is not None, device='meta')
        self.weight += self.lora_B.weight @ self.lora_A.weight * self.scale
        linear.weight, linear.bias = self.weight, self.bias
        return linear


# -----------------------------------------------------------------------------
# a model


def linear_layers(model: GPT) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name, such as transformer.h.0.attn.c_attn."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: linear for name, linear in named.items() if name not in ('lm_head', 'score')}


def lora_layers(model: GPT) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def replace_module(model: GPT, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition('.')
    setattr(model.get_submodule(owner), leaf, module)


def block_and_name(name: str) -> tuple[int, str]:
    """'transformer.h.3.attn.c_attn' -> 3, 'attn.c_attn'."""
    _, _, block, inside = name.split('.', 3)
    return int(block), inside


def add_lora(
    model: GPT, rank: int, alpha: float, dropout: float, targets: str, freeze: int = 0
) -> None:
    """Freeze a model, and add trainable adapters to linear layers of the blocks from `freeze` on.

    targets: 'all', or comma-separated names or name suffixes, as in peft: c_proj, or only
    mlp.c_proj. ConfigError lists the valid names if one matches nothing.
    """
    if freeze >= len(model.blocks):
        raise ConfigError(
            f'freeze={freeze}: freezes every block, so none can be adapted; '
            f'use --freeze={len(model.blocks) - 1} or less'
        )
    names = {
        name: block_and_name(name)[1]
        for name in linear_layers(model)
        if block_and_name(name)[0] >= freeze
    }
    inside = list(dict.fromkeys(names.values()))
    chosen = set(inside) if targets == 'all' else set()
    for target in () if targets == 'all' else targets.replace(' ', '').split(','):
        found = {name for name in inside if f'.{name}'.endswith(f'.{target}')}
        if not found:
            hint = did_you_mean(target, [*inside, *(name.split('.')[-1] for name in inside)])
            raise ConfigError(
                f'lora_targets={targets!r}: {target!r} is not a linear layer of a block; {hint}'
                f"choose from {', '.join(inside)}, or 'all'"
            )
        chosen |= found
    adapted = {name: model.get_submodule(name) for name, leaf in names.items() if leaf in chosen}
    smallest = min(adapted, key=lambda name: min(adapted[name].weight.shape))
    shape = tuple(adapted[smallest].weight.shape)
    if rank > min(shape):
        raise ConfigError(
            f'lora_rank={rank}: {smallest} has the shape {shape}, so that a higher rank than '
            f'{min(shape)} adds nothing; use --lora_rank={min(shape)} or less'
        )
    model.requires_grad_(False)
    for name, linear in adapted.items():
        replace_module(model, name, LoRALinear(linear, rank, alpha / rank, dropout))


def merge_lora(model: GPT) -> GPT:
    """Merge all adapters into their matrices -> a plain model, all of it trainable.

    A model without adapters only becomes trainable.
    """
    for name, module in lora_layers(model).items():
        replace_module(model, name, module.merged())
    return model.requires_grad_(True)
