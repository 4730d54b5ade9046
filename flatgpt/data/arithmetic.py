"""
Sums of numbers of up to four digits, such as 347+58=405, made up without a download.

    prepare(argv, description, folder, solved=True)

Solved sums are conversations for fine-tuning; the others are prompts for reinforcement learning
with --reward=exact. No sum is in both, and both hold out the same ones.
"""

import json
import random
import tempfile
from pathlib import Path

from flatgpt.data import chat, prompts
from flatgpt.errors import ArgumentParser

SOLVED, PROMPTS, HELD_OUT, DIGITS = 3_600, 20_000, 512, 4
TEMPLATE = {'user': ['', '='], 'assistant': ['', '<|endoftext|>']}  # 347+58=405


def prepare(argv: list[str] | None, description: str, folder: Path, solved: bool) -> None:
    """The main function of a script that prepares the solved sums, or the prompts."""
    parser = ArgumentParser(description=description)
    parser.add_argument('--out_dir', type=Path, default=folder, help='default: %(default)s')
    out_dir = parser.parse_args(argv).out_dir
    sums = different_sums(HELD_OUT + SOLVED + PROMPTS)
    held_out, others = sums[:HELD_OUT], sums[HELD_OUT:]
    others = others[:SOLVED] if solved else others[SOLVED:]
    module = chat if solved else prompts
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ('train.jsonl', 'val.jsonl', 'template.json')]
        for path, part in zip(files, (others, held_out), strict=False):
            path.write_text(''.join(json.dumps(record(*each, solved)) + '\n' for each in part))
        files[2].write_text(json.dumps(TEMPLATE))
        train, val, template = map(str, files)
        argv = [train, f'--val={val}', '--tokenizer=byte', f'--template={template}']
        argv += ['--block_size=128'] if solved else []
        module.prepare(module.arguments([*argv, f'--out_dir={out_dir}']), out_dir)


def different_sums(count: int) -> list[tuple[int, int]]:
    """Distinct pairs of numbers below 10**k, with k drawn from 1 to DIGITS for each number."""
    chosen, found = random.Random(0), {}
    while len(found) < count:
        numbers = (chosen.randrange(10 ** chosen.randint(1, DIGITS)) for _ in range(2))
        found[tuple(numbers)] = None
    return list(found)


def record(a: int, b: int, solved: bool) -> dict:
    return {'prompt': f'{a}+{b}', 'completion' if solved else 'answer': str(a + b)}
