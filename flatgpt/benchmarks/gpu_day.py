"""
Every check and benchmark that needs a GPU, as one table: correctness first, then speed.

$ bash launch/gpu_day.sh --data=DIR --nanogpt=DIR

Each job of gpu_jobs.py is a process with a time limit, which reports one or more rows. A crash, a
hang or an exception is a row, too, and the next job starts. table.md and table.json are written
after each row, so that nothing measured is lost if the machine is taken away; a table of an
earlier run is renamed to table-1.md. The output of a job is in <its name>.log. This process does
not import torch, since that import may be what fails.
"""

import ast
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import NamedTuple

from flatgpt import ROOT
from flatgpt.errors import (
    ArgumentParser,
    UserError,
    check_choice,
    check_range,
    one_line_errors,
    reason_of,
)
from flatgpt.files import atomic_file

MINUTES = 9.0  # in total; --minutes scales the limits below with it
MIN_SECONDS = 15  # with less time left, no job starts: importing torch can take that long
PROGRAM = [sys.executable, '-u', '-m', 'flatgpt.benchmarks.gpu_jobs']
RESULT = 'RESULT '  # begins a line of a job that is a row
PASSED, BELOW, MEASURED, FAILED = 'passed', 'below the bar', 'measured', 'failed'
NOT_COMPARABLE, SKIPPED, CUT = 'not comparable', 'skipped', 'cut'
NO_GPU = 'none'  # of the machine
ERROR = r'^(?:\[rank\d+\]: )?((?:error|exit status \d+|[\w.]*Error): \S.*)'
PLAN_TOTAL = r'total at the peak of .* step +([\d,]+) MB'  # in the output of train.py --plan
# errors that follow from numbers that a device did not compute
WRONG_NUMBERS = re.compile('not finite|is nan|division by zero|index out of range', re.IGNORECASE)


class Job(NamedTuple):
    """A function of gpu_jobs.py and the rows that it reports.

    seconds: limit from its start to the first row, and from each row to the next.
    """

    name: str
    seconds: float
    rows: tuple[str, ...]
    restarts: bool = False  # whether a new process runs the remaining rows after one failed


def names_of_tests() -> tuple[str, ...]:
    tree = ast.parse((ROOT / 'tests' / 'test_gpu.py').read_text(encoding='utf-8'))
    functions = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return tuple(name for name in functions if name.startswith('test_'))


JOBS = (  # the most important first: the machine may be taken away
    Job('arithmetic', 60, ('arithmetic',)),
    Job('tests', 60, names_of_tests(), restarts=True),
    Job('speedrun', 100, ('speedrun',)),
    Job('gpt2', 120, ('train gpt2', 'plan gpt2')),
    Job('compare_gpt2', 150, ('gpt2 vs transformers', 'gpt2 vs nanoGPT')),
    Job('decode', 60, ('decode', 'greedy tokens')),
    Job('modern', 120, ('train modern', 'plan modern')),
    Job('decode_static', 90, ('decode vs a static cache',)),
    Job('compare_modern', 90, ('modern vs transformers',)),
    Job('prefill', 60, ('prefill vs transformers', 'flash vs cuDNN')),
    Job('saving', 60, ('saving',)),
    Job('batch_32', 90, ('gpt2, micro-batch 32',)),
    Job('batch_48', 90, ('gpt2, micro-batch 48',)),
    Job('speedrun_eager', 60, ('speedrun without torch.compile',)),
    Job('ddp', 90, ('gradient_as_bucket_view',)),
)


# -----------------------------------------------------------------------------
# the table


