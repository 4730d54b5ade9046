"""
Tensors out of safetensors files, one at a time, and into a model.

    model = filled({'n_layer': 12, ...}, pairs_of_name_and_tensor, 'gpt2')
"""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from flatgpt.errors import CheckpointError
from flatgpt.files import is_utf8
from model import GPT, GPTConfig

RANDOM = (
    torch.nn.init.normal_,
    torch.nn.init.kaiming_uniform_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
)
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'


@torch.no_grad()
def filled(shape: dict, named: Iterable, where: str | Path, transposed: tuple = ()) -> GPT:
    """The model of GPTConfig(**shape) whose parameters are copies of (name, tensor) pairs.

    Tensors whose names end like one in `transposed` lie the other way round. Memory is taken for
    one parameter after the other, and only once its shape is seen to fit.
    """
    try:
        model = outline(GPTConfig(**shape))
    except (ValueError, RuntimeError) as error:  # the latter for sizes that no memory has
        raise CheckpointError(f'{where}: {error}') from error
    missing, head = dict(model.named_parameters()), None
    for name, tensor in named:
        parameter = missing.pop(name, None)
        if parameter is None:
            if not is_derived(name, tensor):
                raise CheckpointError(f'{where} has {name}: another architecture')
            head = tensor if name == 'lm_head.weight' else head
            continue
        tensor = tensor.T if name.endswith(transposed) else tensor
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f'{where}: {name} has shape {tuple(tensor.shape)}, and the model needs '
                f'{tuple(parameter.shape)}: another architecture'
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f'{where}: {name} is quantized ({tensor.dtype}); floats are read')
        owner, _, leaf = name.rpartition('.')
        copy = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(copy))
    if missing:
        raise CheckpointError(f'{where} lacks {min(missing)}: another architecture')
    model.tie_weights()
    if head is not None and not torch.equal(head.float(), model.lm_head.weight):
        raise CheckpointError(
            f'{where}: lm_head.weight differs from the embedding, and in this architecture they '
            'are one'
        )
    return model


def outline(config: GPTConfig) -> GPT:
    """A model whose parameters have shapes and no values."""
    with torch.device('meta'), SkipRandom():
        return GPT(config)


class SkipRandom(TorchFunctionMode):
    """Leaves tensors as they are that are to be filled with random numbers.

    The first random number without a value has torch import 800 modules for it, in 0.7 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in RANDOM:
            return args[0] if args else kwargs['tensor']
        return func(*args, **(kwargs or {}))


def is_derived(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor says nothing new: causal masks, the tied head, a bias that is zero."""
    masks = ('.attn.bias', '.attn.masked_bias')  # which older versions saved
    zero = name.endswith('.bias') and not tensor.any()
    return zero or name.endswith(masks) or name == 'lm_head.weight'


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor; the file is mapped for it alone, or all that was read would stay in memory."""
    with open_weights(path) as file:
        return file.get_tensor(key)


@contextmanager
def open_weights(path: Path):
    if not is_utf8(path):
        raise CheckpointError(f'{path}: is no UTF-8, and cannot be read; rename the folder')
    try:
        with safe_open(path, framework='pt') as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f'{path} is damaged or half fetched: {error}') from error
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error
