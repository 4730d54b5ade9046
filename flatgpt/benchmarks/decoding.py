"""
bench.py's generation benchmarks: speed, perplexity in each number format, and start-up time.

$ python bench.py --only=prefill,decode --rows=1,16      # and by transformers
$ python bench.py --only=quality --out_dir=out/mine      # perplexity in 32, 16, 8 bits, GGUF
$ python bench.py --only=startup                         # from the command to the first token
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from flatgpt import ROOT
from flatgpt.benchmarks.baselines import (
    SMALL,
    build_meta_model,
    build_random_model,
    transformers_model,
    with_precision,
)
from flatgpt.benchmarks.cpp_baselines import FORMATS, installed_baselines
from flatgpt.benchmarks.implementations import (
    Implementation,
    Measurement,
    measure_interleaved,
    print_profile,
    start_implementations,
)
from flatgpt.benchmarks.report import Report, format_spread, print_row, summarize
from flatgpt.checkpoint.gguf import check_gguf, export_gguf
from flatgpt.checkpoint.load import load_model
from flatgpt.checkpoint.save import save_checkpoint
from flatgpt.data.dataset import DATA, Dataset, is_prepared
from flatgpt.data.tokenizer import Tokenizer, char_tokenizer
from flatgpt.errors import UserError, counted
from flatgpt.runtime import Runtime, pick_dtype, product_dtype
from model import GPT

WEIGHT_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}
QUICK_WINDOWS = 64  # of the validation split, with --quick
GGUF = 'llama.cpp, GGUF'  # float16
LossOf = Callable[[np.ndarray, np.ndarray], float]  # of ids x, y (B, T): nats per target


# -----------------------------------------------------------------------------
# prefill and decoding


def bench_generation(settings: dict, runtime: Runtime, report: Report) -> None:
    """Prefill and decoding, for each number of rows, of every format and library."""
    formats = formats_of(settings)
    names = [('flatGPT', kind) for kind in formats]
    names += [('transformers', kind) for kind in formats if kind != 'int8']
    others, missing = installed_baselines(settings, formats)
    names += others
    for name in missing:
        print_row('generation', name, '', 'not installed')
    row_counts = [int(count) for count in settings['rows'].split(',')]
    with start_implementations(names, settings, 'generation') as implementations:
        for about in dict.fromkeys(filter(None, (each.about for each in implementations))):
            print(about)
        for method in ('prefill', 'decode'):
            if method not in settings['benchmarks']:
                continue
            for rows in row_counts:
                measurements = measure_interleaved(implementations, settings, method, rows)
                notes = {}
                for each in implementations:
                    own = measurements[each.label] if each.name == 'flatGPT' else []
                    share = own and share_of_limit(settings, report, method, each, rows, own)
                    notes[each.label] = ', '.join(filter(None, [share, each.failure]))
                name = f'{method} {counted(rows, "row")}'
                report.compare(name, measurements, notes, tolerances_of(formats))
            print_profile(implementations[0], settings, method, row_counts[0])


def choose_formats(settings: dict, device: str) -> dict[str, str]:
    """The formats for those settings that are 'auto': 16 bits only where the hardware has them."""
    fast = fast_format(device)
    formats = [fast, 'int8'] if settings['quick'] else ['float32', fast, 'int8']
    chosen = {'formats': ','.join(dict.fromkeys(formats)), 'serve_format': fast}
    return {name: value for name, value in chosen.items() if settings[name] == 'auto'}


def fast_format(device: str) -> str:
    """The weights that generation is fastest with, apart from int8."""
    on_cpu = device == 'cpu'
    dtype = pick_dtype('auto', 'cpu') if on_cpu else product_dtype(torch.device(device))
    return str(dtype).removeprefix('torch.')


def formats_of(settings: dict) -> list[str]:
    return [*dict.fromkeys(settings['formats'].split(','))]


def tolerances_of(formats: list[str]) -> dict[str, dict[str, float]]:
    """How far apart the results of others and of flatGPT may be, in each format."""
    tolerances = {
        f'transformers {kind}': {f'flatGPT {kind}': 1e-3 if kind == 'float32' else 0.05}
        for kind in formats
        if kind != 'int8'
    }
    closest = [kind for kind in ('bfloat16', 'float32') if kind in formats]
    if 'int8' in formats and closest:  # compared with its 16 or 32 bits, as it has no int8
        tolerances[f'transformers {closest[0]}']['flatGPT int8'] = 0.2
    for name, table in FORMATS.items():
        for ours in {*table} & {*formats}:
            tolerance = {'float32': 1e-3, 'int8': 0.2}.get(ours, 0.05)
            for theirs in table[ours]:
                tolerances.setdefault(f'{name} {theirs}', {})[f'flatGPT {ours}'] = tolerance
    return tolerances


def share_of_limit(
    settings: dict,
    report: Report,
    method: str,
    implementation: Implementation,
    rows: int,
    measurements: list[Measurement],
) -> str:
    """A step's share of the roofline: of reading weights and cache from memory, or of computing.

    A step computes the whole prompt in prefill, and one token per row in decoding.
    """
    machine, prefill = report.machine, method == 'prefill'
    model = build_meta_model(settings)
    steps = 1 if prefill else settings['new_tokens'] - 1
    cache = 0 if prefill else rows * cache_bytes(settings, machine, implementation.format)
    weights = model.num_params() * WEIGHT_BYTES[implementation.format]
    reading = (weights + cache) / machine['read_bytes_per_second']
    head = settings['vocab_size'] * settings['n_embd']  # applied to one token per row
    tokens = settings['prompt_tokens'] if prefill else 1
    flops = 2 * rows * ((model.num_params() - head) * tokens + head)
    # int8 weights are multiplied in what is faster here
    dtypes = ('bfloat16', 'float32') if implementation.format == 'int8' else [implementation.format]
    computing = flops / max(machine.get(f'flops_{dtype}', math.inf) for dtype in dtypes)
    seconds = statistics.median(measurement.seconds for measurement in measurements) / steps
    limit = 'memory-bandwidth' if reading > computing else 'compute'
    return f'{max(reading, computing) / seconds:.0%} of the {limit} limit'


def cache_bytes(settings: dict, machine: dict, kind: str) -> float:
    """Bytes of one row's keys and values, halfway through its decoding."""
    tokens = settings['prompt_tokens'] + settings['new_tokens'] / 2
    itemsize = 4 if machine['device'] == 'cpu' else max(WEIGHT_BYTES[kind], 2)
    return keys_and_values(settings) * tokens * itemsize


