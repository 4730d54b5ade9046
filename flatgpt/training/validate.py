"""
Every rule for the settings of train.py: alone, on this machine, with a dataset, on resuming.

    validate(config)                   # reports all mistakes at once
    validate_machine(config, runtime)
    validate_data(config, data)
    for warning in lint_settings(config, data): ...

A rule raises ConfigError with the setting, what is wrong with it and the fix.
"""

import math
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from flatgpt.checkpoint.mirror import check_mirror
from flatgpt.data.dataset import Dataset
from flatgpt.errors import (
    ConfigError,
    Mistakes,
    as_config_error,
    check_choice,
    check_range,
    counted,
)
from flatgpt.files import is_utf8_path, nearest_existing
from flatgpt.runtime import Runtime
from flatgpt.training.ngram import max_order
from model import GPTConfig

SHAPE = ('arch', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'bias')
LORA = {'lora_rank': None, 'lora_alpha': None, 'lora_dropout': 0.0, 'lora_targets': 'all'}
# settings that a resumed run cannot change, and their values in runs that did not save them
FIXED = {'optimizer': 'adamw', 'objective': 'lm', **LORA}
DIALS = ('minutes', 'tokens', 'flops')  # settings that choose the model and the schedule
LENGTHS = ('max_iters', 'epochs', 'lr_decay_iters', 'short_iters', 'short_block_size')
NO_LENGTHS = (('epochs', None), ('lr_decay_iters', None), ('short_iters', 0))  # fit any dial
RANGES = (  # minimum, maximum, settings; None is always valid
    (1, None, ('eval_interval', 'eval_iters', 'save_interval', 'log_interval', 'patience')),
    (1, None, ('batch_size', 'gradient_accumulation_steps', 'block_size', 'short_block_size')),
    (0, None, ('max_iters', 'epochs', 'short_iters', 'warmup_iters', 'lr_decay_iters')),
    (0, None, ('learning_rate', 'muon_lr', 'min_lr', 'weight_decay', 'grad_clip')),
    (1, None, ('lora_rank', 'lora_alpha', 'hang_timeout')),
    (0, None, ('freeze', 'sample_tokens', 'eval_sample_tokens', 'peak_tflops')),
    (0, 2**63 - 1, ('seed',)),
    (1, None, ('ngram_order',)),
    (0, None, ('ngram_decay',)),
    (0, 1, ('cooldown',)),
    (1e-9, None, ('dpo_beta',)),
    (2, None, ('rl_samples',)),  # one has nothing to be compared with
    (1, None, ('rl_tokens',)),
    (0, None, ('rl_kl',)),
    (0.001, 1e6, ('minutes',)),
    (1, 1e15, ('tokens',)),
    (1, 1e30, ('flops',)),
    (0, 0.9999999, ('lora_dropout', 'beta1', 'beta2', 'muon_momentum')),
)
# (setting, the value it needs; for a number, any but 0 will do): the settings without effect
# otherwise, and their defaults
NO_EFFECT_UNLESS = {
    ('optimizer', 'muon'): {'muon_lr': 0.02, 'muon_momentum': 0.95},
    ('objective', 'dpo'): {'dpo_beta': 0.1},
    ('objective', 'rl'): {
        'reward': None,
        'rl_samples': 8,
        'rl_tokens': 64,
        'rl_baseline': 'mean',
        'rl_normalize': 'tokens',
        'rl_kl': 0.0,
    },
    ('lr_schedule', 'linear'): {'cooldown': 0.4},
    ('decay_lr', True): {'lr_schedule': 'cosine'},
    ('short_iters', 400): {'short_block_size': None},
    ('ngram_order', 5): {'ngram_decay': 2.0},
    ('eval_interval', 250): {'patience': None, 'eval_sample_tokens': 0},
    ('lora_rank', 8): {name: LORA[name] for name in LORA if name != 'lora_rank'},
}
CHOICES = {
    'optimizer': ('adamw', 'muon'),
    'lr_schedule': ('cosine', 'linear', 'constant'),
    'compile': (True, False, 'auto'),
    'cuda_graph': (True, False, 'auto'),
    'objective': ('lm', 'sft', 'dpo', 'reward', 'rl'),
    'rl_baseline': ('mean', 'std', 'leave_one_out'),
    'rl_normalize': ('tokens', 'completions'),
}


