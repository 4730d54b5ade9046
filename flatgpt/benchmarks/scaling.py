"""
What a training run pays for company and for safety; for bench.py.

$ python bench.py --only=saving       # how long a step waits for a checkpoint, of how long it takes
$ python bench.py --only=processes    # two processes together, beside two that know nothing of it
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from flatgpt import ROOT
from flatgpt.benchmarks.baselines import build_model
from flatgpt.benchmarks.report import Report, line, shown, spread
from flatgpt.checkpoint.save import Saver
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.runtime import Runtime
from flatgpt.training.optim import build_optimizers

SETTINGS = {'max_iters': 40, 'eval_interval': 'None', 'eval_iters': 1, 'eval_train': 'False'}
SETTINGS |= {'sample_tokens': 0, 'gradient_accumulation_steps': 8, 'device': 'cpu'}
RATES = {'betas': (0.9, 0.95), 'muon_lr': 0.02, 'muon_momentum': 0.95, 'weight_decay': 0.1}


def bench_saving(c: dict, runtime: Runtime, report: Report) -> None:
    """Checkpoints of a model and its AdamW: the pause, the whole, and the bytes."""
    model = build_model(c).to(runtime.device)
    optimizers = build_optimizers('adamw', model, learning_rate=1e-4, **RATES)
    x = torch.zeros(1, c['block_size'], dtype=torch.long, device=runtime.device)
    model(x, x)[1].backward()
    for each in optimizers:
        each.step()
    count, times = sum(p.numel() for p in model.parameters()), []
    with tempfile.TemporaryDirectory(dir='.') as folder:  # on this disk, not in memory
        saver = Saver(folder, runtime)
        for step in range(c['rounds'] + 1):
            saver.save(model, optimizers, None, {'step': step, 'evaluated': False})
            saver.wait()
            times.append(saver.times())
        saver.finish()
        last = Path(folder) / 'checkpoints' / f'step-{c["rounds"]:08d}'
        size = sum(file.stat().st_size for file in last.rglob('*') if file.is_file())
    pauses, whole = ([t[f'save_{k}'] for t in times[1:]] for k in ('pause', 'seconds'))
    share = [pause / seconds for pause, seconds in zip(pauses, whole, strict=True)]
    note = f'pause {shown(pauses, ".2f")} s, {shown(share, ".1%")}; {size / count:.2f} bytes each'
    line('saving', f'{count / 1e6:,.1f}M parameters', f'{shown(whole, ".1f")} s', note)
    figures = {'pause_seconds': spread(pauses), 'seconds': spread(whole), 'share': spread(share)}
    report.add('saving', 'flatGPT', note, bytes=size, parameters=count, **figures)


def bench_processes(c: dict, runtime: Runtime, report: Report) -> None:
    """Tokens/s of two processes of a thread each, on one model and on one each."""
    shape = ('arch', 'block_size', 'n_layer', 'n_head', 'n_embd', 'batch_size')
    flags = SETTINGS | {name: c[name] for name in shape} | {'dtype': runtime.dtype_name}
    speeds = {'together': [], 'two alone': []}
    with tempfile.TemporaryDirectory() as folder:
        flags['dataset'] = make_text(Path(folder) / 'text')
        for number in range(c['rounds']):
            run = Path(folder) / str(number)
            train(2, flags | {'out_dir': run / 'both'})
            speeds['together'].append(speed(run / 'both'))
            alone = flags | {'gradient_accumulation_steps': 4}
            ends = [start(1, alone | {'out_dir': run / name}) for name in 'ab']
            finish(ends)
            speeds['two alone'].append(sum(speed(run / name) for name in 'ab'))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    for side, values in speeds.items():
        note = f'{shown(ratios, ".0%")} of the other' if side == 'together' else ''
        line('2 processes', side, shown(values, ',.0f'), note)
        report.add('processes', side, note, tokens_per_second=spread(values))


def make_text(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    text = Path(subprocess.__file__).read_text(encoding='utf-8') * 4
    with Writer(folder, tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, tokenizer.encode(text))
    return folder


def start(processes: int, flags: dict) -> subprocess.Popen:
    script = [str(ROOT / 'train.py')]
    if processes > 1:
        many = ['--standalone', f'--nproc_per_node={processes}']
        script = ['-m', 'torch.distributed.run', *many, *script]
    command = [sys.executable, *script, *(f'--{name}={value}' for name, value in flags.items())]
    pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **pipes)


def finish(started: list[subprocess.Popen]) -> None:
    errors = [process.communicate()[1] for process in started]
    failed = [error for process, error in zip(started, errors, strict=True) if process.returncode]
    if failed:
        raise RuntimeError(failed[0])


def train(processes: int, flags: dict) -> None:
    finish([start(processes, flags)])


def speed(out_dir: Path) -> float:
    """Tokens/s of the steps of a run after its first ten, at the median."""
    lines = map(json.loads, (out_dir / 'metrics.jsonl').read_text().splitlines())
    return statistics.median([x['tokens_per_s'] for x in lines if 'tokens_per_s' in x][10:])