def keys_and_values(settings: dict) -> int:
    """The numbers in the cache for each token."""
    heads = settings['n_kv_head'] or settings['n_head']
    return 2 * settings['n_layer'] * (settings['n_embd'] // settings['n_head']) * heads


# -----------------------------------------------------------------------------
# quality


def bench_quality(settings: dict, runtime: Runtime, report: Report) -> None:
    """Perplexity of a run's model on its own validation split, in each format, and of its GGUF file
    in llama.cpp."""
    windows, found = QUICK_WINDOWS if settings['quick'] else None, {}
    source, checkpoint = settings['out_dir'], settings['checkpoint'] or 'best'
    for kind in [*formats_of(settings), GGUF]:
        model, tokenizer, state = load_model(source, checkpoint, runtime.device)
        data = Dataset(dataset_of(state, settings['dataset']), model.config.block_size)
        if tokenizer not in (None, data.tokenizer) or data.vocab_size > model.config.vocab_size:
            raise UserError(
                f'{data.folder}: was not prepared with the tokenizer of {source}; '
                'give a dataset that was by --dataset='
            )
        if kind != GGUF:
            loss_of = torch_loss(with_precision(model, kind), runtime.device)
        elif reason := why_no_gguf(model, data.tokenizer):
            print_row('quality', kind, '', reason)
            continue
        else:
            loss_of = gguf_loss(model, data.tokenizer, state)
        found[kind], tokens = perplexity(loss_of, data, windows)
        change = found[kind] / next(iter(found.values())) - 1
        changed = f' ({change:+.3%})' if len(found) > 1 else ''
        note = f'perplexity {found[kind]:.4f}{changed}, {tokens:,} tokens of {data.folder.name}'
        print_row('quality', kind, '', note)
        report.add('quality', kind, note, perplexity=found[kind])


def perplexity(loss_of: LossOf, data: Dataset, count: int | None) -> tuple[float, int]:
    """The perplexity of the validation split, or `count` windows of it, and its tokens."""
    starts = data.eval_starts('val', count)
    total = tokens = 0
    for batch in np.array_split(starts, math.ceil(len(starts) / 8)):
        x, y = data.eval_batch('val', batch)  # (B, T)
        targets = int((y >= 0).sum())
        total, tokens = total + loss_of(x, y) * targets, tokens + targets
    return math.exp(total / tokens), tokens


def torch_loss(model: GPT, device: str) -> LossOf:
    @torch.inference_mode()
    def loss_of(x, y):
        return model(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))[1].item()

    return loss_of


