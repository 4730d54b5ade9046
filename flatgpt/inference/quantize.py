"""
The matrices of a model that only writes: laid out for the processor's caches, or in eight bits.

    prepare_for_inference(model)           # the same numbers, up to three times as fast on a CPU
    prepare_for_inference(model, 'int8')   # half the memory of 16 bits, nearly the same numbers

A model prepared like this can be neither trained nor saved.
"""

import torch
from torch import nn
from torch.nn import functional as F

from flatgpt.errors import ConfigError
from model import GPT, ModernAttention

ROWS = 8  # of the products that the layout is made for; it serves any number
MANY = 64  # rows from which an int8 matrix is turned to 16 bits first


class PackedLinear:
    """x (..., in) -> (..., out) by oneDNN, with the weight in the order it reads it.

    torch's own nn.Linear hands oneDNN a plain matrix, to be rearranged at every call, and leaves
    float32 to a library that is slow on AMD's processors.
    """

    def __init__(self, linear: nn.Linear):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x):
        return self.product(x, self.weight, self.bias, 'none', [], '')


class Int8Linear:
    """x (..., in) -> (..., out) with a weight of int8 and a scale for each output.

    Rounding to the nearest of 255 steps, the largest weight of an output at 127. x is bfloat16.
    """

    def __init__(self, linear: nn.Linear):
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127  # (out,)
        self.scale = scale.to(linear.weight.dtype)  # rounded first: what the product will use
        weight = (weight / self.scale[:, None].float()).round()
        self.weight = weight.clamp(-127, 127).to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, x):
        flat = x if x.dim() == 2 else x.flatten(0, -2)
        if flat.size(0) < MANY:
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        else:
            y = F.linear(flat, self.weight.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])


def prepare_for_inference(model: GPT, quantize: str | None = None) -> GPT:
    """Make a model's matrices ready for generation, in place; quantize: None or 'int8'.

    The embeddings stay as they are. ConfigError where this device has no product with int8.
    """
    weight = model.embedding.weight
    assert any(isinstance(module, nn.Linear) for module in model.modules()), 'prepared already'
    if quantize == 'int8':
        check_int8(weight)
        kind = Int8Linear
    else:
        kind = PackedLinear if can_pack(weight) else None
    for module in list(model.modules()):
        if isinstance(module, ModernAttention):
            join_projections(module)
    if kind:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    # a plain function in its place: being a module costs it a tenth of its time
                    delattr(module, name)
                    module.__dict__[name] = kind(child)
    return model.requires_grad_(False)


def join_projections(attention: ModernAttention) -> None:
    """One matrix in place of those of queries, keys and values."""
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    attention.qkv_proj = nn.Linear(joined.size(1), joined.size(0), bias=False, device='meta')
    attention.qkv_proj.weight = nn.Parameter(joined.detach())
    attention.q_proj = attention.k_proj = attention.v_proj = None


def can_pack(weight) -> bool:
    """Whether oneDNN lays out matrices of this kind: on x86, bfloat16 if the processor has it."""
    if weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def check_int8(weight) -> None:
    """ConfigError unless int8 matrices can be multiplied with vectors of this weight's kind."""
    check_int8_device(str(weight.device))
    if weight.dtype != torch.bfloat16:
        name = str(weight.dtype).removeprefix('torch.')
        raise ConfigError(
            f"quantize='int8' with dtype={name!r}: its products are made for bfloat16; "
            'take --dtype=bfloat16'
        )


def check_int8_device(device: str) -> None:
    """ConfigError for a device without products of int8 matrices and bfloat16 vectors."""
    kind = device.partition(':')[0]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        'aten::_weight_int8pack_mm', {'cpu': 'CPU', 'cuda': 'CUDA', 'mps': 'MPS'}.get(kind, kind)
    ):
        raise ConfigError(
            f"quantize='int8': torch {torch.__version__} has no int8 product on {kind}; "
            'take --device=cpu, or leave it out'
        )
    if kind == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"quantize='int8': its products are made for bfloat16, which "
            f'{torch.cuda.get_device_name()} lacks; leave it out, with --dtype=float16'
        )
