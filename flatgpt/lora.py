"""
Low-rank adaptation (Hu et al. 2021, LoRA): beside a matrix that stays as it is, a thin one learns.

    add_lora(model, rank=8, alpha=16, dropout=0.0, targets='all')   # nothing else is trained now
    adapter_files(model, base='gpt2')                               # in the format of `peft`
    read_adapter(model, folder, 'gpt2')                             # one of ours or of `peft`
    merge_lora(model)                                               # a model like any other again

An adapter is a folder with adapter_config.json and adapter_model.safetensors; ours have base.json.
"""

import torch
from torch import nn
from torch.nn import functional as F

from flatgpt.errors import ConfigError, did_you_mean
from model import GPT, dropout


class LoRALinear(nn.Module):
    """W x + b + alpha / r * B A x: W and b are those of `linear`, A is (r, in) and B (out, r).

    A begins at random, uniform as nn.Linear begins (He et al. 2015), and B at zero, so that at
    first nothing is added. In training, dropout acts on what A is given.
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
        """The one matrix that computes the same; it takes the place of W."""
        rows, columns = self.weight.shape
        linear = nn.Linear(columns, rows, bias=self.bias is not None, device='meta')
        self.weight += self.lora_B.weight @ self.lora_A.weight * self.scale
        linear.weight, linear.bias = self.weight, self.bias
        return linear


# -----------------------------------------------------------------------------
# a model


def linear_layers(model: GPT) -> dict[str, nn.Linear]:
    """Those inside the blocks by name, transformer.h.0.attn.c_attn and so on, of a plain model."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: linear for name, linear in named.items() if name != 'lm_head'}


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
    """Freeze a model, and give matrices of its blocks from `freeze` on an adapter that learns.

    targets: 'all', or names with commas between, each of every matrix that it is or ends, as for
    peft: c_proj, or mlp.c_proj alone. ConfigError with the names there are, where one matches none.
    """
    if freeze >= len(model.blocks):
        raise ConfigError(f'freeze={freeze}: leaves none of {len(model.blocks)} blocks to adapt')
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
                f'lora_targets={targets!r}: {target!r} is no matrix of a block; {hint}there are '
                f"{', '.join(inside)}, and 'all'"
            )
        chosen |= found
    model.requires_grad_(False)
    for name in [name for name, leaf in names.items() if leaf in chosen]:
        linear = model.get_submodule(name)
        if rank > min(linear.weight.shape):
            raise ConfigError(
                f'lora_rank={rank}: {name} is {tuple(linear.weight.shape)}, and a higher rank than '
                f'{min(linear.weight.shape)} adds nothing'
            )
        replace_module(model, name, LoRALinear(linear, rank, alpha / rank, dropout))


def merge_lora(model: GPT) -> GPT:
    """Add what the adapters learned to their matrices: a plain model, all of which can be trained.

    A model without adapters stays as it is.
    """
    for name, module in lora_layers(model).items():
        replace_module(model, name, module.merged())
    return model.requires_grad_(True)
