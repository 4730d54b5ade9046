"""The table of gpu_day.py with jobs that crash, hang and are cut off; no GPU is used."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused
from error_lines import error_line

from flatgpt.benchmarks import gpu_day
from flatgpt.benchmarks.gpu_day import Job, JobRunner, Table
from flatgpt.training import memory, memory_report
from model import GPTConfig

JOBS = """
import json, os, sys, time

def row(name, status='passed', result='', **more):
    print('RESULT ' + json.dumps({'row': name, 'status': status, 'result': result, **more}))

name, options = sys.argv[1], json.loads(sys.argv[2])
print('output of', name)
if name == 'arithmetic':
    row('arithmetic', options['text'], machine={'GPU': 'T4'})
elif name == 'crashes':
    row('first', result='1.5 times', bar='1.2 times')
    raise ValueError('three is broken')
elif name == 'hangs':
    os.system('sleep 60')
elif name == 'divides':
    1 / 0
elif name == 'killed':
    os.kill(os.getpid(), 9)
elif name == 'tests':
    for test in options['rows']:
        if test == 'dies':
            os._exit(1)
        if test == 'hangs':
            time.sleep(60)
        row(test, 'failed' if test == 'fails' else 'passed')
        if test == 'fails':
            os._exit(1)
"""


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Run jobs of the program above -> the table's rows by name, and its summary."""
    program = tmp_path / 'jobs.py'
    program.write_text(JOBS, encoding='utf-8')
    monkeypatch.setattr(gpu_day, 'PROGRAM', [sys.executable, '-S', '-u', str(program)])

    def run(*jobs, arithmetic='passed', minutes=gpu_day.MINUTES):
        options = {'text': arithmetic, 'computes': False}
        runner = JobRunner(options, Table(tmp_path / 'out'), minutes)
        for job in (Job('arithmetic', 20, ('arithmetic',)), *jobs):
            runner.run(job)
        content = json.loads((tmp_path / 'out' / 'table.json').read_text())
        assert content['summary'] in (tmp_path / 'out' / 'table.md').read_text()
        return {row['row']: row for row in content['rows']}, content

    return run


def test_a_crash_is_a_row_and_the_next_job_starts(day, tmp_path):
    jobs = Job('crashes', 20, ('first', 'second', 'third')), Job('tests', 20, ('after',))
    rows, content = day(*jobs)
    assert list(rows) == ['arithmetic', 'first', 'second', 'third', 'after']
    assert rows['second']['status'] == rows['third']['status'] == 'failed'
    assert rows['second']['result'] == 'ValueError: three is broken'
    assert content['summary'] == '3 rows passed, 2 failed, 0 not comparable, 0 cut'
    assert content['machine']['GPU'] == 'T4'
    table = (tmp_path / 'out' / 'table.md').read_text()
    assert '| first | passed | 1.5 times | 1.2 times | ' in table
    assert 'output of crashes' in (tmp_path / 'out' / 'crashes.log').read_text()


def test_a_killed_job_is_a_row_with_its_signal(day):
    rows, _ = day(Job('killed', 20, ('large',)))
    assert rows['large']['result'] == 'killed by signal 9; output of killed'


def test_a_job_that_hangs_is_stopped_at_its_limit(day):
    rows, _ = day(Job('hangs', 0.5, ('stuck',)), Job('tests', 20, ('after',)))
    assert rows['stuck']['status'] == 'failed'
    assert rows['stuck']['result'].startswith('no result within 0 s; last line: output of hangs')
    assert rows['after']['status'] == 'passed'


def test_the_total_limit_cuts_the_rows_that_are_left(day, monkeypatch):
    monkeypatch.setattr(gpu_day, 'MIN_SECONDS', 0)
    jobs = Job('hangs', 600, ('stuck', 'later')), Job('tests', 20, ('after',))
    rows, content = day(*jobs, minutes=0.02)
    assert [row['status'] for row in rows.values()][1:] == ['cut', 'cut', 'cut']
    assert rows['after']['result'] == 'by the limit of 0.02 minutes'
    assert content['summary'].endswith('3 cut')


def test_tests_go_on_in_a_new_process_after_one_that_ended_it(day, tmp_path):
    names = ('works', 'fails', 'dies', 'works too', 'hangs', 'works again')
    rows, _ = day(Job('tests', 3, names, restarts=True))
    statuses = {name: rows[name]['status'] for name in names}
    failed = dict.fromkeys(('fails', 'dies', 'hangs'), 'failed')
    assert statuses == {**dict.fromkeys(names, 'passed'), **failed}
    log = (tmp_path / 'out' / 'tests.log').read_text()
    assert log.count('output of tests') == 4  # each that did not end by itself is met once


def test_wrong_numbers_of_a_device_that_does_not_compute_are_no_failure(day):
    job = Job('divides', 20, ('share',))
    rows, content = day(job, arithmetic='not comparable')
    assert rows['share']['status'] == 'not comparable'
    assert content['summary'] == '0 rows passed, 0 failed, 2 not comparable, 0 cut'
    rows, _ = day(job)
    assert rows['share']['status'] == 'failed'


