"""Prefill, decoding, the quality of number formats, and the time to a first token, for bench.py."""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from flatgpt import ROOT
from flatgpt.benchmarks.baselines import (
    SMALL,
    Side,
    build_model,
    in_format,
    opened,
    transformers_model,
)
from flatgpt.benchmarks.report import Report, line, shown, spread, take_turns
from flatgpt.checkpoint.load import load_model
from flatgpt.checkpoint.save import save
from flatgpt.data.dataset import DATA, Dataset, is_prepared
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime


def bench_writing(c: dict, runtime: Runtime, report: Report, jobs: list[str]) -> None:
    """Prefill and decoding, for each number of rows, of every format and library."""
    formats = [*dict.fromkeys(c['formats'].split(','))]
    names = [('flatGPT', kind) for kind in formats]
    names += [('transformers', kind) for kind in formats if kind != 'int8']
    against = {
        f'transformers {kind}': {f'flatGPT {kind}': 1e-3 if kind == 'float32' else 0.05}
        for kind in formats
        if kind != 'int8'
    }
    if {'bfloat16', 'int8'} <= {*formats}:  # it has no int8: ours stands beside its 16 bits
        against['transformers bfloat16']['flatGPT int8'] = 0.2
    with opened(names, c, 'writing') as sides:
        for job in jobs:
            for rows in map(int, c['rows'].split(',')):
                turns = take_turns(sides, c, job, rows)
                notes = {}
                for side in sides:
                    notes[side.label] = side.trouble
                    if turns[side.label] and side.name == 'flatGPT':
                        share = share_of_limit(c, report, job, side, rows, turns[side.label])
                        notes[side.label] = ', '.join(filter(None, (share, side.trouble)))
                report.compare(f'{job} {rows} row{"s" * (rows > 1)}', turns, notes, against)
            watch(sides[0], c, job, int(c['rows'].split(',')[0]))


def share_of_limit(c: dict, report: Report, job: str, side: Side, rows: int, turns: list) -> str:
    """How near a step comes to what reading weights and cache, or multiplying, takes at least.

    A step is the whole of a prefill, whose head computes one token a row, or one token a row.
    """
    machine = report.machine
    with torch.device('meta'):
        model = build_model(c)
    head = c['vocab_size'] * c['n_embd']
    weights = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}[side.format]
    steps = 1 if job == 'prefill' else c['new_tokens'] - 1
    per_row = c['prompt_tokens'] if job == 'prefill' else 1
    held = 0 if job == 'prefill' else c['prompt_tokens'] + c['new_tokens'] / 2
    keys = c['n_embd'] // c['n_head'] * (c['n_kv_head'] or c['n_head'])
    each = 4 if machine['device'] == 'cpu' else max(weights, 2)
    cache = rows * 2 * c['n_layer'] * keys * held * each
    reading = (model.num_params() * weights + cache) / machine['read_bytes_per_second']
    kind = 'bfloat16' if side.format == 'int8' else side.format
    products = 2 * rows * ((model.num_params() - head) * per_row + head)
    multiplying = products / machine.get(f'flops_{kind}', math.inf)
    seconds = statistics.median(turn[0] for turn in turns) / steps
    what = 'reading' if reading > multiplying else 'multiplying'
    return f'{max(reading, multiplying) / seconds:.0%} of the limit by {what}'


def watch(side: Side, c: dict, job: str, *arguments) -> None:
    if c['profile'] and side.trouble is None:
        path = str(Path(c['json']).with_name(f'trace_{job}.json'))
        if found := side.turn(job, *arguments, trace=path):
            print(found[0])
            print(f'written: {path}, for https://ui.perfetto.dev')
        else:
            print(f'{side.label} could not be profiled: {side.trouble}')


