"""
bench.py's runs behind config/auto.py: what loss each shape of model reaches, and in what time.

$ python bench.py --only=scaling --dataset=pydocs,mine       # fits the law that predicts the loss
$ python bench.py --only=rivals --dataset=mine --minutes=4   # auto and four other shapes

Each run is one line of a table next to this file. A run that is in the table is not repeated, so
that a stopped command continues; the rivals were written down before any of them ran.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from flatgpt import ROOT
from flatgpt.benchmarks.machine import processor_name
from flatgpt.benchmarks.report import Report, print_row
from flatgpt.benchmarks.training import error_line_of
from flatgpt.checkpoint.load import list_checkpoints, read_state
from flatgpt.data.dataset import Dataset, find_or_prepare_dataset
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime
from flatgpt.training.scaling import fit

SCALING, RIVALS = (Path(__file__).parent / name for name in ('scaling.jsonl', 'rivals.jsonl'))
EVALUATED = 400_000  # tokens; a shorter validation split is evaluated whole
GRID = [  # tokens, layers, width, context of the runs that the law is fitted to
    *((5e5, *shape, 256) for shape in ((2, 64), (2, 128), (3, 128), (5, 160))),
    *((1.5e6, *shape, 256) for shape in ((2, 64), (2, 128), (3, 128), (4, 160), (6, 192))),
    *((1.5e6, *shape, 256) for shape in ((2, 192), (2, 256), (3, 192), (3, 256))),
    *((1.5e6, 3, 128, block_size) for block_size in (64, 128, 512)),
    *((1.5e6, *shape, 256) for shape in ((6, 128), (4, 256))),
    *((5e6, *shape, 256) for shape in ((2, 128), (4, 128), (5, 160), (3, 192), (3, 256), (5, 192))),
    (5e6, 4, 128, 512),
    (1.5e7, 4, 128, 256),
]
# layers, width, context of four other models that one might choose, by minutes on two cores
RIVAL_SHAPES = {
    1: ((2, 128, 128), (3, 192, 256), (4, 128, 256), (6, 160, 256)),
    4: ((3, 160, 256), (4, 256, 256), (5, 160, 256), (8, 192, 256)),
    15: ((4, 192, 256), (5, 160, 512), (6, 256, 512), (8, 320, 256)),
}
RIVAL_SEEDS = {1: (1, 2)}  # one otherwise


def bench_scaling(settings: dict, runtime: Runtime, report: Report) -> None:
    """Train each model of GRID on each dataset, then fit the law to all rows of the table."""
    for name, (tokens, n_layer, n_embd, block_size) in product(
        settings['dataset'].split(','), GRID
    ):
        if tokens > settings['max_tokens']:
            continue
        shape = {'n_layer': n_layer, 'n_embd': n_embd, 'block_size': block_size}
        flags = {'dataset': name, 'minutes': None, 'tokens': tokens, 'seed': settings['seed']}
        quick = {'eval_interval': None, 'eval_iters': 1, 'sample_tokens': 0}
        row = train_once(SCALING, flags | shape, quick, runtime)
        variant = f'{Path(name).name} {n_layer} x {n_embd}'
        note = f'{tokens:,.0f} tokens, context {block_size}'
        print_row('scaling', variant, f'{row["val_loss"]:.4f}', note)
    law, texts, error = fit(read_rows(SCALING))
    print(f'{law}\n{len(texts)} texts, mean error of the loss: {error:.4f}')
    report.add('scaling', 'law', **law._asdict(), error=error)


def bench_rivals(settings: dict, runtime: Runtime, report: Report) -> None:
    """Train what auto chooses and its rivals on each dataset, for the given minutes."""
    minutes = settings['minutes']
    if minutes not in RIVAL_SHAPES:
        known = ', '.join(map(str, RIVAL_SHAPES))
        raise UserError(f'minutes={minutes}: rivals are written down for {known}; use one of them')
    models = {'auto': {}}
    for shape in RIVAL_SHAPES[minutes]:
        names = ('n_layer', 'n_embd', 'block_size')
        models['x'.join(map(str, shape))] = dict(zip(names, shape, strict=True))
    names, seeds = settings['dataset'].split(','), RIVAL_SEEDS.get(minutes, (1,))
    for name, seed, (model, pinned) in product(names, seeds, models.items()):
        flags = {'dataset': name, 'minutes': minutes, 'seed': seed, **pinned}
        row = train_once(RIVALS, flags, {}, runtime, {'model': model})
        loss, seconds = f'{row["val_loss"]:.4f}', f'{row["seconds"]:.1f} s'
        print_row('rivals', f'{Path(name).name} {model}', loss, seconds)
        report.add('rivals', model, **row)


def train_once(
    table: Path, flags: dict, other: dict, runtime: Runtime, labels: dict | None = None
) -> dict:
    """The table's row of a run of config/auto.py with these flags, trained if there is none.

    other: flags that do not change the model. labels: further keys of the row.
    """
    data = Dataset(find_or_prepare_dataset(flags['dataset']), 1)
    key = {**flags, **(labels or {}), 'dataset': data.name, 'fingerprint': data.fingerprint[:12]}
    key |= {'processor': processor_name(), 'threads': torch.get_num_threads()}
    key['dtype'] = runtime.dtype_name
    for row in read_rows(table):
        if all(name in row and row[name] == value for name, value in key.items()):
            return row
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'run'
        common = {'out_dir': out, 'device': runtime.device, 'dtype': runtime.dtype_name}
        began = time.perf_counter()
        run_train('auto', flags | other | common)
        seconds = time.perf_counter() - began
        row = key | measured(out, data) | {'seconds': round(seconds, 2)}
    with table.open('a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')
    return row


def measured(out: Path, data: Dataset) -> dict:
    """What a finished run was, and its loss over EVALUATED tokens of the validation split."""
    state = read_state(list_checkpoints(out)[-1])
    config = state['config']
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'batch_size')
    batches = -(-EVALUATED // (config['batch_size'] * config['block_size']))
    again = {'init_from': 'resume', 'eval_only': True, 'eval_iters': batches}
    printed = run_train(out / 'config.py', again)
    return {
        'text_tokens': data.tokens['train'],
        'text_bytes': data.text_bytes('train'),
        'vocab_size': data.vocab_size,
        **{name: config[name] for name in names},
        'trained': state['samples'] * config['block_size'],
        'steps': state['step'],
        'events': state.get('events', []),
        'val_loss': float(re.search(r'val_loss ([\d.]+)', printed)[1]),
    }


def run_train(config: str | Path, flags: dict) -> str:
    """Run train.py to its end -> what it printed. UserError with its error line."""
    command = [sys.executable, str(ROOT / 'train.py'), str(config)]
    command += [f'--{name}={value}' for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'train.py: {error_line_of(done.stderr)}')
    return done.stdout


def read_rows(table: Path) -> Iterator[dict]:
    if table.exists():
        yield from map(json.loads, table.read_text(encoding='utf-8').splitlines())
