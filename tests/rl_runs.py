"""Prompts, a model, a reward and the flags of a run of reinforcement learning, for several tests;
`pytest_plugins = ['rl_runs']` has the fixtures."""

import json

import pytest
from conftest import saved

from flatgpt.data import prompts
from flatgpt.data.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    """A dataset of prompts."""
    folder = tmp_path_factory.mktemp('rl')
    records = [{'prompt': 'say ' + 'abc' * n, 'length': n} for n in range(1, 5)] * 5
    path = folder / 'records.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    prompts.main([str(path), '--plain', '--tokenizer=byte', f'--out_dir={folder / "asked"}'])
    return folder / 'asked'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('base') / 'run', BYTES, block_size=32)


@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    """A reward file: the share of lowercase letters in a completion."""
    path = tmp_path_factory.mktemp('rewards') / 'rewards.py'
    path.write_text(
        'def reward(prompt, completion, row):\n'
        '    return sum(c in "abcdefghijklm" for c in completion) / 6\n'
        'def none(prompt, completion, row):\n    pass\n'
    )
    return path


def tuning(base, asked, letters):
    return (
        f'--init_from={base}', f'--dataset={asked}', '--objective=rl', f'--reward={letters}',
        '--rl_samples=4', '--rl_tokens=6', '--batch_size=4', '--gradient_accumulation_steps=2',
        '--eval_iters=None', '--eval_interval=4', '--max_iters=8', '--learning_rate=3e-3',
        '--lr_schedule=constant', '--lr_decay_iters=None', '--block_size=32',
    )  # fmt: skip
