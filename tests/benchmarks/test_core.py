"""CORE: what of each example is scored, the figures made of it, and commands that were killed."""

import json
import math
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from benches import refused, settings
from conftest import random_model, saved
from error_lines import case, error_line

import bench
from flatgpt.benchmarks import core
from flatgpt.benchmarks.core import CoreTask, pairs_of, render
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer

CHOICE = {'query': 'The cat', 'choices': ['sat', 'sang', 'sat down'], 'gold': 0}
SCHEMA = {'context_options': ['A cat', 'The dogs'], 'continuation': 'ran', 'gold': 1}
WORD = {'context': ' one two ', 'continuation': 'three'}
EXAMPLES = {'multiple_choice': CHOICE, 'schema': SCHEMA, 'language_modeling': WORD}
WORDS = 'the cat sat on a mat and saw that dog ran to his den as rain fell at noon'.split()


def make_bundle(folder, examples=12, shots=2):
    """A bundle with a task of each kind."""
    draw = random.Random(0)

    def say(count):
        return ' '.join(draw.choice(WORDS) for _ in range(count))

    def example(kind):
        if kind == 'multiple_choice':
            return {'query': say(4), 'choices': [say(1), say(2)], 'gold': draw.randrange(2)}
        if kind == 'schema':
            return SCHEMA | {'context_options': [say(3), say(4)], 'continuation': say(2)}
        return {'context': f'{say(5)}\u2028', 'continuation': say(1)[0]}

    (folder / 'eval_data').mkdir(parents=True)
    tasks, rows = ['icl_tasks:'], ['Eval Task,Random baseline']
    for kind in EXAMPLES:
        lines = [json.dumps(example(kind), ensure_ascii=False) for _ in range(examples)]
        (folder / f'eval_data/{kind}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
        fields = f'icl_task_type: {kind}, dataset_uri: {kind}.jsonl, num_fewshot: [{shots}]'
        tasks.append(f'- {{label: my_{kind}, {fields}}}')
        rows.append(f'my_{kind},{0 if kind == "language_modeling" else 50}')
    (folder / 'core.yaml').write_text('\n'.join(tasks))
    (folder / 'eval_meta_data.csv').write_text('\n'.join(rows))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a run and a bundle -> the flags that score it."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / 'run', byte_tokenizer(), block_size=128)
    make_bundle(tmp_path / 'bundle')
    return ['--task=core', '--out_dir=run', '--core_data=bundle']


def run(*flags):
    """Score -> {task: its metrics} of bench.json."""
    bench.main(settings(*flags))
    results = json.loads(Path('bench.json').read_text())['results']
    return {
        entry['task']: {name: metric['value'] for name, metric in entry['metrics'].items()}
        for entry in results
        if 'metrics' in entry
    }


def task_of(kind, delimiter=' '):
    return CoreTask('mine', kind, 'mine.jsonl', 1, delimiter, 0.5)


# -----------------------------------------------------------------------------
# an example


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        (
            'multiple_choice',
            ['The cat sat\n\nThe cat sat', 'The cat sat\n\nThe cat sang']
            + ['The cat sat\n\nThe cat sat down'],
        ),
        ('schema', ['The dogs ran\n\nA cat ran', 'The dogs ran\n\nThe dogs ran']),
        ('language_modeling', ['one two three\n\none two', 'one two three\n\none two three']),
    ],
)
def test_a_prompt_has_solved_examples_then_the_question(kind, expected):
    assert render(task_of(kind), EXAMPLES[kind], [EXAMPLES[kind]]) == expected


@pytest.mark.parametrize(
    ('kind', 'answers'),
    [
        ('multiple_choice', ['t', 'ng', 't down']),  # after what the choices share
        ('schema', [' ran', ' ran']),
        ('language_modeling', [' three']),
    ],
)
def test_what_is_scored_is_where_the_prompts_differ(kind, answers):
    tokenizer = byte_tokenizer()
    texts = render(task_of(kind), EXAMPLES[kind], [])
    rows = [[tokenizer.eot, *tokenizer.encode(text).tolist()] for text in texts]
    pairs = pairs_of(task_of(kind), rows, 100)
    assert [tokenizer.decode(answer) for _, answer in pairs] == answers
    cut = pairs_of(task_of(kind), rows, 6)
    assert all(context and len(context + answer) <= 6 for context, answer in cut)


@torch.no_grad()
def test_the_choice_with_the_lowest_mean_loss_is_taken(here):
    tokenizer, model = byte_tokenizer(), random_model(257, 128)
    bundle = core.Bundle('bundle')
    for task in bundle.tasks[:2]:
        examples = bundle.examples(task, None)
        right = core.score_group(model, tokenizer, task, examples, 0)['right']
        for number, example in enumerate(examples):
            texts = render(task, example, core.few_shot_examples(examples, number, task.shots))
            rows = [[tokenizer.eot, *tokenizer.encode(text).tolist()] for text in texts]
            losses = []
            for context, answer in pairs_of(task, rows, 128):
                logits = model(torch.tensor([context + answer]))[0][0, len(context) - 1 : -1]
                target = torch.tensor(answer, dtype=torch.long)
                losses.append(torch.nn.functional.cross_entropy(logits, target).item())
            assert right[number] == (losses.index(min(losses)) == example['gold'])


