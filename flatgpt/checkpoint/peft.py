"""
LoRA adapters on disk, in the format of `peft`.

    adapter_files(model, base='gpt2')         # {name: content} of the folder
    read_adapter(model, folder, 'gpt2')       # one of ours or of `peft`

An adapter is a folder with adapter_config.json and adapter_model.safetensors. Ours also have
base.json, a few weights that identify the base model.
"""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import save

from flatgpt.checkpoint.convert import parameter_name, unsupported_fields
from flatgpt.checkpoint.weights import open_weights, read_tensor
from flatgpt.errors import CheckpointError
from flatgpt.files import as_json, read_json
from flatgpt.lora import LoRALinear, block_and_name, linear_layers, lora_layers, replace_module
from flatgpt.parallel import full_tensor
from model import GPT

ADAPTER_CONFIG, ADAPTER_WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
BASE = 'base.json'  # not written by peft
PREFIX = 'base_model.model.'  # of every name in peft's files
# Fields of adapter_config.json that are applied, that do not change the result, and that may have
# these values only; see unsupported_fields()
APPLIED = (
    *('base_model_name_or_path', 'r', 'lora_alpha', 'lora_dropout', 'use_rslora'),
    *('rank_pattern', 'alpha_pattern', 'target_modules', 'exclude_modules', 'layers_to_transform'),
)
IGNORED = (
    *('task_type', 'inference_mode', 'auto_mapping', 'peft_version', 'megatron_core'),
    'fan_in_fan_out',  # the layout of the base's matrices; A and B have one layout
    'qalora_group_size',  # without use_qalora
    *('loftq_config', 'eva_config', 'corda_config', 'lora_ga_config'),  # with init_lora_weights
    'runtime_config',  # devices
)
SUPPORTED_VALUES = {
    'peft_type': ('LORA',),
    'bias': ('none',),
    'revision': (None, 'main'),
    'layers_pattern': (None, 'h', ['h'], 'layers', ['layers']),
    # these leave the base unchanged; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not
    'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica'),
}


def is_adapter(where: str | Path) -> bool:
    return (Path(where) / ADAPTER_CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """The base model that an adapter's config gives."""
    base = read_json(Path(folder) / ADAPTER_CONFIG, str(folder)).get('base_model_name_or_path')
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f'{folder}: {ADAPTER_CONFIG} has no base_model_name_or_path; set it to the base model'
        )
    return base


def adapter_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """The adapters' matrices, on the host, under peft's names."""
    lora = {name: p for name, p in model.named_parameters() if '.lora_' in name}
    return {PREFIX + name: full_tensor(p.detach()).cpu().contiguous() for name, p in lora.items()}


