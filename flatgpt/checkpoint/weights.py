"""
Read safetensors files one tensor at a time, and build a model from them.

    model = model_from_tensors({'n_layer': 12, ...}, pairs_of_name_and_tensor, 'gpt2')
"""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from flatgpt.errors import CheckpointError
from flatgpt.files import is_utf8_path
from model import GPT, GPTConfig

RANDOM_INIT = (
    torch.nn.init.normal_,
    torch.nn.init.kaiming_uniform_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
)
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SAME_MODEL = 'use the config and the weights of one model'


@torch.no_grad()
def model_from_tensors(
    shape: dict, named_tensors: Iterable, where: str | Path, transposed: tuple = ()
) -> GPT:
    """The model of GPTConfig(**shape) whose parameters are copies of (name, tensor) pairs.

    where: begins the error lines. transposed: ends of the names of tensors stored as (in, out).
    Memory is allocated one parameter at a time, after its shape is checked.
    """
    try:
        model = meta_model(GPTConfig(**shape))
    except (ValueError, RuntimeError) as error:  # RuntimeError: a size that overflows
        raise CheckpointError(f'{where}: {error}') from error
    missing, head = dict(model.named_parameters()), None
    for name, tensor in named_tensors:
        parameter = missing.pop(name, None)
        if parameter is None:
            if not is_redundant(name, tensor):
                raise CheckpointError(f'{where} has an unknown tensor {name}; {SAME_MODEL}')
            head = tensor if name == 'lm_head.weight' else head
            continue
        tensor = tensor.T if name.endswith(transposed) else tensor
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f'{where}: {name} has shape {tuple(tensor.shape)}, but the config needs '
                f'{tuple(parameter.shape)}; {SAME_MODEL}'
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f'{where}: {name} is quantized ({tensor.dtype}); save it in float32, float16 or '
                'bfloat16'
            )
        owner, _, leaf = name.rpartition('.')
        copy = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(copy))
    if missing:
        raise CheckpointError(f'{where} lacks the tensor {min(missing)}; {SAME_MODEL}')
    model.tie_weights()
    has_head = head is not None and not model.config.score
    if has_head and not torch.equal(head.float(), model.lm_head.weight):
        raise CheckpointError(
            f'{where}: lm_head.weight differs from the embedding; give a model that ties them'
        )
    return model


def meta_model(config: GPTConfig) -> GPT:
    """A model on the meta device: its parameters have shapes and no values."""
    with torch.device('meta'), SkipRandom():
        return GPT(config)


class SkipRandom(TorchFunctionMode):
    """Skips random initialization: on the meta device its first call makes torch import 800
    modules, in 0.7 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RANDOM_INIT:
            return args[0] if args else kwargs['tensor']
        return func(*args, **(kwargs or {}))


def is_redundant(name: str, tensor: torch.Tensor) -> bool:
    """Whether the model works without a tensor: a causal mask, the tied head, a bias of zero."""
    masks = ('.attn.bias', '.attn.masked_bias')  # saved by older versions
    zero = name.endswith('.bias') and not tensor.any()
    return zero or name.endswith(masks) or name == 'lm_head.weight'


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor. The file is mapped again for each, or all of them would stay in memory."""
    with open_weights(path) as file:
        return file.get_tensor(key)


@contextmanager
def open_weights(path: Path):
    if not is_utf8_path(path):
        raise CheckpointError(f'{path}: the path is not valid UTF-8; rename the folder')
    try:
        with safe_open(path, framework='pt') as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} is damaged or incomplete: {error}; download or copy it again'
        ) from error
    except OSError as error:
        raise CheckpointError(
            f'{path} cannot be opened: {error}; check that it exists and is readable'
        ) from error