class Table:
    """The rows so far, printed as they come and written to table.md and table.json."""

    def __init__(self, folder: Path):
        self.folder, self.rows, self.machine = folder, [], {'commit': commit()}
        self.machine['date'] = datetime.now().astimezone().isoformat(timespec='seconds')
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.keep_earlier()
            self.write()
        except OSError as error:
            raise UserError(
                f'--out={folder}: cannot be written: {reason_of(error)}; choose another --out'
            ) from None

    def keep_earlier(self) -> None:
        """Rename the table of an earlier run, which may be all that a lost machine left."""
        number = next(n for n in count(1) if not [*self.folder.glob(f'table-{n}.*')])
        for suffix in ('md', 'json'):
            with suppress(FileNotFoundError):
                (self.folder / f'table.{suffix}').rename(self.folder / f'table-{number}.{suffix}')

    def add(self, row: str, status: str, result: str, seconds: float = 0.0, **more) -> None:
        self.machine |= more.pop('machine', {})
        self.rows.append({'row': row, 'status': status, 'result': result, **more})
        self.rows[-1]['seconds'] = round(seconds, 1)
        print(f'{row}: {status}: {result}' if result else f'{row}: {status}', flush=True)
        self.write()

    def write(self) -> None:
        content = {'machine': self.machine, 'rows': self.rows, 'summary': self.summary()}
        texts = {'table.json': json.dumps(content, indent=1) + '\n', 'table.md': self.markdown()}
        for name, text in texts.items():
            with atomic_file(self.folder / name) as part:
                part.write_text(text, encoding='utf-8')

    def markdown(self) -> str:
        lines = [f'{name}: {value}  ' for name, value in self.machine.items()]
        lines += ['', '| row | status | result | bar | seconds |', '|---|---|---|---|---|']
        for row in self.rows:
            cells = (row['row'], row['status'], row['result'], row.get('bar', ''), row['seconds'])
            lines.append(f'| {" | ".join(str(cell).replace("|", "/") for cell in cells)} |')
        return '\n'.join([*lines, '', self.summary()]) + '\n'

    def summary(self) -> str:
        counts = Counter(row['status'] for row in self.rows)
        first = [f'{counts[PASSED]} rows passed', f'{counts[FAILED]} failed']
        first += [f'{counts[NOT_COMPARABLE]} not comparable', f'{counts[CUT]} cut']
        others = [f'{counts[name]} {name}' for name in (BELOW, MEASURED, SKIPPED) if counts[name]]
        return ', '.join(first + others)


def commit() -> str:
    command = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return 'unknown'
    return done.stdout.strip() or 'unknown'


# -----------------------------------------------------------------------------
# a job


def last_error(printed: str) -> str:
    """The last error that a program printed, not torchrun's own after one; or its last line."""
    errors = re.findall(ERROR, printed, re.MULTILINE)
    return (errors or printed.strip().splitlines() or ['no output'])[-1]


class Process:
    """A job in a process group of its own. A thread reads its output: a read may block forever."""

    def __init__(self, job: Job, rows: list[str], options: dict, log):
        self.process = subprocess.Popen(
            [*PROGRAM, job.name, json.dumps({**options, 'rows': rows})],
            cwd=ROOT,
            env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONFAULTHANDLER': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
            start_new_session=True,
        )
        self.log, self.printed, self.lines = log, '', queue.Queue()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def results(self, seconds: float, end: float) -> Iterator[dict]:
        """Its rows, until it ends. TimeoutError after `seconds` without a row, and at `end`."""
        deadline = min(time.monotonic() + seconds, end)
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                return
            if line.startswith(RESULT):
                yield json.loads(line.removeprefix(RESULT))
                deadline = min(time.monotonic() + seconds, end)
                continue
            self.log.write(line)
            self.log.flush()
            self.printed = (self.printed + line)[-10_000:]

    def wait(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)

    def kill(self) -> None:
        """End the process and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun passes on only the first
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.wait()
        self.reader.join(5)
        if not self.reader.is_alive():
            self.process.stdout.close()


class JobRunner:
    """Runs jobs one after the other; each of their rows ends up in the table."""

    def __init__(self, options: dict, table: Table, minutes: float):
        self.options, self.table, self.scale = options, table, minutes / MINUTES
        self.minutes, self.end = minutes, time.monotonic() + 60 * minutes

    def run(self, job: Job) -> None:
        rows = list(job.rows)
        with open(self.table.folder / f'{job.name}.log', 'w', encoding='utf-8') as log:
            while rows and self.end - time.monotonic() > MIN_SECONDS:
                count = len(rows)
                problem, status = self.run_process(job, rows, log)
                # a process may also end because of the row that it reported last
                is_certain = self.timed_out or len(rows) == count or not job.restarts
                if rows and is_certain:
                    self.table.add(rows.pop(0), status, problem, self.waited)
                if not job.restarts:
                    break
        for row in rows:
            is_cut = self.end - time.monotonic() <= MIN_SECONDS
            why = f'by the limit of {self.minutes:g} minutes' if is_cut else 'as the row above'
            self.table.add(row, CUT if is_cut else status, why)

    def run_process(self, job: Job, rows: list[str], log) -> tuple[str, str]:
        """Take a process's rows off `rows` -> why the others are missing, and their status."""
        process, limit = Process(job, rows, self.options, log), job.seconds * self.scale
        began, self.timed_out = time.monotonic(), False
        try:
            for result in process.results(limit, self.end):
                rows.remove(result['row'])
                self.take(result, time.monotonic() - began)
                began = time.monotonic()
            process.wait()
        except TimeoutError:
            self.timed_out = True
            if time.monotonic() >= self.end:
                return f'by the limit of {self.minutes:g} minutes', CUT
            last = (process.printed.strip().splitlines() or ['none'])[-1]
            return f'no result within {limit:.0f} s; last line: {last[:200]}', FAILED
        finally:
            self.waited = time.monotonic() - began
            process.kill()
        status = process.process.returncode
        error = f'killed by signal {-status}; ' * (status < 0) + last_error(process.printed)[:200]
        wrong = not self.options['computes'] and WRONG_NUMBERS.search(error)
        return error, NOT_COMPARABLE if wrong else FAILED

    def take(self, result: dict, seconds: float) -> None:
        if result['row'] == 'arithmetic':
            self.options['computes'] = result['status'] == PASSED
        self.table.add(**{'seconds': seconds, **result})


