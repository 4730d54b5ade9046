"""
Weights for inference: packed for the CPU, or quantized to int8.

    prepare_for_inference(model)           # the same outputs, up to three times as fast on a CPU
    prepare_for_inference(model, 'int8')   # half the memory of 16 bits, nearly the same outputs

A prepared model can be neither trained nor saved.
"""

import torch
from torch import nn
from torch.nn import functional as F

from flatgpt.errors import ConfigError
from flatgpt.runtime import product_dtype
from model import GPT, ModernAttention

PACKED_ROWS = 8  # batch size that the packed layout is optimized for
DEQUANTIZE_ROWS = 64  # batch size from which an int8 matrix is dequantized first


class PackedLinear:
    """x (..., in) -> (..., out) by oneDNN, with the weight in its packed layout.

    nn.Linear gives oneDNN a plain matrix, which is packed at every call, and computes float32 with
    a library that is slow on AMD's processors.
    """

    def __init__(self, linear: nn.Linear):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.matmul = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x):
        return self.matmul(x, self.weight, self.bias, 'none', [], '')


class Int8Linear:
    """x (..., in) -> (..., out) with int8 weights and a scale per output.

    Absmax quantization: the largest weight of an output becomes 127.
    """

    def __init__(self, linear: nn.Linear):
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127  # (out,)
        self.scale = scale.to(linear.weight.dtype)  # rounded as in the matmul
        weight = (weight / self.scale[:, None].float()).round()
        self.weight = weight.clamp(-127, 127).to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.detach()
        # in bfloat16, products can take thirty times as long as in float32
        is_float32 = linear.weight.dtype == torch.float32
        self.wide = torch.float32 if is_float32 else product_dtype(weight.device)

    def __call__(self, x):
        flat = x if x.dim() == 2 else x.flatten(0, -2)
        if flat.size(0) < DEQUANTIZE_ROWS:
            y = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        else:
            y = F.linear(flat.to(self.wide), self.weight.to(self.wide)) * self.scale
            y = y.to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])


def prepare_for_inference(model: GPT, quantize: str | None = None) -> GPT:
    """Pack or quantize a model's weight matrices in place; quantize: None or 'int8'.

    The embeddings are unchanged. ConfigError if this device has no int8 matmul.
    """
    weight = model.embedding.weight
    assert any(isinstance(module, nn.Linear) for module in model.modules()), 'already prepared'
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
                    # not a module: calling a module would take 10% longer
                    delattr(module, name)
                    module.__dict__[name] = kind(child)
    return model.requires_grad_(False)


def join_projections(attention: ModernAttention) -> None:
    """Fuse the matrices of queries, keys and values into one."""
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    attention.qkv_proj = nn.Linear(joined.size(1), joined.size(0), bias=False, device='meta')
    attention.qkv_proj.weight = nn.Parameter(joined.detach())
    attention.q_proj = attention.k_proj = attention.v_proj = None


def can_pack(weight) -> bool:
    """Whether oneDNN packs such matrices: on x86, float32, and bfloat16 if the CPU has it."""
    if weight.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith('AVX'):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def check_int8(weight) -> None:
    """ConfigError unless this weight's device and dtype have an int8 matmul."""
    check_int8_device(str(weight.device))
    on_cpu = weight.device.type == 'cpu'
    if weight.dtype != torch.bfloat16 and not (on_cpu and weight.dtype == torch.float32):
        name = str(weight.dtype).removeprefix('torch.')
        raise ConfigError(
            f"quantize='int8' with dtype={name!r}: int8 needs bfloat16, or float32 on a CPU; use "
            '--dtype=bfloat16'
        )


def check_int8_device(device: str) -> None:
    """ConfigError for a device without a matmul of int8 weights and bfloat16 activations."""
    kind = device.partition(':')[0]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        'aten::_weight_int8pack_mm', {'cpu': 'CPU', 'cuda': 'CUDA', 'mps': 'MPS'}.get(kind, kind)
    ):
        raise ConfigError(
            f"quantize='int8': torch {torch.__version__} has no int8 matmul on {kind}; "
            'use --device=cpu, or remove --quantize'
        )
    if kind == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"quantize='int8' needs bfloat16, which {torch.cuda.get_device_name()} lacks; remove "
            '--quantize and use --dtype=float16'
        )
