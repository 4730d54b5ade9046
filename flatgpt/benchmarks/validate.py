"""What bench.py refuses before it measures anything, as one line each."""

import os
from importlib.util import find_spec
from pathlib import Path

from flatgpt.benchmarks.baselines import build_outline, import_nanogpt
from flatgpt.benchmarks.decoding import dataset_of
from flatgpt.benchmarks.machine import free_memory
from flatgpt.checkpoint.convert import is_foreign
from flatgpt.checkpoint.load import find, read_state
from flatgpt.errors import UserError, one_of, within
from flatgpt.runtime import DTYPES, Runtime

# settings that ask for something, and the jobs that look at them; none that train.py has as well,
# since its configs serve here, too
USED_BY = {
    'nanogpt': ('training',),
    'text': ('data',),
    'profile': ('training', 'prefill', 'decode'),
    'limit': ('task',),
    'quantize': ('task',),
    'tokenizer': ('task',),
}
FORMATS = (*DTYPES, 'int8')
SERVING = ('flask', 'waitress', 'pydantic', 'spectree', 'prometheus_client')  # that api.py needs


def check_modes(settings: dict) -> None:
    """One thing at a time: --compare, --task, --serve or --only."""
    modes = [name for name in ('compare', 'task', 'serve', 'only') if settings[name]]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]}: give one of them')
    if settings['serve'] and (missing := [name for name in SERVING if not find_spec(name)]):
        raise UserError(f'--serve: api.py needs pip install {" ".join(missing)}')
    if settings['serve'] and settings['out_dir']:
        raise UserError('--serve: times random weights of the shape given; leave out --out_dir')


def check_used(settings: dict, jobs: list[str]) -> None:
    """Refuse what was asked for, and none of the jobs would do."""
    for name, users in USED_BY.items():
        if settings[name] and not {*users} & {*jobs}:
            flags = ' or '.join('--task=' if job == 'task' else f'--only={job}' for job in users)
            raise UserError(f'{name}={settings[name]!r}: is for {flags}; leave it out')


def check_writable(settings: dict) -> None:
    path = Path(settings['json'])
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f'json={path}: is no file that can be written')


def requested_jobs(settings: dict, jobs: list[str], extra: tuple[str, ...]) -> list[str]:
    """Those of `jobs` that `only` names; by default all but `extra`, in their order."""
    named = [job for job in settings['only'].split(',') if job]
    for job in named:
        one_of(tuple(jobs), {'only': job}, 'only')
    if 'quality' in named and not settings['out_dir']:
        raise UserError('quality: needs --out_dir=RUN, a model that has learned something')
    if named:
        return [job for job in jobs if job in named]
    return [job for job in jobs if job not in extra and (job != 'quality' or settings['out_dir'])]


def check_settings(settings: dict, jobs: list[str]) -> None:
    check_values(settings)
    if settings['out_dir']:
        foreign = is_foreign(settings['out_dir'])
        state = {} if foreign else read_state(find(settings['out_dir']))
        dataset_of(state, settings['dataset'])
    if settings['text'] and not Path(settings['text']).is_dir():
        raise UserError(f'text={settings["text"]}: no such folder')
    prompt, new, size = (settings[k] for k in ('prompt_tokens', 'new_tokens', 'block_size'))
    if {'prefill', 'decode'} & {*jobs} and prompt + new > size:
        raise UserError(
            f'prompt_tokens={prompt} and new_tokens={new} do not fit into block_size={size}'
        )
    if settings['nanogpt']:
        if settings['arch'] != 'gpt2':
            raise UserError("nanogpt: is GPT-2, so it cannot be timed beside arch='modern'")
        import_nanogpt(settings['nanogpt'])


def check_values(settings: dict) -> None:
    """Each setting by itself."""
    numbers = ('rounds', 'steps', 'prompt_tokens', 'batch_size', 'clients', 'text_bytes')
    within(1, None, settings, *numbers)
    within(2, None, settings, 'block_size', 'vocab_size', 'new_tokens')
    one_of((True, False, 'auto'), settings, 'compile')
    one_of(('adamw', 'muon'), settings, 'optimizer')
    one_of(FORMATS, settings, 'serve_format')
    for kind in settings['formats'].split(','):
        one_of(FORMATS, {'formats': kind}, 'formats')
    for count in settings['rows'].split(','):
        if not count.isdigit() or not int(count):
            raise UserError(f'rows={settings["rows"]!r}: give numbers of texts, such as 1,8,32')


def check_memory(settings: dict, runtime: Runtime, jobs: list[str]) -> None:
    """Refuse a model that this device cannot hold, before minutes are spent on finding out."""
    parameters = count_parameters(settings)
    training = 16 * (2 + bool(settings['nanogpt']))  # parameters, gradients and AdamW's of a side
    bytes_each = {'training': training, 'prefill': 16, 'decode': 16}  # of all sides
    needed = parameters * max(bytes_each.get(job, 4) for job in jobs)
    free = free_memory(runtime)
    if free is not None and needed > free:
        raise UserError(
            f'{parameters / 1e6:,.0f}M parameters on all sides need {needed / 2**30:.0f} GiB and '
            f'{runtime.device} has {free / 2**30:.0f} GiB free; lower --n_layer or --n_embd'
        )


def count_parameters(settings: dict) -> int:
    one, two = (  # of many layers two are enough to tell
        sum(p.numel() for p in build_outline({**settings, 'n_layer': n}).parameters())
        for n in (1, 2)
    )
    return one + (two - one) * (settings['n_layer'] - 1)
