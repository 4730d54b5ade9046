"""What the settings of train.py may be, alone, together, and with a dataset or a model."""

import math
from collections.abc import Iterator
from pathlib import Path

from flatgpt.data.dataset import Dataset
from flatgpt.errors import ConfigError
from model import GPTConfig

SHAPE = ('arch', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'bias')


LORA = {'lora_rank': None, 'lora_alpha': None, 'lora_dropout': 0.0, 'lora_targets': 'all'}


FIXED = {'optimizer': 'adamw', 'objective': 'lm', **LORA}  # of a run that goes on; older: as here


NEW = ('scratch', 'resume')  # a run that starts anew, 'resume' where auto_resume finds nothing


def check_new(config: dict) -> None:
    """Refuse what a model that knows nothing cannot be used for."""
    if config['objective'] == 'dpo':
        raise ConfigError("objective='dpo' needs a model that answers: give --init_from")
    if config['freeze'] is not None:
        raise ConfigError(
            f'freeze={config["freeze"]}: would keep random numbers; give --init_from=gpt2, or the '
            'folder of a run'
        )
    if config['lora_rank']:
        raise ConfigError(
            f'lora_rank={config["lora_rank"]}: adapters need a model that knows something; '
            'give --init_from=gpt2, or the folder of a run'
        )


def check_batches(config: dict, data: Dataset) -> None:
    """Refuse what cannot be done with the rows of this dataset."""
    name = config['dataset']
    if config['short_iters'] and data.rows:
        raise ConfigError(
            f'short_iters={config["short_iters"]}: the rows of {name} are not cut; leave it at 0'
        )
    check_pieces(config, config['block_size'])
    if not config['mask_documents']:
        return
    if config['objective'] == 'dpo':
        raise ConfigError(
            'mask_documents=True: a row of a pair is one conversation; leave it False'
        )
    if not data.rows and data.tokenizer.eot is None:
        raise ConfigError(
            f'mask_documents=True: nothing divides the documents of {name}, whose '
            f'{data.tokenizer.name} tokenizer has no end of text; leave it at False'
        )


def steps_of(config: dict, data: Dataset) -> int:
    """Updates of the run in all: as many as its epochs take, where it has them."""
    if config['epochs'] is None:
        return config['max_iters']
    rows = config['gradient_accumulation_steps'] * config['batch_size']
    return math.ceil(config['epochs'] * data.n_windows / rows)


def slips(config: dict, data: Dataset) -> Iterator[str]:
    """What is allowed, and hardly meant."""
    steps, lr, min_lr = steps_of(config, data), config['learning_rate'], config['min_lr']
    if steps > config['max_iters']:
        yield (
            f'epochs={config["epochs"]} are {steps} steps, and that counts, not '
            f'max_iters={config["max_iters"]}; --epochs=None leaves it to that'
        )
    if config['decay_lr'] and config['lr_schedule'] != 'constant' and min_lr > lr:
        yield f'min_lr={min_lr} is above learning_rate={lr}: the rate will rise'
    if config['decay_lr'] and 0 < steps <= (warmup := config['warmup_iters']):
        yield f'warmup_iters={warmup} outlasts the {steps} steps of the run'
    if 0 < steps <= (short := config['short_iters']):
        yield f'short_iters={short} leaves no step of {steps} for whole sequences'


def check_pieces(config: dict, block_size: int) -> None:
    """Refuse short sequences that whole ones cannot be cut into."""
    short, iters = config['short_block_size'], config['short_iters']
    piece = min(short or 0, block_size)  # a shorter block_size has nothing to cut
    if iters and (not piece or block_size % piece):
        fits = math.gcd(short or block_size // 4, block_size)
        raise ConfigError(
            f'short_iters={iters}: short_block_size={short} does not cut block_size={block_size} '
            f'into equal pieces; try --short_block_size={fits}'
        )


def check_same(config: dict, before: dict, shape: GPTConfig, path: Path) -> None:
    """Refuse what a resumed run cannot change."""
    for name in SHAPE if before['init_from'] == 'scratch' else ():
        if config[name] != getattr(shape, name):
            raise ConfigError(
                f'{name}={config[name]}: {path} was trained with {name}={getattr(shape, name)}, '
                'and a resumed run keeps its shape'
            )
    freeze = {'freeze': None} if config['lora_rank'] else {}  # whole blocks may thaw
    for name, default in {**FIXED, **freeze}.items():
        if config[name] != before.get(name, default):
            raise ConfigError(
                f'{name}={config[name]!r}: {path} was trained with {name}='
                f'{before.get(name, default)!r}; for a new run from its weights, give '
                f'--init_from={path.parents[1]} and another --out_dir'
            )