@pytest.mark.parametrize(
    ('printed', 'error'),
    [
        ('step 1\nerror: no such config; use another', 'error: no such config; use another'),
        ('Traceback\n  line\ntorch.OutOfMemoryError: CUDA\n\n', 'torch.OutOfMemoryError: CUDA'),
        ('[rank0]: KeyError: 3\nerrors.ChildFailedError: \n=====', 'KeyError: 3'),
        ('killed\n', 'killed'),
        ('', 'no output'),
    ],
)
def test_the_error_of_a_program_is_found_in_its_output(printed, error):
    assert gpu_day.last_error(printed) == error


@pytest.mark.parametrize('compiled', [True, False])
def test_the_total_of_a_memory_plan_is_found_in_its_output(compiled, monkeypatch):
    monkeypatch.setattr(memory, 'eager_peak', lambda workload: Counter(activations=10e9))
    workload = memory.MemoryWorkload(
        GPTConfig(), 'cuda', torch.bfloat16, 'adamw', micro_batch_size=1, compiled=compiled
    )
    _, plan = memory_report.tabulate(workload, 'cuda:0', memory=None, fresh=True)
    assert re.search(gpu_day.PLAN_TOTAL, plan)[1] == '10,000'


def test_every_test_of_the_gpu_is_a_row():
    tests = next(job for job in gpu_day.JOBS if job.name == 'tests')
    assert len(tests.rows) > 10
    rows = [row for job in gpu_day.JOBS for row in job.rows]
    assert len(rows) == len({*rows})


def test_every_job_has_a_function():
    source = (ROOT / 'flatgpt' / 'benchmarks' / 'gpu_jobs.py').read_text(encoding='utf-8')
    assert [job.name for job in gpu_day.JOBS if f'\ndef {job.name}(options' not in source] == []


@error_line('has no input.txt; save Shakespeare')
def test_a_data_folder_without_the_text_is_refused_until_it_has_it(tmp_path):
    assert 'has no input.txt' in refused(gpu_day.find_data, str(tmp_path))
    cache = tmp_path / 'tiktoken' / ('0123456789' * 4)
    cache.parent.mkdir()
    cache.touch()
    Path(tmp_path / 'input.txt').touch()
    found = gpu_day.find_data(str(tmp_path))
    assert found == {'text': str(tmp_path / 'input.txt'), 'vocabulary': str(cache.parent)}


@error_line('has no model.py; give the folder of a checkout')
def test_a_nanogpt_folder_without_its_model_is_refused_until_it_has_it(tmp_path):
    assert 'has no model.py' in refused(gpu_day.find_nanogpt, str(tmp_path))
    (tmp_path / 'model.py').touch()
    assert gpu_day.find_nanogpt(str(tmp_path)) == str(tmp_path)


@error_line('--out={}: cannot be written')
def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / 'file').touch()
    for out in ('file', 'file/folder'):
        assert 'choose another --out' in refused(Table, tmp_path / out)
    Table(tmp_path / 'other')


@pytest.mark.parametrize('minutes', ['0', '-1', 'nan', 'inf'])
def test_a_limit_that_is_no_time_is_refused(minutes):
    assert f'minutes={float(minutes)}: must be at least 1' in refused(
        gpu_day.arguments, [f'--minutes={minutes}']
    )


def test_the_tables_of_earlier_runs_in_a_folder_are_kept(tmp_path):
    for name in ('first', 'second', 'third'):
        Table(tmp_path).add(name, 'passed', '')
    kept = {path.name: path.read_text() for path in tmp_path.glob('table*.md')}
    assert sorted(kept) == ['table-1.md', 'table-2.md', 'table.md']
    assert 'first' in kept['table-1.md']
    assert 'second' in kept['table-2.md']
    assert (tmp_path / 'table-2.json').exists()


@error_line('{}; run this on a machine with a GPU')
def test_without_a_gpu_no_other_job_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, 'exit_on_signals', list)
    program = tmp_path / 'jobs.py'
    row = {'row': 'arithmetic', 'status': 'failed', 'result': 'no GPU', 'machine': {'GPU': 'none'}}
    program.write_text(f'print({gpu_day.RESULT + json.dumps(row)!r})', encoding='utf-8')
    monkeypatch.setattr(gpu_day, 'PROGRAM', [sys.executable, '-S', '-u', str(program)])
    told = refused(gpu_day.main, [f'--out={tmp_path / "out"}'])
    assert told == 'no GPU; run this on a machine with a GPU'
    assert len(json.loads((tmp_path / 'out' / 'table.json').read_text())['rows']) == 1


def test_a_signal_to_end_also_ends_the_job(tmp_path):
    program = tmp_path / 'jobs.py'
    program.write_text('import os\nprint(os.getpid(), flush=True)\nos.system("sleep 60")')
    code = (
        f'import sys; from flatgpt.benchmarks import gpu_day\n'
        f'gpu_day.PROGRAM = [sys.executable, "-S", "-u", {str(program)!r}]\n'
        f'gpu_day.main(["--only=decode", "--out={tmp_path / "out"}"])'
    )
    day = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
    log = tmp_path / 'out' / 'arithmetic.log'
    while not (log.exists() and log.read_text().strip()) and day.poll() is None:
        time.sleep(0.01)
    day.terminate()
    assert day.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_only_some_jobs_run_after_arithmetic():
    jobs = gpu_day.requested_jobs('decode,speedrun')
    assert [job.name for job in jobs] == ['arithmetic', 'speedrun', 'decode']
    assert 'must be one of' in refused(gpu_day.requested_jobs, 'decoding')
