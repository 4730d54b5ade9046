"""bench.py --report: one file with the curves, settings, figures and samples of runs."""

import json
import re
from pathlib import Path

import pytest
from benches import refused, settings
from browser import needs_chromium, set_screen, severe_messages
from conftest import random_model
from error_lines import error_line

import bench
from flatgpt.benchmarks.run_report import Axis
from flatgpt.checkpoint.save import save_checkpoint
from flatgpt.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer

pytest_plugins = ['browser']
CHAT = {'user': ['User: ', '\n'], 'assistant': ['Bot: ', '\n']}


def make_run(name, tokenizer=None, losses=(3.0, 2.0, 1.5), key='val_loss', **config):
    """A run directory whose name, settings and samples may look like HTML."""
    tokenizer = tokenizer or byte_tokenizer()
    model = random_model(tokenizer.vocab_size)
    state = {'step': 2, 'val_loss': 1.0, 'evaluated': True, 'config': config}
    save_checkpoint(Path(name), model, [], tokenizer, state, keep_evaluated=False)
    lines = [{'step': i, 'seconds': 2.0 * i, key: y} for i, y in enumerate(losses)]
    lines += [{'step': i, 'seconds': 2.0 * i, key[4:]: y + 0.1} for i, y in enumerate(losses)]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    Path(name, 'metrics.jsonl').write_text(text)


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Write the report of runs in a folder of its own -> its text."""
    monkeypatch.chdir(tmp_path)

    def report(*runs, **flags):
        flags = [f'--{name}={value}' for name, value in flags.items()]
        bench.main(settings(f'--report={",".join(runs)}', *flags))
        assert capsys.readouterr().out == 'report.html\n'
        return Path('report.html').read_text(encoding='utf-8')

    return report


def cells(page, row):
    """The cells of a row of a table."""
    found = re.search(f'<tr><td>{re.escape(row)}</td>(.*?)</tr>', page)
    return re.findall('<td>(.*?)</td>', found[1])


def test_a_report_has_what_differs_between_runs_and_what_they_write(report):
    make_run('a', learning_rate=0.1, seed=1, note='<b>')
    make_run('b', losses=(3.5, 2.5), learning_rate=0.2, seed=1)
    entry = {'task': 'cbt', 'metrics': {'acc': {'value': 0.5, 'stderr': 0.01}}}
    results = [entry, {'job': 'quality', 'side': 'int8', 'perplexity': 4.5}]
    Path('a/bench.json').write_text(json.dumps({'results': results}))
    page = report('a', 'b', start='<i>x')
    assert cells(page, 'learning_rate') == ['0.1', '0.2']
    assert cells(page, 'note') == ['&lt;b&gt;', '-']
    assert '<td>seed</td>' not in page
    assert cells(page, 'best validation loss, nats') == ['1.5000', '2.5000']
    assert cells(page, 'cbt, acc') == ['0.5000 ± 0.0100', '-']
    assert cells(page, 'perplexity, int8') == ['4.5000', '-']
    assert page.count('<svg') == 2
    assert page.count('<polyline') == 8
    assert page.count('<pre><b>&lt;i&gt;x</b>') == 6
    assert '<i>x' not in page
    assert not re.search('<script|src=|href=|url[(]', page)
    assert report('a', 'b', start='<i>x') == page


def test_a_report_of_one_run_with_rewards_and_a_chat_template(report):
    tokenizer = Tokenizer.from_dict(byte_tokenizer().to_dict() | {'chat_template': CHAT})
    make_run('chat', tokenizer, (0.1, 0.4), 'val_reward')
    page = report('chat')
    assert cells(page, 'best validation reward') == ['0.4000']
    assert 'Settings that differ' not in page
    assert 'Measured' not in page
    assert '>Reward<' in page
    assert '>Loss' not in page


@error_line(
    'has no metrics.jsonl; give a run directory',
    'its metrics.jsonl has no evaluation',
    '{}: {}, in --start=',
)
def test_a_run_that_a_report_cannot_have_is_one_line(report):
    make_run('good')
    make_run('early', losses=(), key='val_loss')
    Path('empty').mkdir()
    for run in ('early', 'empty'):
        assert refused(f'--report=good,{run}').startswith(f'{run}: ')
    make_run('letters', char_tokenizer('ab'))
    assert 'in --start=' in refused('--report=letters', '--start=xyz')
    report('good', 'good')
    report('letters', start='ab')


def test_a_chart_has_round_numbers():
    labels = [label for _, label in Axis([0.0, 1400.0], 0, 100).ticks()]
    assert labels == ['0', '500', '1,000']
    assert [label for _, label in Axis([1.2, 1.5], 0, 100).ticks()][:2] == ['1.2', '1.3']
    assert Axis([2.0, 2.0], 100, 0)(2.0) == 100
    assert [Axis([1, 3], 10, 20)(value) for value in (1, 2, 3)] == [10, 15, 20]


@needs_chromium
def test_a_report_opens_from_the_disk(report, chromium):
    for name in 'abc':
        make_run(name)
    report('a', 'b', 'c')
    set_screen(chromium, 360, 640)
    chromium.get(Path('report.html').resolve().as_uri())
    width = chromium.execute_script('return document.documentElement.scrollWidth')
    assert width == 360
    assert len(chromium.find_elements('css selector', 'pre')) == 9
    assert severe_messages(chromium) == []
