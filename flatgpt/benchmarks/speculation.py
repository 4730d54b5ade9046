"""
bench.py's benchmark of guesses: texts that repeat themselves, and texts that do not.

$ python bench.py --only=speculation --block_size=1024 --prompt_tokens=300 --new_tokens=300

The weights are random, so the text is prescribed: after each forward pass, the logit of its next
token is raised. The work is that of a model that writes this text.
"""

import json
import random
import re
import statistics

import numpy as np

from flatgpt import ROOT
from flatgpt.benchmarks.decoding import formats_of
from flatgpt.benchmarks.implementations import Implementation, start_implementations
from flatgpt.benchmarks.report import Report
from flatgpt.errors import counted
from flatgpt.inference.speculation import NGRAM
from flatgpt.runtime import Runtime

PIECES = re.compile(r' ?\w+| ?[^\w\s]+|\s+')  # about the tokens of GPT-2
EDITED = 25  # every so many pieces of the passage, one is replaced


def bench_speculation(settings: dict, runtime: Runtime, report: Report) -> None:
    """Each text with and without guesses, in each format, for each number of rows."""
    formats = formats_of(settings)
    row_counts = [int(count) for count in settings['rows'].split(',')]
    names = [('flatGPT', kind) for kind in formats]
    with start_implementations(names, settings, 'generation') as implementations:
        for name, ids in texts(settings).items():
            for rows in row_counts:
                for each in implementations:
                    bench_text(settings, report, each, name, ids, rows)


def bench_text(
    settings: dict,
    report: Report,
    implementation: Implementation,
    name: str,
    ids: list[int],
    rows: int,
) -> None:
    kind = implementation.format
    variants = {f'{kind} {draft or "without"}': draft for draft in (None, NGRAM)}
    measurements = {variant: [] for variant in variants}
    for number in range(settings['rounds'] + 1):
        for variant, draft in variants.items():
            measurement = implementation.measure('follow', ids, rows, draft)
            if number and measurement:
                measurements[variant].append(measurement)
    notes = dict.fromkeys(variants, implementation.failure or '')
    for variant, own in measurements.items():
        if own:
            passes = statistics.median(each.work['passes'] for each in own)
            notes[variant] = f'{own[0].work["tokens"] / passes:.2f} tokens per pass'
    without, guessed = variants
    report.compare(f'{name} {counted(rows, "row")}', measurements, notes, {without: {guessed: 0.0}})


def texts(settings: dict) -> dict[str, list[int]]:
    """Prompts of prompt_tokens, each with its completion of new_tokens, as token ids."""
    prompt, new, draw = settings['prompt_tokens'], settings['new_tokens'], random.Random(0)
    prose = PIECES.findall((ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8'))
    prose *= 1 + (prompt + new) // len(prose)
    edited = [f' edit{i}' if i % EDITED == EDITED - 1 else p for i, p in enumerate(prose[:prompt])]
    edited *= 1 + new // prompt
    records = [
        json.dumps({'id': i, 'name': draw.choice(prose), 'size': draw.randrange(1000), 'ok': True})
        for i in range(prompt + new)
    ]
    return {
        'edit': ids_of(prose[:prompt] + edited[:new], settings['vocab_size']),
        'JSON': ids_of(PIECES.findall('\n'.join(records))[: prompt + new], settings['vocab_size']),
        'prose': ids_of(prose[: prompt + new], settings['vocab_size']),
        'random': np.random.default_rng(0)
        .integers(settings['vocab_size'], size=prompt + new)
        .tolist(),
    }


def ids_of(pieces: list[str], vocab_size: int) -> list[int]:
    """The id of a piece is the number of different ones before it."""
    ids: dict[str, int] = {}
    return [ids.setdefault(piece, len(ids)) % vocab_size for piece in pieces]
