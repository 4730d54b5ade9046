"""
Time this machine and this model beside others that do the same job; print a table, write JSON.

$ python bench.py                                     # GPT-2 124M: several minutes
$ python bench.py --quick                             # a minute, of a small model
$ python bench.py --only=decode --rows=1,16 --arch=modern
$ python bench.py train_shakespeare_char_cpu --vocab_size=65 --only=training --nanogpt=../nanoGPT
$ python bench.py --only=quality --out_dir=out/mine   # what 16 and 8 bits do to its perplexity
$ python bench.py --only=data --text=corpus/          # tokenizers, on your own files; reading
$ python bench.py --only=training --profile           # the slowest operators, and a trace
$ python bench.py --only=saving,processes             # what checkpoints and a second process cost
$ python bench.py --serve --block_size=1024           # api.py under load, beside transformers
$ python bench.py --task=lambada,cbt --out_dir=gpt2   # what a model knows, beside GPT-2's figures
$ python bench.py --compare=out/a,out/b               # the losses of runs in one picture, runs.png

Sides run in processes of their own, from the same weights, and take turns, so that a machine whose
speed drifts favours none. Figures are medians over the rounds, with the lowest and the highest. A
ratio is printed only between sides that did the same amount of work, and came to the same result
where that can be told: the loss before training, logits of a prompt, and tokens written in float32.
"""

import contextlib
import importlib.metadata
import os
import sys
from pathlib import Path

import torch

from configurator import configure
from flatgpt.benchmarks import load_test
from flatgpt.benchmarks.baselines import SMALL, build_model, import_nanogpt
from flatgpt.benchmarks.data import bench_data
from flatgpt.benchmarks.decoding import bench_quality, bench_startup, bench_writing, dataset_of
from flatgpt.benchmarks.report import Report, line, measure_machine
from flatgpt.benchmarks.scaling import bench_processes, bench_saving
from flatgpt.benchmarks.training import bench_training
from flatgpt.checkpoint.convert import is_foreign
from flatgpt.checkpoint.load import find, read_state
from flatgpt.errors import UserError, one_of, within
from flatgpt.runtime import DTYPES, Runtime, pick_device, pick_dtype
from flatgpt.training import metrics
from sample import load

# -----------------------------------------------------------------------------
# what is timed
only = (
    ''  # some of training,prefill,decode,quality,data,startup; saving,processes; empty: those six
)
quick = False  # fewer rounds and, unless a shape is given, a small model
rounds = 5  # turns of each side
nanogpt: str | None = None  # folder of a nanoGPT checkout to time beside
serve = False  # time api.py under load instead of all else
profile = False  # have torch's profiler watch a turn of flatGPT, and write its trace
json = 'bench.json'  # the figures, for programs
compare: str | None = None  # folders of runs, a,b: draw their losses into runs.png, time nothing
# training
steps = 3  # in a turn
optimizer = 'adamw'  # or 'muon'
batch_size = 4
dropout = 0.0
compile: bool | str = 'auto'  # 'auto' compiles on a CUDA GPU, as train.py does
# prefill and decoding
rows = '1,8,32'  # texts side by side
prompt_tokens = 64
new_tokens = 64
formats = 'float32,bfloat16,int8'  # of the weights
# serving
clients = 16  # that ask again when they have their answer
serve_format = 'bfloat16'  # of the weights
# quality, the perplexity of a model in each format; and tasks, instead of all that
out_dir: str | None = None  # a run, or gpt2, owner/name, a folder of others
dataset: str | None = None  # to measure quality on; None: what the run was trained on
task = ''  # lambada,hellaswag,wikitext2,wikitext103,cbt,blimp or others of lm-evaluation-harness
limit: int | None = None  # examples of each task, the first ones; None: all
init_from = 'resume'  # tasks, without out_dir: the newest run, or as out_dir
checkpoint: str | None = None  # tasks: None or 'best', 'last', or a path
tokenizer: str | None = None  # tasks: for a model that came without
quantize: str | None = None  # tasks: 'int8' to see what it costs
# data
text: str | None = None  # a folder of text; None: the source of Python's library and packages
text_bytes = 60_000_000  # of it at most
# model; the defaults are GPT-2 124M
arch = 'gpt2'  # or 'modern'
block_size = 256
vocab_size = 50304
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head: int | None = None  # arch='modern'
bias = False
# machine
device = 'auto'  # 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto: the fastest, but float32 for tasks
seed = 1337
# -----------------------------------------------------------------------------

JOBS = ('training', 'prefill', 'decode', 'quality', 'data', 'startup')
ASKED = ('saving', 'processes')  # only when they are named
QUICK = {**SMALL, 'rounds': 3, 'rows': '1,8', 'formats': 'bfloat16,int8', 'text_bytes': 5_000_000}


# -----------------------------------------------------------------------------
# jobs


def bench_tasks(c: dict) -> None:
    """What a model knows, by lm-evaluation-harness."""
    within(1, None, c, 'limit')
    check_writable(c)
    try:
        from flatgpt.benchmarks import lm_eval
    except ModuleNotFoundError as error:
        raise UserError(f'task={c["task"]}: needs pip install "lm_eval>=0.4.13"') from error
    versions = {'torch': torch.__version__, 'lm_eval': importlib.metadata.version('lm_eval')}
    report = Report(c, {'device': pick_device(c['device']), **versions})
    try:
        lm_eval.run(c, report.entries, load)
    finally:  # what was measured stays, whatever happened after it
        if report.entries:
            report.write()


