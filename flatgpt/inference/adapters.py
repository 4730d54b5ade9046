"""
LoRA adapters of one base model, which share its weights for inference.

    layers = read_adapters({'poems': 'out/poems'}, model, 'out/base')    # of checkpoint/load.py
    prepare_for_inference(model)
    models = {name: adapted_model(model, found) for name, found in layers.items()}
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from flatgpt.inference.quantize import Int8Linear, PackedLinear
from flatgpt.lora import LoRALinear
from model import GPT

FUSED = ('q_proj', 'k_proj', 'v_proj')  # into qkv_proj, by prepare_for_inference()


class AdaptedLinear:
    """linear(x) + B A x of a prepared linear layer, with A (r, in) and B (out, r)."""

    def __init__(self, linear, A, B):
        self.linear, self.A, self.B = linear, A, B

    def __call__(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B)


@torch.no_grad()
def adapted_model(model: GPT, layers: dict[str, LoRALinear]) -> GPT:
    """A copy of a prepared model with an adapter, which shares the model's weights."""
    prepared = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, (PackedLinear, Int8Linear))
    ]
    shared = [*model.parameters(), *model.buffers(), *prepared]
    adapted = copy.deepcopy(model, {id(each): each for each in shared})
    weight = model.embedding.weight
    for name, (A, B) in fused_matrices(layers, model).items():
        owner_name, _, leaf = name.rpartition('.')
        owner = adapted.get_submodule(owner_name)
        linear = getattr(owner, leaf)
        if isinstance(linear, nn.Module):
            delattr(owner, leaf)
        owner.__dict__[leaf] = AdaptedLinear(linear, A.to(weight), B.to(weight))
    return adapted


def fused_matrices(layers: dict[str, LoRALinear], model: GPT) -> dict[str, tuple]:
    """{layer of a prepared model: A and B of its adapter, with the scale in B}."""
    found: dict[str, tuple] = {}
    for name, layer in layers.items():
        A, B = layer.lora_A.weight, layer.lora_B.weight * layer.scale
        owner, _, leaf = name.rpartition('.')
        if leaf not in FUSED:
            found[name] = A, B
            continue
        # in the rows of its own part
        config = model.config
        size = config.n_embd // config.n_head * config.kv_heads
        sizes = dict(zip(FUSED, (config.n_embd, size, size), strict=True))
        before = sum(sizes[part] for part in FUSED[: FUSED.index(leaf)])
        B = F.pad(B, (0, 0, before, sum(sizes.values()) - before - sizes[leaf]))
        others = found.get(f'{owner}.qkv_proj')
        found[f'{owner}.qkv_proj'] = (
            (torch.cat((others[0], A)), torch.cat((others[1], B), 1)) if others else (A, B)
        )
    return found
