"""Rewards: built-in ones, and functions in a file."""

import pytest
from conftest import refused
from error_lines import error_line

from flatgpt.errors import UserError
from flatgpt.training.reward import load_reward


def one(name, completion, **row):
    return load_reward(name)(['?'], [completion], [row])[0]


@pytest.fixture
def file(tmp_path):
    """Write a reward file -> its path."""

    def write(code):
        path = tmp_path / 'rewards.py'
        path.write_text(code)
        return str(path)

    return write


def test_built_in_rewards():
    assert one('exact', ' 42\n', answer=42) == 1
    assert one('exact', '421', answer='42') == 0
    assert one('regex', 'ab12', pattern=r'[a-z]+\d+') == 1
    assert one('regex', 'ab12!', pattern=r'[a-z]+\d+') == 0
    assert one('length', 'four', length=4) == 1
    assert one('length', 'fo', length=4) == 0.5


def test_a_function_of_one_completion_and_one_of_a_batch_give_the_same(file):
    path = file(
        'def reward(prompt, completion, row):\n    return len(prompt + completion) + row["n"]\n'
        'def many(prompts, completions, rows):\n'
        '    return [reward(*each) for each in zip(prompts, completions, rows)]\n'
    )
    batch = ['a', 'bb'], ['c', 'dd'], [{'n': 1}, {'n': 2}]
    assert load_reward(path)(*batch) == load_reward(f'{path}:many')(*batch) == [3.0, 6.0]


@error_line(
    'cannot be opened: {}; correct the path',
    'has no function',
    'takes (',
    'the directory of a reward model, or FILE.py',
    'reward={}: {}: {}; correct it',
)
def test_a_reward_that_cannot_be_loaded_is_one_line(file, tmp_path):
    good = file('def reward(prompt, completion, row): return 1')
    assert load_reward(good)
    for name in ('exct', f'{tmp_path}/none.py', f'{good}:rewrd'):
        with pytest.raises(UserError, match='reward='):
            load_reward(name)
    for code in (
        'def reward(text): return 1', 'def reward(:', '1 / 0', 'import sys; sys.exit()',
        'reward = max',
    ):  # fmt: skip
        assert 'reward=' in refused(load_reward, file(code))


def test_a_reward_file_is_a_module(file, tmp_path):
    """Its dataclasses work, it imports what is beside it, and any folder will do."""
    folder = tmp_path / '.pyenv'
    folder.mkdir()
    (folder / 'counting_letters.py').write_text('def count(text): return len(text)')
    path = folder / 'json.py'  # the name of a module
    path.write_text(
        'from __future__ import annotations\n'
        'from dataclasses import dataclass\n'
        'from counting_letters import count\n'
        '@dataclass\nclass Weight:\n    value: float = 0.5\n'
        'def reward(prompt, completion, row):\n    return count(completion) * Weight().value\n'
    )
    assert load_reward(str(path))(['?'], ['four'], [{}]) == [2.0]
    assert load_reward(f'{path}:reward')(['?'], ['four'], [{}]) == [2.0]


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        ('None', '0.5'),
        ('float("nan")', '0'),
        ('row["x"]', 'row.get("x", 0)'),
        ('1e39', '1e18'),
        ('10**400', '10'),
        ('__import__("numpy").ones(2)', '__import__("numpy").ones(1)'),
        ('__import__("torch").ones(2)', '__import__("torch").ones(1)'),
        ('__import__("sys").exit()', '1'),
        ('int("two\\nlines")', 'int("2")'),
    ],
)
@error_line('it must return a finite number')
def test_a_reward_that_is_no_number_is_one_line_with_the_prompt(file, bad, good):
    code = 'def reward(prompt, completion, row): return {}'
    reward = load_reward(file(code.format(bad)))
    line = refused(reward, ['two and two'], ['5'], [{}])
    assert "prompt 'two and two'" in line
    assert load_reward(file(code.format(good)))(['2'], ['5'], [{}])


def test_a_batch_reward_returns_a_value_for_each(file):
    reward = load_reward(file('def reward(prompts, completions, rows): return [1]'))
    with pytest.raises(UserError, match='1 values for 2'):
        reward(['a', 'b'], ['c', 'd'], [{}, {}])