def is_resuming(config: dict) -> bool:
    """Whether to resume, if there is a checkpoint."""
    return config['init_from'] == 'resume' or config['auto_resume']


# -----------------------------------------------------------------------------
# the settings alone


def validate(config: dict) -> None:
    """Check each setting alone and against the others; one ConfigError lists all mistakes."""
    rules = [
        partial(check_range, low, high, config, name)
        for low, high, names in RANGES
        for name in names
    ]
    rules += [partial(check_choice, choices, config, name) for name, choices in CHOICES.items()]
    rules += [partial(rule, config) for rule in RULES]
    if not is_resuming(config) and config['init_from'] == 'scratch':
        rules += [partial(rule, config) for rule in NEW_MODEL_RULES]
    apply_rules(rules)


def apply_rules(rules: list[Callable[[], None]]) -> None:
    """Apply all rules; raise one ConfigError with a line for each mistake."""
    mistakes = Mistakes()
    for rule in rules:
        with mistakes.collect():
            rule()
    mistakes.raise_all()


def check_names(config: dict) -> None:
    """Reject names that no directory can have, or that a checkpoint could not be loaded from."""
    for name in ('out_dir', 'checkpoint_mirror'):
        if config[name] and not is_utf8_path(config[name]):
            raise ConfigError(f'{name}={config[name]!r}: is not valid UTF-8; choose another name')
    for name in ('out_dir', 'checkpoint_mirror', 'data_cache'):
        if config[name] and (path := nearest_existing(config[name])).is_file():
            raise ConfigError(f'{name}={config[name]!r}: {path} is a file; choose another --{name}')


def check_resume(config: dict) -> None:
    if config['auto_resume'] and not config['out_dir']:
        raise ConfigError('auto_resume=True needs an --out_dir that is the same at every start')
    if config['overwrite'] and config['init_from'] == 'resume' and not config['auto_resume']:
        raise ConfigError(
            "overwrite=True starts a new run, but init_from='resume' resumes one; omit one of them"
        )
    if config['checkpoint'] and config['init_from'] == 'scratch':
        is_path = config['checkpoint'] not in ('last', 'best')
        run = shlex.quote(config['checkpoint']) if is_path else 'RUN (a run directory)'
        raise ConfigError(
            f'checkpoint={config["checkpoint"]!r}: a new model has no checkpoint; to fine-tune '
            f'one, use --init_from={run}; to resume its run, use --init_from=resume'
        )


def check_offload(config: dict) -> None:
    if config['offload'] and not config['shard']:
        raise ConfigError('offload=True needs a sharded model: add --shard or omit --offload')


def check_cuda_graph(config: dict) -> None:
    if config['cuda_graph'] is True and (obstacles := graph_obstacles(config)):
        raise ConfigError(
            f'cuda_graph=True: an update cannot be captured with {" and ".join(obstacles)}; use '
            '--cuda_graph=auto'
        )


def graph_obstacles(config: dict) -> list[str]:
    """The settings of a run whose updates cannot be captured as a CUDA graph."""
    # the divisor of a batch of conversations or pairs differs from update to update
    found = [f'objective={config["objective"]!r}'] if config['objective'] != 'lm' else []
    return found + [f'{name}=True' for name in ('shard', 'gradient_checkpointing') if config[name]]


def check_eval_only(config: dict) -> None:
    if config['eval_only'] and config['objective'] == 'dpo' and not is_resuming(config):
        raise ConfigError(
            "objective='dpo' with eval_only compares a run with its initial model: give the run's "
            '--out_dir and --init_from=resume'
        )


