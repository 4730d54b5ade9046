"""
bench.py's training benchmarks: a step's speed, the cost of checkpoints and of a second process.

$ python bench.py --only=training     # compared with transformers, and nanoGPT by --nanogpt=PATH
$ python bench.py --only=rl           # a step of reinforcement learning, compared with TRL
$ python bench.py --only=saving       # how long saving a checkpoint takes and pauses training
$ python bench.py --only=processes    # two processes of one run, compared with two separate runs
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
from flatgpt.benchmarks import rl
from flatgpt.benchmarks.baselines import OPTIMIZER, build_meta_model, build_random_model
from flatgpt.benchmarks.implementations import (
    Implementation,
    Measurement,
    measure_interleaved,
    print_profile,
    start_implementations,
)
from flatgpt.benchmarks.report import Report, format_spread, print_row, summarize
from flatgpt.checkpoint.save import Saver
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime
from flatgpt.training.optim import build_optimizers

PROCESS_ROUNDS = 3  # at most: some six minutes with GPT-2 124M on two cores
PROCESS_STEPS = 10  # of a run in a round
WARM_UP_STEPS = 2  # of them, not measured: the first is slow
PROCESS_RUN = {  # flags of train.py: steps without evaluation, samples or checkpoints
    'max_iters': PROCESS_STEPS,
    'log_interval': 1,
    'eval_interval': 'None',
    'eval_iters': 1,
    'eval_train': 'False',
    'sample_tokens': 0,
    'gradient_accumulation_steps': 8,
    'device': 'cpu',
}


# -----------------------------------------------------------------------------
# a step


def bench_training(settings: dict, runtime: Runtime, report: Report) -> None:
    """Tokens/s of training steps of flatGPT, transformers and nanoGPT."""
    names = [('flatGPT', ''), ('transformers', '')]
    if settings['nanogpt']:
        names.append(('nanoGPT', ''))
    with start_implementations(names, settings, 'training') as implementations:
        measurements = measure_interleaved(implementations, settings, 'training')
        notes = {}
        for each in implementations:
            own = measurements[each.label]
            details = own and describe_step(each, own, settings, runtime, report)
            notes[each.label] = ', '.join(filter(None, [details, each.failure]))
        name = f'training {settings["batch_size"]}x{settings["block_size"]}'
        tolerances = {each.label: {'flatGPT': 0.01} for each in implementations[1:]}
        report.compare(name, measurements, notes, tolerances)
        print_profile(implementations[0], settings, 'training')


def describe_step(
    implementation: Implementation,
    measurements: list[Measurement],
    settings: dict,
    runtime: Runtime,
    report: Report,
) -> str:
    """The step of the median measurement: its milliseconds, MFU, memory and number format."""
    measurement = sorted(measurements, key=lambda measurement: measurement.seconds)[
        len(measurements) // 2
    ]
    flops_per_token = build_meta_model(settings).flops_per_token()
    peak = runtime.peak_flops() or report.machine.get(f'flops_{runtime.dtype_name}')
    mfu = measurement.tokens_per_second * flops_per_token / peak
    parts = [f'{measurement.seconds / settings["steps"] * 1e3:,.0f} ms a step', f'MFU {mfu:.0%}']
    if measurement.memory:
        parts.append(f'{measurement.memory / 2**30:.1f} GiB')
    float32 = implementation.name == 'nanoGPT' and runtime.device_type == 'cpu'  # without autocast
    parts.append('float32' if float32 else runtime.dtype_name)
    if implementation.name != 'transformers' and runtime.wants_compile(settings['compile']):
        parts.append('compiled')
    return ', '.join(parts)


def bench_rl(settings: dict, runtime: Runtime, report: Report) -> None:
    """Tokens/s of whole steps of reinforcement learning: completions, rewards, an update."""
    names = [('flatGPT', ''), ('TRL', '')]
    with start_implementations(names, settings, 'rl') as implementations:
        measurements = measure_interleaved(implementations, settings, 'step')
        notes = {each.label: each.failure or runtime.dtype_name for each in implementations}
        if own := measurements['flatGPT']:
            share = [measurement.work['rollouts'] for measurement in own]
            notes['flatGPT'] += f', {format_spread(share, ".0%")} of the time in rollouts'
        name = f'rl {rl.PROMPTS}x{rl.SAMPLES}x{settings["new_tokens"]}'
        report.compare(name, measurements, notes, {'TRL': {'flatGPT': 0.0}})
        ours = implementations[:1]
        for deterministic in (True, False):
            found = measure_interleaved(ours, settings, 'completions', deterministic)
            variant = 'deterministic' if deterministic else 'any order'
            report.compare('rollouts alone', {variant: found['flatGPT']}, {}, {})


# -----------------------------------------------------------------------------
# a checkpoint


def bench_saving(settings: dict, runtime: Runtime, report: Report) -> None:
    """Save checkpoints of a model and its AdamW: the pause, the total time and the bytes."""
    model, optimizers = trained_model(settings, runtime)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory(dir='.') as folder:  # on this disk, not in memory
        times = time_saving(Path(folder), model, optimizers, runtime, settings['rounds'])
        last = Path(folder) / 'checkpoints' / f'step-{settings["rounds"]:08d}'
        size = sum(file.stat().st_size for file in last.rglob('*') if file.is_file())
    pauses = [each['save_pause'] for each in times]
    seconds = [each['save_seconds'] for each in times]
    shares = [pause / whole for pause, whole in zip(pauses, seconds, strict=True)]
    waits = f'pause {format_spread(pauses, ".2f")} s, {format_spread(shares, ".1%")}'
    note = f'{waits}; {size / parameters:.2f} bytes each'
    variant = f'{parameters / 1e6:,.1f}M parameters'
    print_row('saving', variant, f'{format_spread(seconds, ".1f")} s', note)
    figures = {'pause_seconds': pauses, 'seconds': seconds, 'share': shares}
    figures = {name: summarize(values) for name, values in figures.items()}
    report.add('saving', 'flatGPT', note, bytes=size, parameters=parameters, **figures)


def trained_model(settings: dict, runtime: Runtime) -> tuple:
    """A model and its AdamW after one update, so that there is optimizer state to save."""
    model = build_random_model(settings).to(runtime.device)
    optimizers = build_optimizers('adamw', model, **OPTIMIZER)
    x = torch.zeros(1, settings['block_size'], dtype=torch.long, device=runtime.device)
    model(x, x)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


def time_saving(folder: Path, model, optimizers, runtime: Runtime, rounds: int) -> list[dict]:
    """The Saver's times for each checkpoint, after a warm-up."""
    saver, times = Saver(folder, runtime), []
    for step in range(rounds + 1):
        saver.save(model, optimizers, None, {'step': step, 'evaluated': False})
        saver.wait()
        times.append(saver.times())
    saver.finish()
    return times[1:]


