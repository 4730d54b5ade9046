"""
Adapters on disk, in the format of `peft`.

    adapter_files(model, base='gpt2')         # {name: content} of the folder
    read_adapter(model, folder, 'gpt2')       # one of ours or of `peft`

An adapter is a folder with adapter_config.json and adapter_model.safetensors; ours have base.json.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save

from flatgpt.checkpoint.convert import own_name
from flatgpt.checkpoint.weights import open_weights, read_tensor
from flatgpt.errors import CheckpointError
from flatgpt.files import read_json
from flatgpt.lora import LoRALinear, block_and_name, linear_layers, lora_layers, replace_module
from flatgpt.parallel import full_tensor
from model import GPT

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
BASE = 'base.json'  # by which the base is known again; what peft writes has none
PREFIX = 'base_model.model.'  # of every name that peft writes
# Of a config: what is computed as it says, what says nothing about the result, and what is computed
# with these values alone. Anything else must be empty: of a field that nobody here knows, too.
HONOURED = (
    *('base_model_name_or_path', 'r', 'lora_alpha', 'lora_dropout', 'use_rslora'),
    *('rank_pattern', 'alpha_pattern', 'target_modules', 'exclude_modules', 'layers_to_transform'),
)
HARMLESS = (
    *('task_type', 'inference_mode', 'auto_mapping', 'peft_version', 'megatron_core'),
    'fan_in_fan_out',  # how the base holds its matrices, which A and B do not follow
    'qalora_group_size',  # without use_qalora
    *('loftq_config', 'eva_config', 'corda_config', 'lora_ga_config'),  # with init_lora_weights
    'runtime_config',  # what is computed on which device
)
PLAIN = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'revision': (None, 'main'),
    'layers_pattern': (None, 'h', ['h'], 'layers', ['layers']),
    # those that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part off it
    'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica'),
}
EMPTY = (None, False, '', [], {})


def is_adapter(where: str | Path) -> bool:
    return (Path(where) / CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """What an adapter says that it was made for."""
    base = read_json(Path(folder) / CONFIG, str(folder)).get('base_model_name_or_path')
    if not isinstance(base, str) or not base:
        raise CheckpointError(f'{folder}: {CONFIG} names no base_model_name_or_path')
    return base


def adapter_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """What the adapters learned, on the host, as peft names it."""
    named = {name: p for name, p in model.named_parameters() if '.lora_' in name}
    return {PREFIX + name: full_tensor(p.detach()).cpu().contiguous() for name, p in named.items()}


def landmarks(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """A number of each adapted matrix: in another base of the same shape they are others."""
    wholes = {name: full_tensor(w.detach()).flatten() for name, w in weights.items()}
    return {name: w[w.numel() // 2].item() for name, w in wholes.items()}


def is_base(written: dict, weights: dict[str, torch.Tensor]) -> bool:
    """Whether they are as written, but for a last digit: merging may round as another machine."""
    return written.keys() == weights.keys() and all(
        isinstance(written[name], float) and math.isclose(written[name], value, abs_tol=1e-6)
        for name, value in landmarks(weights).items()
    )


def adapter_files(model: GPT, base: str | None) -> dict[str, bytes]:
    """The files of an adapter's folder. base: the model that was adapted, as --init_from named it.

    Of a sharded model every rank has to ask.
    """
    modules = lora_layers(model)
    first = next(iter(modules.values()))
    rank, blocks = first.lora_A.out_features, sorted({block_and_name(name)[0] for name in modules})
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'r': rank,
        'lora_alpha': round(first.scale * rank),
        'lora_dropout': first.dropout,
        'target_modules': sorted({block_and_name(name)[1] for name in modules}),
        'layers_to_transform': blocks if len(blocks) < len(model.blocks) else None,
        'fan_in_fan_out': model.config.arch == 'gpt2',  # how transformers holds its matrices
        'bias': 'none',
        'inference_mode': True,
    }
    marks = landmarks({name: module.weight for name, module in modules.items()})
    texts = {CONFIG: config, BASE: marks}
    files = {name: json.dumps(text, indent=1, sort_keys=True) for name, text in texts.items()}
    files = {name: f'{text}\n'.encode() for name, text in files.items()}
    return files | {WEIGHTS: save(adapter_tensors(model), metadata={'format': 'pt'})}


def read_adapter(model: GPT, folder: Path, base: str | Path) -> None:
    """Put the adapters of a folder into the model they were made for, which is frozen.

    base: what to call that model. CheckpointError where the one does not fit the other.
    """
    config = read_config(folder)
    with open_weights(folder / WEIGHTS) as file:
        keys = list(file.keys())
    pairs = paired({key: read_tensor(folder / WEIGHTS, key).float() for key in keys}, folder)
    weights = {name: linear.weight for name, linear in linear_layers(model).items()}
    for name, (A, B) in pairs.items():
        shape = (B.size(0), A.size(1))
        if name not in weights or shape != weights[name].shape:
            there = tuple(weights[name].shape) if name in weights else 'none in a block'
            raise CheckpointError(
                f'{folder} adapts {name}, {shape}, and that of {base} is {there}: '
                'it was made for another base'
            )
    marks = read_json(folder / BASE, str(folder)) if (folder / BASE).exists() else None
    if marks is not None and not is_base(marks, {name: weights[name] for name in pairs}):
        raise CheckpointError(f'{folder} was made for another base: {base} has other weights')
    model.requires_grad_(False)
    for name, (A, B) in pairs.items():
        rank, scale = rank_and_scale(config, name, folder)
        if rank != A.size(0):
            raise CheckpointError(
                f'{folder}: {CONFIG} has rank {rank} for {name}, whose matrices have {A.size(0)}'
            )
        linear = LoRALinear(model.get_submodule(name), rank, scale, config['lora_dropout'])
        linear.lora_A.weight.data.copy_(A)
        linear.lora_B.weight.data.copy_(B)
        replace_module(model, name, linear)


def read_config(folder: Path) -> dict:
    """What adapter_config.json says; refused is what would not be computed as peft does."""
    defaults = {'r': 8, 'lora_alpha': 8, 'lora_dropout': 0.0}
    config = defaults | read_json(folder / CONFIG, str(folder))
    for key, value in config.items():
        if key in HONOURED or key in HARMLESS or value in PLAIN.get(key, EMPTY):
            continue
        need = f'only {PLAIN[key][0]!r} is read' if key in PLAIN else 'is not known here'
        if key == 'init_lora_weights':
            need = 'it changes the base; merge_and_unload() it in peft and save that'
        raise CheckpointError(f'{folder}: {key}={value!r}; {need}')
    for key in ('r', 'lora_alpha', 'lora_dropout'):
        if type(config[key]) not in (int, float):
            raise CheckpointError(f'{folder}: {key}={config[key]!r} is no number')
    return config


def rank_and_scale(config: dict, name: str, folder: Path) -> tuple[int, float]:
    """The rank of a matrix's adapter and its factor, as peft finds them; refused if it has none."""
    try:
        if not is_target(config, name):
            raise CheckpointError(
                f'{folder} adapts {name}, which its target_modules, exclude_modules and '
                'layers_to_transform leave out'
            )
        rank = by_pattern(config.get('rank_pattern'), name, config['r'])
        alpha = by_pattern(config.get('alpha_pattern'), name, config['lora_alpha'])
        return rank, alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
    except (re.error, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f'{folder}: {CONFIG} cannot be used: {error}') from error