def check_rl(config: dict) -> None:
    """Reject what reinforcement learning lacks, and what has no meaning for it."""
    if config['objective'] != 'rl':
        return
    if not config['reward']:
        raise ConfigError(
            "objective='rl' needs a reward: give --reward=FILE.py with def reward(prompt, "
            'completion, row), or --reward=exact'
        )
    useless = {'dropout': 0.0, 'lora_dropout': 0.0, 'mask_documents': False, 'shard': False}
    for name, off in useless.items():
        if config[name] != off:
            raise ConfigError(
                f"{name}={config[name]!r}: is not supported with objective='rl'; use --{name}={off}"
            )


def check_ngram(config: dict) -> None:
    if config['ngram_order'] and config['objective'] != 'lm':
        raise ConfigError(
            f'ngram_order={config["ngram_order"]}: needs text, which '
            f'objective={config["objective"]!r} does not train on; use --ngram_order=None'
        )
    if config['ngram_order'] and config['mask_documents']:
        raise ConfigError(
            f'ngram_order={config["ngram_order"]}: the n-grams cross documents, which '
            'mask_documents=True forbids; use --ngram_order=None or --mask_documents=False'
        )


def check_mirror_setting(config: dict) -> None:
    if config['checkpoint_mirror']:
        check_mirror(config['checkpoint_mirror'], config['out_dir'])


RULES = (
    check_names,
    check_resume,
    check_offload,
    check_cuda_graph,
    check_mirror_setting,
    check_eval_only,
    check_rl,
    check_ngram,
)


# what an untrained model cannot be used for


def check_new_objective(config: dict) -> None:
    needed = {'dpo': 'a chat model', 'reward': 'a chat model', 'rl': 'a trained model'}
    needed = needed.get(config['objective'])
    if needed:
        raise ConfigError(
            f'objective={config["objective"]!r} needs {needed}: give --init_from=RUN_DIRECTORY'
        )


def check_new_freeze(config: dict) -> None:
    if config['freeze'] is not None:
        raise ConfigError(
            f'freeze={config["freeze"]} would keep random weights: give --init_from=gpt2 or a run '
            'directory'
        )


def check_new_lora(config: dict) -> None:
    if config['lora_rank']:
        raise ConfigError(
            f'lora_rank={config["lora_rank"]} needs a pretrained model: give '
            '--init_from=gpt2 or a run directory'
        )


def check_new_shape(config: dict) -> None:
    if any(config[dial] is not None for dial in DIALS):
        return  # auto.py chooses and checks the shape
    shape = {name: config[name] for name in (*SHAPE, 'dropout')}
    with as_config_error():
        GPTConfig(**shape)


NEW_MODEL_RULES = (check_new_objective, check_new_freeze, check_new_lora, check_new_shape)


def check_new_model(config: dict) -> None:
    """Reject settings that need a pretrained model."""
    apply_rules([partial(rule, config) for rule in NEW_MODEL_RULES])


def check_dial(config: dict, given: dict) -> str | None:
    """The dial that is set, None without one. ConfigError for what it cannot be combined with."""
    dials = [name for name in DIALS if config[name] is not None]
    if not dials:
        return None
    # a flag replaces the dial of a config
    dials = [name for name in dials if given.get(name, '').startswith('--')] or dials
    dial = dials[0]
    if len(dials) > 1:
        raise ConfigError(f'{dials[0]} and {dials[1]} are both set; use --{dials[1]}=None')
    shown = f'{dial}={config[dial]:g}'
    for name in LENGTHS:
        if name in given and (name, config[name]) not in NO_LENGTHS:
            raise ConfigError(
                f'{given[name]}: {shown} chooses {name}; use --{dial}=None, or omit {name}'
            )
    if config['eval_only']:
        raise ConfigError(
            f'{shown}: chooses a model to train, which eval_only does not do; to evaluate a run, '
            'use --init_from=resume with its out_dir'
        )
    if config['init_from'] not in ('scratch', 'resume'):  # 'resume' found no checkpoint
        raise ConfigError(
            f'{shown}: chooses the shape of a new model, but that of '
            f'init_from={config["init_from"]!r} is fixed; use --max_iters and --{dial}=None'
        )
    if config['objective'] != 'lm':
        raise ConfigError(
            f'{shown}: is for text, not for objective={config["objective"]!r}; use '
            f'--max_iters and --{dial}=None'
        )
    return dial


