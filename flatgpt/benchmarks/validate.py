"""Checks of bench.py's settings before it measures anything: a UserError for each mistake."""

import os
from importlib.util import find_spec
from pathlib import Path

from flatgpt.benchmarks.baselines import build_meta_model, import_nanogpt
from flatgpt.benchmarks.decoding import dataset_of, keys_and_values
from flatgpt.checkpoint.convert import is_external
from flatgpt.checkpoint.load import find_checkpoint, read_state
from flatgpt.errors import UserError, check_choice, check_range
from flatgpt.runtime import DTYPES, Runtime, available_memory

# settings of some benchmarks only; not those that train.py has too, whose configs work here
USED_BY = {
    'nanogpt': ('training',),
    'text': ('data',),
    'profile': ('training', 'prefill', 'decode'),
    'limit': ('task',),
    'quantize': ('task',),
    'tokenizer': ('task',),
    'core_data': ('core',),
    'start': ('report',),
}
MODES = {'task': '--task=', 'core': '--task=core', 'report': '--report='}
FORMATS = (*DTYPES, 'int8')
SERVING = ('flask', 'waitress', 'pydantic', 'spectree', 'prometheus_client')  # that api.py needs


def check_modes(settings: dict) -> None:
    """UserError for more than one of --compare, --report, --task, --serve and --only."""
    names = ('compare', 'report', 'task', 'serve', 'only')
    modes = [name for name in names if settings[name]]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]}: give one of them')
    if settings['serve'] and (missing := [name for name in SERVING if not find_spec(name)]):
        raise UserError(f'--serve: api.py needs pip install {" ".join(missing)}')
    if settings['serve'] and settings['out_dir']:
        raise UserError('--serve: measures random weights of the given shape; omit --out_dir')


def compared_runs(settings: dict, name: str) -> list[str]:
    """The run directories of --compare=a,b, or of --report; UserError for one that does not
    exist."""
    runs = settings[name].split(',')
    for run in runs:
        if not run or not Path(run).is_dir():
            raise UserError(
                f'{name}={run}: no such run directory; give existing ones, separated by commas'
            )
    return runs


def check_used(settings: dict, benchmarks: list[str]) -> None:
    """UserError for a setting that none of the benchmarks uses."""
    for name, users in USED_BY.items():
        if settings[name] and not {*users} & {*benchmarks}:
            flags = ' or '.join(MODES.get(user, f'--only={user}') for user in users)
            raise UserError(f'{name}={settings[name]!r}: is only for {flags}; omit it')


def check_writable(settings: dict) -> None:
    path = Path(settings['json'])
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f'json={path}: not a file that can be written; give another path')


def requested_benchmarks(
    settings: dict, benchmarks: list[str], extra: tuple[str, ...]
) -> list[str]:
    """'serve', or those in `only`, in their own order; by default all except `extra`."""
    if settings['serve']:
        return ['serve']
    named = [name for name in settings['only'].split(',') if name]
    for name in named:
        check_choice(tuple(benchmarks), {'only': name}, 'only')
    for name in {'scaling', 'rivals'} & {*named}:
        if not settings['dataset']:
            raise UserError(f'{name}: trains on a dataset; give --dataset=NAME, or several: a,b')
    if 'quality' in named and not settings['out_dir']:
        raise UserError('quality: needs a trained model; give --out_dir=RUN')
    if named:
        return [name for name in benchmarks if name in named]
    without = (*extra, *([] if settings['out_dir'] else ['quality']))
    return [name for name in benchmarks if name not in without]


def check_benchmark_settings(settings: dict, benchmarks: list[str]) -> None:
    check_values(settings)
    if settings['out_dir']:
        external = is_external(settings['out_dir'])
        which = settings['checkpoint'] or 'best'
        state = {} if external else read_state(find_checkpoint(settings['out_dir'], which))
        dataset_of(state, settings['dataset'])
    if settings['text'] and not Path(settings['text']).is_dir():
        raise UserError(f'text={settings["text"]}: no such folder; give an existing one')
    prompt, new, size = (settings[k] for k in ('prompt_tokens', 'new_tokens', 'block_size'))
    generating = {'prefill', 'decode', 'rl', 'grammar', 'speculation', 'serve'} & {*benchmarks}
    if generating and prompt + new > size:
        raise UserError(
            f'prompt_tokens={prompt} and new_tokens={new} do not fit into block_size={size}; '
            f'lower one of them, or use --block_size={prompt + new}'
        )
    if settings['nanogpt']:
        if settings['arch'] != 'gpt2':
            raise UserError('nanogpt: only has GPT-2; use --arch=gpt2, or omit --nanogpt')
        import_nanogpt(settings['nanogpt'])


def check_values(settings: dict) -> None:
    """The range of each setting."""
    numbers = ('rounds', 'steps', 'prompt_tokens', 'batch_size', 'clients', 'text_bytes')
    check_range(1, None, settings, *numbers)
    check_range(2, None, settings, 'block_size', 'vocab_size', 'new_tokens')
    check_choice((True, False, 'auto'), settings, 'compile')
    check_choice(('adamw', 'muon'), settings, 'optimizer')
    check_choice((*FORMATS, 'auto'), settings, 'serve_format')
    if settings['formats'] != 'auto':
        for kind in settings['formats'].split(','):
            check_choice(FORMATS, {'formats': kind}, 'formats')
    for count in settings['rows'].split(','):
        if not count.isdigit() or not int(count):
            raise UserError(f'rows={settings["rows"]!r}: give batch sizes, such as 1,8,32')


def check_memory(settings: dict, runtime: Runtime, benchmarks: list[str]) -> None:
    """UserError for a model that does not fit on this device, before minutes of measuring."""
    parameters = count_parameters(settings)
    training = 16 * (2 + bool(settings['nanogpt']))  # parameters, gradients and AdamW, of each
    bytes_each = {
        'training': training,
        'rl': 32,
        'prefill': 16,
        'decode': 16,
        'serve': 16,
    }  # of all implementations together
    needed = parameters * max(bytes_each.get(name, 4) for name in benchmarks)
    if 'serve' in benchmarks:
        needed += 4 * settings['clients'] * settings['block_size'] * keys_and_values(settings)
    free = available_memory(runtime)
    if free is not None and needed > free:
        raise UserError(
            f'{parameters / 1e6:,.0f}M parameters in each implementation, and what they compute '
            f'with, need {needed / 2**30:.0f} GiB and {runtime.device} has '
            f'{free / 2**30:.0f} GiB free; '
            'lower --n_layer, --n_embd, --block_size or --clients'
        )


def count_parameters(settings: dict) -> int:
    one, two = (  # extrapolated from two layers
        sum(p.numel() for p in build_meta_model({**settings, 'n_layer': n}).parameters())
        for n in (1, 2)
    )
    return one + (two - one) * (settings['n_layer'] - 1)