# -----------------------------------------------------------------------------
# the command line


def check(c: dict) -> list[str]:
    """The jobs that are asked for; ConfigError or UserError for what cannot be."""
    names = ('rounds', 'steps', 'new_tokens', 'prompt_tokens', 'batch_size', 'text_bytes')
    within(1, None, c, *names)
    within(2, None, c, 'block_size', 'vocab_size', 'new_tokens')
    one_of((True, False, 'auto'), c, 'compile')
    one_of(('adamw', 'muon'), c, 'optimizer')
    jobs = [job for job in c['only'].split(',') if job]
    for job in jobs:
        one_of((*JOBS, *ASKED), {'only': job}, 'only')
    if 'quality' in jobs and not c['out_dir']:
        raise UserError('quality: needs --out_dir=RUN, a model that has learned something')
    jobs = jobs or [job for job in JOBS if job != 'quality' or c['out_dir']]
    if c['out_dir']:
        foreign = is_foreign(c['out_dir'])
        state = {} if foreign else read_state(find(c['out_dir']))
        dataset_of(state, c['dataset'])
    if c['text'] and not Path(c['text']).is_dir():
        raise UserError(f'text={c["text"]}: no such folder')
    check_writable(c)
    for kind in c['formats'].split(','):
        one_of((*DTYPES, 'int8'), {'formats': kind}, 'formats')
    for count in c['rows'].split(','):
        if not count.isdigit() or not int(count):
            raise UserError(f'rows={c["rows"]!r}: give numbers of texts, such as 1,8,32')
    writing = {'prefill', 'decode'} & {*jobs}
    if writing and c['prompt_tokens'] + c['new_tokens'] > c['block_size']:
        raise UserError(
            f'prompt_tokens={c["prompt_tokens"]} and new_tokens={c["new_tokens"]} do not fit into '
            f'block_size={c["block_size"]}'
        )
    if c['nanogpt']:
        if c['arch'] != 'gpt2':
            raise UserError("nanogpt: is GPT-2, so it cannot be timed beside arch='modern'")
        import_nanogpt(c['nanogpt'])
    return jobs


def check_writable(c: dict) -> None:
    folder = Path(c['json']).parent
    if not folder.is_dir() or Path(c['json']).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f'json={c["json"]}: is no file that can be written')


def check_memory(c: dict, runtime: Runtime, jobs: list[str]) -> None:
    """Refuse a model that this device cannot hold, before minutes are spent on finding out."""
    with torch.device('meta'):  # of many layers two tell enough
        one, two = (
            sum(p.numel() for p in build_model({**c, 'n_layer': n}).parameters()) for n in (1, 2)
        )
    parameters = one + (two - one) * (c['n_layer'] - 1)
    copies = {'training': 16 * (2 + bool(c['nanogpt'])), 'decode': 16, 'prefill': 16}
    needed = parameters * max([copies.get(job, 4) for job in jobs])
    if runtime.device_type == 'cuda':
        free = torch.cuda.mem_get_info(runtime.device)[0]
    elif hasattr(os, 'sysconf') and 'SC_AVPHYS_PAGES' in os.sysconf_names:
        free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        with contextlib.suppress(OSError):  # what the page cache holds can be had, too
            for row in Path('/proc/meminfo').read_text().splitlines():
                if row.startswith('MemAvailable'):
                    free = int(row.split()[1]) * 1024
    else:
        return
    if needed > free:
        raise UserError(
            f'{parameters / 1e6:,.0f}M parameters on all sides need {needed / 2**30:.0f} GiB and '
            f'{runtime.device} has {free / 2**30:.0f} GiB free; lower --n_layer or --n_embd'
        )


def main(c: dict) -> None:
    modes = [name for name in ('compare', 'task', 'serve', 'only') if c[name]]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]}: give one of them')
    if c['serve'] and c['out_dir']:
        raise UserError('--serve: times random weights of the shape given; leave out --out_dir')
    if c['compare'] is not None:
        return print(metrics.draw_runs(c['compare'].split(','), 'runs.png'))
    if c['task']:
        return bench_tasks(c)
    jobs = check(c)
    device = pick_device(c['device'])
    runtime = Runtime(device, pick_dtype(c['dtype'], device, training=True))
    c['device'] = runtime.device
    check_memory(c, runtime, jobs)
    report = Report(c, measure_machine(runtime))
    line('job', 'side', 'tokens/s, median (low to high)', '')
    try:
        if c['serve']:
            return load_test.bench_serving(c, runtime, report)
        if 'training' in jobs:
            bench_training(c, runtime, report)
        writing = [job for job in ('prefill', 'decode') if job in jobs]
        if writing:
            bench_writing(c, runtime, report, writing)
        others = {'quality': bench_quality, 'data': bench_data, 'startup': bench_startup}
        others |= {'saving': bench_saving, 'processes': bench_processes}
        for job in [job for job in others if job in jobs]:
            others[job](c, runtime, report)
    finally:  # what was measured stays, whatever happened after it
        report.write()


if __name__ == '__main__':
    defaults = {name: globals()[name] for name in QUICK}
    config = configure(globals(), sys.argv[1:])
    if config['quick']:  # a shape that a config or a flag gives stays
        config |= {name: QUICK[name] for name in QUICK if config[name] == defaults[name]}
    main(config)