# -----------------------------------------------------------------------------
# the command line


def arguments(argv: list[str] | None) -> dict:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--data', help="folder with Shakespeare's input.txt and tiktoken's cache")
    parser.add_argument('--nanogpt', help='folder of a nanoGPT checkout to compare with')
    parser.add_argument('--out', default='out/gpu_day', help='folder to write to: %(default)s')
    names = ','.join(job.name for job in JOBS)
    parser.add_argument('--only', default='', help=f'jobs to run: {names}')
    text = 'time limit in total; those of the rows scale with it (default: %(default)g)'
    parser.add_argument('--minutes', type=float, default=MINUTES, help=text)
    given = vars(parser.parse_args(argv))
    check_range(1, None, given, 'minutes')
    return given


def requested_jobs(only: str) -> list[Job]:
    """The jobs in `only`, by default all; always with arithmetic, on which their results depend."""
    names = [name for name in only.split(',') if name]
    for name in names:
        check_choice(tuple(job.name for job in JOBS), {'only': name}, 'only')
    return [job for job in JOBS if not names or job.name in ('arithmetic', *names)]


def find_data(folder: str | None) -> dict[str, str | None]:
    """The text and the vocabulary in a folder or its subfolders."""
    if folder is None:
        return {'text': None, 'vocabulary': None}
    texts = sorted(Path(folder).rglob('input.txt'))
    if not texts:
        raise UserError(f"--data={folder}: has no input.txt; save Shakespeare's text there")
    caches = [path.parent for path in sorted(Path(folder).rglob('*')) if is_cache_file(path)]
    return {'text': str(texts[0].resolve()), 'vocabulary': str(caches[0]) if caches else None}


def is_cache_file(path: Path) -> bool:
    """Whether tiktoken wrote this file, which is named by the sha1 of its address."""
    return bool(re.fullmatch('[0-9a-f]{40}', path.name))


def find_nanogpt(folder: str | None) -> str | None:
    """The whole path of a nanoGPT checkout."""
    if folder is not None and not (Path(folder) / 'model.py').is_file():
        raise UserError(f'--nanogpt={folder}: has no model.py; give the folder of a checkout')
    return folder and str(Path(folder).resolve())


def exit_on_signals() -> None:
    """Make the signals that end a lease or a connection end the job, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    jobs, data = requested_jobs(chosen['only']), find_data(chosen['data'])
    if data['vocabulary']:
        os.environ['TIKTOKEN_CACHE_DIR'] = str(Path(data['vocabulary']).resolve())
    folder = Path(chosen['out']).resolve()
    nanogpt = find_nanogpt(chosen['nanogpt'])
    options = {**data, 'nanogpt': nanogpt, 'computes': False}
    table = Table(folder)
    runner = JobRunner(options, table, chosen['minutes'])
    exit_on_signals()
    for job in jobs:
        runner.run(job)
        if table.machine.get('GPU') == NO_GPU:
            raise UserError(f'{table.rows[0]["result"]}; run this on a machine with a GPU')
    print(f'\n{table.markdown()}\nwrote {folder / "table.md"}')


if __name__ == '__main__':
    one_line_errors()
    main()