def by_pattern(patterns: dict | None, name: str, default):
    """The value of the first regular expression that the name's end matches, or the name is."""
    found = (v for key, v in (patterns or {}).items() if re.match(rf'(.*\.)?({key})$', name))
    return next(found, default)


def is_target(config: dict, name: str) -> bool:
    """Whether peft gives the matrix an adapter; layers_to_transform counts with a list of names."""
    targets, layers = config.get('target_modules'), config.get('layers_to_transform')
    if names_one(config.get('exclude_modules'), name):
        return False
    if targets in (None, 'all-linear') or isinstance(targets, str):
        return targets in (None, 'all-linear') or names_one(targets, name)
    layers = [layers] if isinstance(layers, int) else layers
    return names_one(targets, name) and (not layers or block_and_name(name)[0] in layers)


def names_one(modules: str | list | None, name: str) -> bool:
    """Whether a regular expression is all of the name, or one of a list its end."""
    if isinstance(modules, str):
        return bool(modules) and re.fullmatch(modules, name) is not None
    return any(f'.{name}'.endswith(f'.{module}') for module in modules or ())


def paired(tensors: dict, folder: Path) -> dict[str, tuple]:
    """Matrix -> (A, B) of its adapter."""
    names = {}
    for key in tensors:
        name, _, leaf = own_name(key.removeprefix(PREFIX)).partition('.lora_')
        names.setdefault(name, {})[leaf] = tensors[key]
    for name, parts in names.items():
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in parts.items()}
        match shapes:
            case {'A.weight': (rank, _), 'B.weight': (_, same)} if rank == same and len(parts) == 2:
                continue
        raise CheckpointError(
            f'{folder}: {name} has {shapes}, and no pair lora_A, lora_B, which is all that is read'
        )
    return {name: (parts['A.weight'], parts['B.weight']) for name, parts in names.items()}