def check_resumed_dial(config: dict, given: dict) -> None:
    """Reject the flag of a dial with init_from='resume'. With auto_resume it is for the start."""
    for dial in DIALS:
        if given.get(dial, '').startswith('--') and config[dial] and not config['auto_resume']:
            raise ConfigError(
                f'{given[dial]}: chose the settings when this run began; to resume, omit it, and '
                'to train longer, use --max_iters'
            )


# -----------------------------------------------------------------------------
# with this machine


def validate_machine(config: dict, runtime: Runtime) -> None:
    """Reject what these processes on this device cannot do."""
    if config['shard'] and not torch.distributed.is_initialized():
        raise ConfigError(
            'shard=True splits the model over processes: start them with torchrun, for example '
            'torchrun --standalone --nproc_per_node=2 train.py ..., or use --shard=False'
        )
    if config['offload'] and runtime.device_type != 'cuda':
        raise ConfigError(f'offload=True needs a CUDA GPU, not {runtime.device}; omit --offload')
    if config['cuda_graph'] is True and (runtime.device_type != 'cuda' or runtime.world_size > 1):
        raise ConfigError(
            f'cuda_graph=True needs one process with a CUDA GPU, not {runtime}; use '
            '--cuda_graph=auto'
        )


# -----------------------------------------------------------------------------
# with the dataset


def validate_data(config: dict, data: Dataset) -> None:
    """Reject what this dataset cannot be used for."""
    name = config['dataset']
    if config['short_iters'] and data.is_chat:
        raise ConfigError(
            f'short_iters={config["short_iters"]}: conversations, as in {name}, cannot be cut; '
            'use --short_iters=0'
        )
    check_short_blocks(config, config['block_size'])
    if config['objective'] == 'rl':
        check_room(config, data)
    if config['ngram_order']:
        check_ngram_order(config, data)
    if not config['mask_documents']:
        return
    if config['objective'] in ('dpo', 'reward'):
        raise ConfigError(
            f'mask_documents=True: with objective={config["objective"]!r} a sequence is one '
            'conversation; use --mask_documents=False'
        )
    if not data.is_chat and data.tokenizer.eot is None:
        raise ConfigError(
            f'mask_documents=True: nothing separates the documents of {name}, because its '
            f'{data.tokenizer.name} tokenizer has no end-of-text token; use --mask_documents=False'
        )


def check_room(config: dict, data: Dataset) -> None:
    """Reject prompts that leave no room for a completion."""
    # a row has the length of the longest prompt
    room = max(0, config['block_size'] - data.block_size)
    if room < config['rl_tokens']:
        fix = f'use --rl_tokens={room}, or prepare' if room else 'prepare'
        raise ConfigError(
            f'rl_tokens={config["rl_tokens"]}: the prompts of {config["dataset"]}, of up to '
            f'{data.block_size} tokens, leave room for {room} in a context of '
            f'{config["block_size"]}; {fix} shorter prompts'
        )


def check_ngram_order(config: dict, data: Dataset) -> None:
    order, most = config['ngram_order'], max_order(data.vocab_size)
    if order > most:
        raise ConfigError(
            f'ngram_order={order}: is too high for a vocabulary of {data.vocab_size:,} tokens, as '
            f'that of {config["dataset"]}; use --ngram_order={most}'
        )