def sample_weights(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """One weight of each adapted matrix, which identify the base model."""
    flat = {name: full_tensor(w.detach()).flatten() for name, w in weights.items()}
    return {name: w[w.numel() // 2].item() for name, w in flat.items()}


def is_base(expected: dict, weights: dict[str, torch.Tensor]) -> bool:
    """Whether these are the base's weights, up to rounding: machines may merge differently."""
    return expected.keys() == weights.keys() and all(
        isinstance(expected[name], float) and math.isclose(expected[name], value, abs_tol=1e-6)
        for name, value in sample_weights(weights).items()
    )


def adapter_files(model: GPT, base: str | None) -> dict[str, bytes]:
    """{name: content} of an adapter's folder. base: the adapted model, as --init_from gave it.

    Collective: with a sharded model every rank must call it.
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
        'fan_in_fan_out': model.config.arch == 'gpt2',  # its matrices in transformers are (in, out)
        'bias': 'none',
        'inference_mode': True,
    }
    identity = sample_weights({name: module.weight for name, module in modules.items()})
    files = {ADAPTER_CONFIG: as_json(config), BASE: as_json(identity)}
    return files | {ADAPTER_WEIGHTS: save(adapter_tensors(model), metadata={'format': 'pt'})}


def read_adapter(model: GPT, folder: Path, base: str | Path) -> None:
    """Add the adapters of a folder to their base model, which is frozen; see adapter_layers()."""
    layers = adapter_layers(model, folder, base)
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_module(model, name, layer)


def adapter_layers(model: GPT, folder: Path, base: str | Path) -> dict[str, LoRALinear]:
    """{matrix of the model: it with the adapter of a folder}; the model itself is not changed.

    base: the model's name in error lines. CheckpointError if they do not fit.
    """
    config = read_adapter_config(folder)
    with open_weights(folder / ADAPTER_WEIGHTS) as file:
        keys = list(file.keys())
    pairs = lora_pairs(
        {key: read_tensor(folder / ADAPTER_WEIGHTS, key).float() for key in keys}, folder
    )
    weights = {name: linear.weight for name, linear in linear_layers(model).items()}
    for name, (A, B) in pairs.items():
        shape = (B.size(0), A.size(1))
        if name not in weights or shape != weights[name].shape:
            actual = tuple(weights[name].shape) if name in weights else 'missing'
            raise CheckpointError(
                f'{folder}: {base} is not its base: {name} is {actual}, the adapter needs {shape}; '
                f'correct base_model_name_or_path in {ADAPTER_CONFIG}'
            )
    identity = read_json(folder / BASE, str(folder)) if (folder / BASE).exists() else None
    if identity is not None and not is_base(identity, {name: weights[name] for name in pairs}):
        raise CheckpointError(
            f'{folder}: {base} is not its base: the weights differ; correct '
            f'base_model_name_or_path in {ADAPTER_CONFIG}'
        )
    layers = {}
    for name, (A, B) in pairs.items():
        rank, scale = rank_and_scale(config, name, folder)
        if rank != A.size(0):
            raise CheckpointError(
                f'{folder}: {ADAPTER_CONFIG} gives {name} the rank {rank}, its matrices have '
                f'{A.size(0)}; correct r or rank_pattern'
            )
        linear = LoRALinear(model.get_submodule(name), rank, scale, config['lora_dropout'])
        linear.lora_A.weight.data.copy_(A)
        linear.lora_B.weight.data.copy_(B)
        layers[name] = linear
    return layers


def read_adapter_config(folder: Path) -> dict:
    """The fields of adapter_config.json. CheckpointError for what is not computed as in peft."""
    defaults = {'r': 8, 'lora_alpha': 8, 'lora_dropout': 0.0}
    config = defaults | read_json(folder / ADAPTER_CONFIG, str(folder))
    for key, value in unsupported_fields(config, SUPPORTED_VALUES, APPLIED + IGNORED):
        raise CheckpointError(
            f'{folder}: {ADAPTER_CONFIG} has an unsupported {key}={value!r}; call '
            'merge_and_unload() in peft and save the merged model'
        )
    for key in ('r', 'lora_alpha', 'lora_dropout'):
        if type(config[key]) not in (int, float):
            raise CheckpointError(
                f'{folder}: {ADAPTER_CONFIG} has {key}={config[key]!r}; give a number'
            )
    return config


def rank_and_scale(config: dict, name: str, folder: Path) -> tuple[int, float]:
    """The rank of a matrix's adapter and its scale, as in peft. CheckpointError if it has none."""
    try:
        if not is_target(config, name):
            raise CheckpointError(
                f'{folder}: it has an adapter of {name}, which {ADAPTER_CONFIG} excludes; correct '
                'target_modules, exclude_modules or layers_to_transform'
            )
        rank = by_pattern(config.get('rank_pattern'), name, config['r'])
        alpha = by_pattern(config.get('alpha_pattern'), name, config['lora_alpha'])
        return rank, alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)
    except (re.error, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f'{folder}: {ADAPTER_CONFIG} has an invalid rank or pattern: {error}; correct it'
        ) from error


def by_pattern(patterns: dict | None, name: str, default):
    """The value of the first regular expression that matches the name or its last parts."""
    found = (v for key, v in (patterns or {}).items() if re.match(rf'(.*\.)?({key})$', name))
    return next(found, default)


def is_target(config: dict, name: str) -> bool:
    """Whether peft adapts the matrix; layers_to_transform needs a list of target_modules."""
    targets, layers = config.get('target_modules'), config.get('layers_to_transform')
    if matches_any(config.get('exclude_modules'), name):
        return False
    if targets in (None, 'all-linear') or isinstance(targets, str):
        return targets in (None, 'all-linear') or matches_any(targets, name)
    layers = [layers] if isinstance(layers, int) else layers
    return matches_any(targets, name) and (not layers or block_and_name(name)[0] in layers)


def matches_any(modules: str | list | None, name: str) -> bool:
    """Whether a regular expression matches the whole name, or one of a list is its end."""
    if isinstance(modules, str):
        return bool(modules) and re.fullmatch(modules, name) is not None
    return any(f'.{name}'.endswith(f'.{module}') for module in modules or ())


def lora_pairs(tensors: dict, folder: Path) -> dict[str, tuple]:
    """{matrix: (A, B) of its adapter}"""
    names = {}
    for key in tensors:
        name, _, leaf = parameter_name(key.removeprefix(PREFIX)).partition('.lora_')
        names.setdefault(name, {})[leaf] = tensors[key]
    for name, parts in names.items():
        shapes = {leaf: tuple(tensor.shape) for leaf, tensor in parts.items()}
        match shapes:
            case {'A.weight': (rank, _), 'B.weight': (_, same)} if rank == same and len(parts) == 2:
                continue
        raise CheckpointError(
            f'{folder}: {name} has {shapes} instead of a lora_A and a lora_B; call '
            'merge_and_unload() in peft and save the merged model'
        )
    return {name: (parts['A.weight'], parts['B.weight']) for name, parts in names.items()}
