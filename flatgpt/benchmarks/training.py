"""Training steps, for bench.py: ours beside transformers and nanoGPT."""

import torch

from flatgpt.benchmarks.baselines import build_model, opened
from flatgpt.benchmarks.decoding import watch
from flatgpt.benchmarks.report import Report, take_turns
from flatgpt.runtime import Runtime


def bench_training(c: dict, runtime: Runtime, report: Report) -> None:
    names = [('flatGPT', ''), ('transformers', '')]
    if c['nanogpt']:
        names.append(('nanoGPT', ''))
    with opened(names, c, 'training') as sides:
        turns = take_turns(sides, c, 'training')
        with torch.device('meta'):
            flops = build_model(c).flops_per_token()
        measured = report.machine.get(f'flops_{runtime.dtype_name}')
        peak = runtime.peak_flops() or measured
        notes, on_cpu = {}, runtime.device_type == 'cpu'
        compiled = runtime.wants_compile(c['compile'])
        for side in sides:
            notes[side.label] = side.trouble
            if turns[side.label]:
                ordered = sorted(turns[side.label], key=lambda turn: turn[0])
                seconds, work, memory = ordered[len(ordered) // 2]
                mfu = work['tokens'] / seconds * flops / peak
                kept = f', {memory / 2**30:.1f} GiB' if memory else ''
                each = f'{seconds / c["steps"] * 1e3:,.0f} ms a step'
                how = 'float32' if side.name == 'nanoGPT' and on_cpu else runtime.dtype_name
                how += ', compiled' if compiled and side.name != 'transformers' else ''
                found = f'{each}, MFU {mfu:.0%}{kept}, {how}'
                notes[side.label] = ', '.join(filter(None, (found, side.trouble)))
        job = f'training {c["batch_size"]}x{c["block_size"]}'
        against = {side.label: {'flatGPT': 0.01} for side in sides[1:]}
        report.compare(job, turns, notes, against)
        watch(sides[0], c, 'training')