def check_short_blocks(config: dict, block_size: int) -> None:
    """Reject a short_block_size that does not divide block_size."""
    short, iters = config['short_block_size'], config['short_iters']
    short_block = min(short or 0, block_size)  # a shorter block_size is not cut
    if iters and (not short_block or block_size % short_block):
        most = min(short or block_size // 4 or 1, block_size)
        fits = next(size for size in range(most, 0, -1) if block_size % size == 0)
        raise ConfigError(
            f'short_iters={iters}: short_block_size={short} must divide '
            f'block_size={block_size}; try --short_block_size={fits}'
        )


def new_shape(config: dict, runtime: Runtime) -> dict:
    """The fields of GPTConfig that follow from the settings and the machine, for a new model.

    A bfloat16 residual stream halves its memory traffic on a GPU. It is recorded in the
    checkpoint: a model that began without it continues without it.
    """
    shape = {name: config[name] for name in SHAPE}
    return shape | {'bf16_residual': uses_bf16_residual(config['arch'], runtime)}


def uses_bf16_residual(arch: str, runtime: Runtime) -> bool:
    on_gpu = runtime.device_type == 'cuda' and runtime.dtype == torch.bfloat16
    return on_gpu and arch == 'gpt2'


def padded_vocab_size(size: int) -> int:
    """The vocabulary size of a new model: a large one is rounded up, for faster matrix products."""
    return -(-size // 64) * 64 if size > 1024 else size


def global_batch_size(config: dict) -> int:
    """Sequences (or pairs, or prompts: see train.py's batch_size) per update, over all
    processes."""
    return config['gradient_accumulation_steps'] * config['batch_size']


def steps_of(config: dict, data: Dataset) -> int:
    """The total number of updates: as many as `epochs` takes, otherwise max_iters."""
    if config['epochs'] is None:
        return config['max_iters']
    return math.ceil(config['epochs'] * data.n_windows / global_batch_size(config))


def lint_settings(config: dict, data: Dataset) -> Iterator[str]:
    """Warnings about settings that are valid but probably a mistake."""
    steps, lr, min_lr = steps_of(config, data), config['learning_rate'], config['min_lr']
    if steps > config['max_iters']:
        yield (
            f'epochs={config["epochs"]} makes {counted(steps, "step")} and overrides '
            f'max_iters={config["max_iters"]}; to use max_iters, add --epochs=None'
        )
    if config['decay_lr'] and config['lr_schedule'] != 'constant' and min_lr > lr:
        yield f'min_lr={min_lr} is above learning_rate={lr}: the learning rate will rise'
    if config['decay_lr'] and 0 < steps <= (warmup := config['warmup_iters']):
        yield (
            f'warmup_iters={warmup} is not less than the length of the run, '
            f'{counted(steps, "step")}'
        )
    if 0 < steps <= (short := config['short_iters']):
        yield (
            f'short_iters={short} leaves no step for full-length sequences: the run has '
            f'{counted(steps, "step")}'
        )
    for (needed, value), names in NO_EFFECT_UNLESS.items():
        active = config[needed] == value if isinstance(value, str) else config[needed]
        unused = ', '.join(f'--{name}' for name in names if config[name] != names[name])
        if unused and not active:
            yield f'ignored without --{needed}={value}: {unused}; add that flag, or omit {unused}'


# -----------------------------------------------------------------------------
# with the checkpoint to resume from


def check_unchanged(config: dict, before: dict, shape: GPTConfig, path: Path) -> None:
    """Reject what a resumed run cannot change. before: the settings saved with its checkpoint."""
    for name in SHAPE if before['init_from'] == 'scratch' else ():
        if config[name] != getattr(shape, name):
            raise ConfigError(
                f'{name}={config[name]}: {path} was trained with another {name}, and a resumed run '
                f'keeps its shape; to resume, use --{name}={getattr(shape, name)}; for a new '
                'model, use --init_from=scratch and another --out_dir'
            )
    freeze = {'freeze': None} if config['lora_rank'] else {}  # frozen blocks may be unfrozen
    for name, default in {**FIXED, **freeze}.items():
        if config[name] != before.get(name, default):
            raise ConfigError(
                f'{name}={config[name]!r}: {path} was trained with another {name}; to resume, use '
                f'--{name}={before.get(name, default)}; for a new run from its weights, use '
                f'--init_from={shlex.quote(str(path.parents[1]))} and another --out_dir'
            )