def bench_quality(c: dict, runtime: Runtime, report: Report) -> None:
    """Perplexity of a run's model on its own validation split, in each format."""
    formats = [*dict.fromkeys(c['formats'].split(','))]
    found = {}
    for kind in formats:
        model, tokenizer, state = load_model(c['out_dir'], 'best', runtime.device)
        model = in_format(model, kind)
        data = Dataset(dataset_of(state, c['dataset']), model.config.block_size)
        if tokenizer not in (None, data.tokenizer) or data.vocab_size > model.config.vocab_size:
            raise UserError(f'{data.folder}: was not made with the tokenizer of {c["out_dir"]}')
        windows = data.eval_windows('val', None if not c['quick'] else 64)
        total = count = 0
        for part in np.array_split(windows, math.ceil(len(windows) / 8)):
            x, y = (torch.from_numpy(a).to(runtime.device) for a in data.eval_batch('val', part))
            with torch.inference_mode():
                loss = model(x, y)[1].item()
            total, count = total + loss * int((y >= 0).sum()), count + int((y >= 0).sum())
        found[kind] = math.exp(total / count)
        change = f' ({found[kind] / found[formats[0]] - 1:+.3%})' if len(found) > 1 else ''
        note = f'perplexity {found[kind]:.4f}{change}, {count:,} tokens of {data.folder.name}'
        line('quality', kind, '', note)
        report.add('quality', kind, note, perplexity=found[kind])


def dataset_of(state: dict, dataset: str | None) -> Path:
    """The folder of `dataset`, by default what a checkpoint's state says it was trained on."""
    name = dataset or state.get('config', {}).get('dataset')
    if not name:
        raise UserError('quality: a model of others is measured on the data that --dataset= names')
    folder = Path(name) if Path(name).is_dir() else DATA / name
    if not is_prepared(folder):
        raise UserError(f'{folder}: the data to measure on is not here; prepare it, or --dataset=')
    return folder


PEER_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
idx = torch.tensor([[1]])
written = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=1,
                         do_sample=False, pad_token_id=0)
print(chr(0x4E00 + int(written[0, -1])), flush=True)
"""


def bench_startup(c: dict, runtime: Runtime, report: Report) -> None:
    """From the command to its end, after the first token that a small model writes on the CPU."""
    c = {**c, **SMALL, 'vocab_size': 4096, 'block_size': 256, 'device': 'cpu', 'dropout': 0.0}
    letters = [chr(0x4E00 + i) for i in range(c['vocab_size'])]
    with tempfile.TemporaryDirectory() as folder:
        run, exported = Path(folder) / 'run', Path(folder) / 'transformers'
        save(run, build_model(c), [], char_tokenizer(letters), {'step': 0}, keep_evaluated=False)
        options = [f'--out_dir={run}', '--num_samples=1', '--max_new_tokens=1', '--temperature=0']
        script = ROOT / 'sample.py'
        prompt = [letters[1], '--device=cpu', '--dtype=float32']
        commands = {'flatGPT': [sys.executable, script, *prompt, *options]}
        notes = {'flatGPT': 'to the first token: sample.py'}
        try:
            model = transformers_model(c)
            sys.modules['transformers'].utils.logging.disable_progress_bar()
            model.save_pretrained(exported)
            commands['transformers'] = [sys.executable, '-c', PEER_SCRIPT, exported]
            notes['transformers'] = 'of from_pretrained and generate'
        except ImportError:
            line('startup', 'transformers', '', 'not installed')
        turns = {side: [] for side in commands}
        for _ in range(c['rounds']):
            for side, command in commands.items():
                turns[side].append(first_token(command))
    for side, results in turns.items():
        seconds, beside = [r[0] for r in results], ''
        if side != 'flatGPT':
            times = [t[0] / o[0] for o, t in zip(turns['flatGPT'], results, strict=True)]
            same = results[0][1] == turns['flatGPT'][0][1]
            beside = f', flatGPT is {shown(times, ".2f")} times as fast'
            beside = beside if same else ', no ratio to flatGPT: it wrote another token'
        line('startup', side, shown(seconds, '.2f') + ' seconds', notes[side] + beside)
        report.add('startup', side, notes[side] + beside, seconds=spread(seconds))


def first_token(command: list) -> tuple[float, str]:
    begin = time.perf_counter()
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding='utf-8')
    if result.returncode:
        raise UserError(f'startup: {(result.stderr.strip().splitlines() or ["no output"])[-1]}')
    return time.perf_counter() - begin, result.stdout.strip()[-1:]