def why_no_gguf(model: GPT, tokenizer: Tokenizer) -> str:
    """Why llama.cpp cannot compute this model, '' if it can."""
    if not (find_spec('llama_cpp') and find_spec('gguf')):
        return 'needs pip install llama-cpp-python gguf'
    try:
        check_gguf(model, tokenizer)
    except UserError as error:
        return str(error)
    return ''


def gguf_loss(model: GPT, tokenizer: Tokenizer, state: dict) -> LossOf:
    """The loss as llama.cpp computes it from the model's GGUF file, on the CPU."""
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.gguf'
        export_gguf(model, tokenizer, state, path)
        size = model.config.block_size
        llama = Llama(str(path), n_ctx=size, logits_all=True, n_gpu_layers=0, verbose=False)

    def loss_of(x, y):
        logits = []
        for row in x:
            llama.reset()
            llama.eval(row.tolist())
            logits.append(torch.from_numpy(llama.scores[: len(row)].copy()))  # (T, V)
        targets = torch.from_numpy(y).flatten()
        return F.cross_entropy(torch.cat(logits), targets, ignore_index=-1).item()

    return loss_of


def dataset_of(state: dict, dataset: str | None) -> Path:
    """The folder of `dataset`, by default of the checkpoint's training dataset."""
    name = dataset or state.get('config', {}).get('dataset')
    if not name:
        raise UserError('quality: this model has no record of its dataset; give one by --dataset=')
    folder = Path(name) if Path(name).is_dir() else DATA / name
    if not is_prepared(folder):
        raise UserError(
            f'{folder}: no prepared dataset; prepare it, or give another one by --dataset='
        )
    return folder


# -----------------------------------------------------------------------------
# start-up

TRANSFORMERS_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
idx = torch.tensor([[1]])
written = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=1,
                         do_sample=False, pad_token_id=0)
print(chr(0x4E00 + int(written[0, -1])), flush=True)
"""


def bench_startup(settings: dict, runtime: Runtime, report: Report) -> None:
    """Time commands that generate one token by a small model on the CPU."""
    shape = SMALL | {'vocab_size': 4096, 'block_size': 256, 'dropout': 0.0}
    notes = {
        'flatGPT': 'to the first token: sample.py',
        'transformers': 'of from_pretrained and generate',
    }
    with tempfile.TemporaryDirectory() as folder:
        commands = startup_commands({**settings, **shape, 'device': 'cpu'}, Path(folder))
        if 'transformers' not in commands:
            print_row('startup', 'transformers', '', 'not installed')
        measurements = {variant: [] for variant in commands}
        for _ in range(settings['rounds']):
            for variant, command in commands.items():
                measurements[variant].append(first_token(command))
    for variant, own in measurements.items():
        note = notes[variant]
        if variant != 'flatGPT':
            note += f', {compare_startup(measurements["flatGPT"], own)}'
        seconds = [seconds for seconds, _ in own]
        print_row('startup', variant, format_spread(seconds, '.2f') + ' seconds', note)
        report.add('startup', variant, note, seconds=summarize(seconds))


def startup_commands(settings: dict, folder: Path) -> dict[str, list]:
    """Save a model for each implementation -> the commands that generate one token."""
    letters = [chr(0x4E00 + i) for i in range(settings['vocab_size'])]
    run, exported = folder / 'run', folder / 'transformers'
    tokenizer = char_tokenizer(letters)
    save_checkpoint(
        run, build_random_model(settings), [], tokenizer, {'step': 0}, keep_evaluated=False
    )
    options = [f'--out_dir={run}', '--num_samples=1', '--max_new_tokens=1', '--temperature=0']
    options += ['--device=cpu', '--dtype=float32']
    commands = {'flatGPT': [sys.executable, ROOT / 'sample.py', letters[1], *options]}
    try:
        from transformers.utils import logging
    except ImportError:
        return commands
    logging.disable_progress_bar()
    transformers_model(settings).save_pretrained(exported)
    commands['transformers'] = [sys.executable, '-c', TRANSFORMERS_SCRIPT, exported]
    return commands


def first_token(command: list) -> tuple[float, str]:
    """Run a command -> its seconds, and the character it printed."""
    begin = time.perf_counter()
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding='utf-8')
    if result.returncode:
        raise UserError(f'startup: {(result.stderr.strip().splitlines() or ["no output"])[-1]}')
    return time.perf_counter() - begin, result.stdout.strip()[-1:]


def compare_startup(ours: list[tuple], theirs: list[tuple]) -> str:
    if theirs[0][1] != ours[0][1]:
        return 'no ratio to flatGPT: it generated another token'
    ratios = [their[0] / our[0] for our, their in zip(ours, theirs, strict=True)]
    return f'flatGPT is {format_spread(ratios, ".2f")} times as fast'