def test_a_choice_without_an_id_of_its_own_is_not_the_likeliest_by_that():
    task = task_of('multiple_choice')
    pairs = [([1], [2]), ([1], [])]
    assert core.is_right(task, {'gold': 0}, pairs, [(-9.0, False), (0.0, True)])


def test_a_word_is_right_if_each_of_its_tokens_is_the_likeliest():
    task = task_of('language_modeling')
    assert core.is_right(task, WORD, [([1], [2])], [(-1.0, True)])
    assert not core.is_right(task, WORD, [([1], [2])], [(-1.0, False)])


# -----------------------------------------------------------------------------
# all of them


def test_core_is_the_mean_of_the_centered_accuracies(here, capsys):
    found = run(*here)
    score = found.pop('core')['core']
    for kind, metrics in found.items():
        guess = 0 if 'language' in kind else 0.5
        assert metrics['centered'] == pytest.approx((metrics['acc'] - guess) / (1 - guess))
    assert score == pytest.approx(math.fsum(m['centered'] for m in found.values()) / 3)
    assert f'CORE {score:.4f}; GPT-2' in capsys.readouterr().out


def test_the_zip_file_gives_the_scores_of_the_folder(here):
    folder = run(*here)
    with zipfile.ZipFile('bundle.zip', 'w') as archive:
        for path in Path('bundle').rglob('*.*'):
            archive.write(path, Path('eval_bundle') / path.relative_to('bundle'))
    assert run(*here[:2], '--core_data=bundle.zip') == folder


def test_a_killed_command_scores_only_what_is_missing(here, monkeypatch):
    expected = run(*here)
    file = Path('bench.core.jsonl')
    lines = file.read_text().splitlines()
    file.write_text('\n'.join(lines[:2]) + '\n' + lines[2][:20])
    groups, score_group = [], core.score_group
    count = lambda *args: groups.append(args) or score_group(*args)  # noqa: E731
    monkeypatch.setattr(core, 'score_group', count)
    assert run(*here) == expected
    assert len(groups) == 2  # of three tasks
    groups.clear()
    assert run(*here) == expected
    assert not groups
    saved(Path('other'), byte_tokenizer(), block_size=64)
    run(here[0], '--out_dir=other', here[2])
    assert len(groups) == 3


def test_a_task_without_its_data_is_marked_as_not_run_and_there_is_no_core(here, capsys):
    Path('bundle/eval_data/schema.jsonl').unlink()
    assert 'core' not in run(*here)
    printed = capsys.readouterr().out
    assert 'not run: schema.jsonl is missing' in printed
    assert 'CORE: 1 task not run' in printed


def test_the_groups_do_not_change_the_scores(here, monkeypatch):
    expected = run(*here)
    monkeypatch.setattr(core, 'GROUP', 5)
    Path('bench.core.jsonl').unlink()
    assert run(*here) == expected


# -----------------------------------------------------------------------------
# mistakes


@error_line('not an evaluation bundle')
@pytest.mark.parametrize(
    'damage', ['missing', 'empty', case('core.yaml has an unknown icl_task_type', 'kind')]
)
def test_a_bundle_that_is_none_is_replaced(here, damage):
    if damage == 'missing':
        shutil.rmtree('bundle')
    else:
        text = Path('bundle/core.yaml').read_text().replace('schema', 'riddle')
        Path('bundle/core.yaml').write_text(text if damage == 'kind' else '{')
    assert core.URL in refused(*here)
    shutil.rmtree('bundle', ignore_errors=True)
    make_bundle(Path('bundle'))
    assert 'core' in run(*here)


@error_line('is damaged ({}); get')
def test_damaged_data_is_got_again(here):
    path = Path('bundle/eval_data/schema.jsonl')
    text = path.read_text()
    path.write_text(text[:-20])
    assert 'schema.jsonl' in refused(*here)
    path.write_text(text)
    assert 'core' in run(*here)


@error_line('solved examples before each')
def test_the_limit_of_the_line_is_enough(here):
    assert refused(*here, '--limit=2').count('--limit=3 or more')
    assert 'core' in run(*here, '--limit=3')


@error_line('each prompt begins with the end-of-text token')
def test_a_tokenizer_needs_an_end_of_text_token(here):
    saved(Path('characters'), char_tokenizer(sorted({*''.join(WORDS), ' ', '\n'})))
    refused(here[0], '--out_dir=characters', here[2])
    assert 'core' in run(*here)


def test_the_bundle_is_downloaded_once(here, monkeypatch, tmp_path):
    with zipfile.ZipFile('made.zip', 'w') as archive:
        for path in Path('bundle').rglob('*.*'):
            archive.write(path, Path('eval_bundle') / path.relative_to('bundle'))
    asked = []

    def download(url, part):
        asked.append(url)
        shutil.copy('made.zip', part)

    monkeypatch.setattr(core, 'download', download)
    monkeypatch.setattr(core, 'DATA', tmp_path / 'data')
    assert run(*here[:2]) == run(*here[:2]) == run(*here)
    assert asked == [core.URL]


@pytest.mark.parametrize(
    ('bad', 'good'), [case('is only for {}; omit it', '--task=cbt', '--task=core')]
)
def test_the_data_of_core_is_for_core_alone(here, bad, good):
    assert '--task=core; omit it' in refused(bad, *here[1:])
    assert 'core' in run(good, *here[1:])