# -----------------------------------------------------------------------------
# a second process


def bench_processes(settings: dict, runtime: Runtime, report: Report) -> None:
    """Tokens/s of two processes of one thread each: of one run, and of two separate runs."""
    shape = ('arch', 'block_size', 'n_layer', 'n_head', 'n_embd', 'batch_size')
    flags = PROCESS_RUN | {name: settings[name] for name in shape} | {'dtype': runtime.dtype_name}
    flags_alone = {'gradient_accumulation_steps': flags['gradient_accumulation_steps'] // 2}
    speeds = {'together': [], 'two alone': []}
    with tempfile.TemporaryDirectory() as folder:
        flags['dataset'] = make_dataset(Path(folder) / 'text')
        for number in range(min(PROCESS_ROUNDS, settings['rounds'])):
            out_dirs = [Path(folder) / f'{name}-{number}' for name in ('both', 'a', 'b')]
            both, *alone = out_dirs
            wait_for([start_training(2, flags | {'out_dir': both})])
            speeds['together'].append(tokens_per_second(both))
            wait_for([start_training(1, flags | flags_alone | {'out_dir': out}) for out in alone])
            speeds['two alone'].append(sum(map(tokens_per_second, alone)))
    ratios = [together / alone for together, alone in zip(*speeds.values(), strict=True)]
    for variant, values in speeds.items():
        note = f'{format_spread(ratios, ".0%")} of the other' if variant == 'together' else ''
        print_row('2 processes', variant, format_spread(values, ',.0f'), note)
        report.add('processes', variant, note, tokens_per_second=summarize(values))


def make_dataset(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    text = Path(subprocess.__file__).read_text(encoding='utf-8') * 4
    with Writer(folder, tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, tokenizer.encode(text))
    return folder


def start_training(processes: int, flags: dict) -> subprocess.Popen:
    """Start train.py, with one thread per process."""
    script = [str(ROOT / 'train.py')]
    if processes > 1:
        launch = ['--standalone', f'--nproc_per_node={processes}']
        script = ['-m', 'torch.distributed.run', *launch, *script]
    command = [sys.executable, *script, *(f'--{name}={value}' for name, value in flags.items())]
    pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **pipes)


def wait_for(started: list[subprocess.Popen]) -> None:
    errors = [process.communicate()[1] for process in started]
    for process, error in zip(started, errors, strict=True):
        if process.returncode:
            raise UserError(f'processes: {error_line_of(error)}')


def error_line_of(output: str) -> str:
    """The first error line that train.py printed; RuntimeError with its output if there is none."""
    for line in output.splitlines():
        if line.startswith('error'):
            return line
    raise RuntimeError(output)


def tokens_per_second(out_dir: Path) -> float:
    """The median of a run's steps after its warm-up."""
    lines = map(json.loads, (out_dir / 'metrics.jsonl').read_text().splitlines())
    speeds = [line['tokens_per_s'] for line in lines if 'tokens_per_s' in line]
    return statistics.median(speeds[WARM_UP_STEPS:])
