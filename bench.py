"""
Time this machine and this model beside others that do the same job; print a table, write JSON.

$ python bench.py                                     # GPT-2 124M: several minutes
$ python bench.py --quick                             # a minute, of a small model
$ python bench.py --only=decode --rows=1,16 --arch=modern
$ python bench.py train_shakespeare_char_cpu --vocab_size=65 --only=training --nanogpt=../nanoGPT
$ python bench.py --only=quality --out_dir=out/mine   # what 16 and 8 bits do to its perplexity
$ python bench.py --only=data --text=corpus/          # tokenizers, on your own files
$ python bench.py --only=training --profile           # the slowest operators, and a trace
$ python bench.py --serve --block_size=1024           # api.py under load, beside transformers
$ python bench.py --compare=out/a,out/b               # the losses of runs in one picture, runs.png

Sides run in processes of their own, from the same weights, and take turns, so that a machine whose
speed drifts favours none. Figures are medians over the rounds, with the lowest and the highest. A
ratio is printed only between sides that did the same work and came to the same result.
"""

import contextlib
import importlib.metadata
import json as json_module
import math
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import load
import track
from configurator import UserError, configure, one_of, within
from data.dataset import SPLITS, Dataset, is_prepared
from data.encode import cores
from data.text import prepare
from data.tokenizer import char_tokenizer, get_tokenizer
from peers import (
    Side,
    build_model,
    import_nanogpt,
    in_format,
    prompts_of,
    synchronize,
    transformers_model,
)
from runtime import DTYPES, Runtime, pick_device, pick_dtype

# -----------------------------------------------------------------------------
# what is timed
only = ''  # some of training,prefill,decode,quality,data,startup; empty: all
quick = False  # fewer rounds and, unless a shape is given, a small model
rounds = 5  # turns of each side
nanogpt: str | None = None  # folder of a nanoGPT checkout to time beside
serve = False  # time api.py under load instead of all else
profile = False  # have torch's profiler watch a turn of flatGPT, and write its trace
json = 'bench.json'  # the figures, for programs
compare: str | None = None  # folders of runs, a,b: draw their losses into runs.png, time nothing
# training
steps = 3  # in a turn
optimizer = 'adamw'  # or 'muon'
batch_size = 4
dropout = 0.0
compile: bool | str = 'auto'  # 'auto' compiles on a CUDA GPU, as train.py does
# prefill and decoding
rows = '1,8,32'  # texts side by side
prompt_tokens = 64
new_tokens = 64
formats = 'float32,bfloat16,int8'  # of the weights
# serving
clients = 16  # that ask again when they have their answer
serve_format = 'bfloat16'  # of the weights
# quality
out_dir: str | None = None  # a run whose perplexity is measured in each format, or gpt2 ...
dataset: str | None = None  # to measure it on; None: what the run was trained on
# data
text: str | None = None  # a folder of text; None: the source of Python's library and packages
text_bytes = 60_000_000  # of it at most
# model; the defaults are GPT-2 124M
arch = 'gpt2'  # or 'modern'
block_size = 256
vocab_size = 50304
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head: int | None = None  # arch='modern'
bias = False
# machine
device = 'auto'  # 'auto', 'cpu', 'mps', 'cuda' or 'cuda:1'
dtype = 'auto'  # of training: 'auto', 'float32', 'bfloat16' or 'float16'
seed = 1337
# -----------------------------------------------------------------------------

JOBS = ('training', 'prefill', 'decode', 'quality', 'data', 'startup')
SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'vocab_size': 8192, 'n_kv_head': None}
QUICK = {**SMALL, 'rounds': 3, 'rows': '1,8', 'formats': 'bfloat16,int8', 'text_bytes': 5_000_000}


# -----------------------------------------------------------------------------
# results


class Report:
    """Prints each figure as it comes, and writes all of them as JSON."""

    def __init__(self, c: dict, machine: dict):
        self.path, self.machine, self.entries = c['json'], machine, []
        self.settings = {name: c[name] for name in c if name != 'json'}
        self.command = ' '.join(['python bench.py', *sys.argv[1:]])

    def add(self, job: str, side: str, note: str = '', **figures) -> None:
        self.entries.append({'job': job, 'side': side, 'note': note, **figures})

    def compare(self, job: str, turns: dict[str, list], notes: dict, against: dict) -> None:
        """Print and keep a job's lines: the speed of each side, and how it compares with others.

        against: side -> {another side: how far apart, relatively, their results may be}.
        """
        for side, results in turns.items():
            note, figures = notes.get(side) or '', {}
            if results:
                speeds = [work['tokens'] / seconds for seconds, work, _ in results]
                figures['tokens_per_second'] = spread(speeds)
                figures['milliseconds'] = spread([seconds * 1e3 for seconds, _, _ in results])
            line(job, side, shown(speeds, ',.0f') if results else '', note)
            for other, tolerance in against.get(side, {}).items():
                if not results or not turns.get(other):
                    continue
                reason = different(turns[other][0][1], results[0][1], tolerance)
                times = [t[0] / o[0] for o, t in zip(turns[other], results, strict=False)]
                if reason:
                    print(f'{"":<16} no ratio to {other}: {reason}', flush=True)
                    figures[f'no ratio to {other}'] = reason
                else:
                    beside = f'{other} is {shown(times, ".2f")} times as fast'
                    print(f'{"":<16} {beside}', flush=True)
                    figures[f'times as fast is {other}'] = spread(times)
            self.add(job, side, note, **figures)

    def write(self) -> None:
        content = {'command': self.command, 'settings': self.settings, 'machine': self.machine}
        content['results'] = self.entries
        try:
            Path(self.path).write_text(json_module.dumps(content, indent=1) + '\n')
        except OSError as error:
            raise UserError(f'json={self.path}: cannot be written: {error.strerror}') from error
        print(f'written: {self.path}')


def spread(values: list[float]) -> dict:
    return {'median': statistics.median(values), 'low': min(values), 'high': max(values)}


def shown(values: list[float], how: str) -> str:
    """'12.1 (11.8 to 12.2)': the median, and between what all lie."""
    return f'{statistics.median(values):{how}} ({min(values):{how}} to {max(values):{how}})'


def line(job: str, side: str, figures: str, note: str) -> None:
    print(f'{job:<16} {side:<23} {figures:<40} {note}'.rstrip(), flush=True)


def different(ours: dict, theirs: dict, tolerance: float) -> str:
    """'' if two sides did the same work with the same result, else what differs."""
    if ours['tokens'] != theirs['tokens']:
        return f'{ours["tokens"]:,} against {theirs["tokens"]:,} tokens'
    if ours.get('optimizer') != theirs.get('optimizer'):
        return f'{ours["optimizer"]} against {theirs["optimizer"]}'
    a, b = np.array(ours['result'], float), np.array(theirs['result'], float)
    limit = tolerance * np.abs(b).max(initial=0)
    near = a.shape == b.shape and bool((np.abs(a - b) <= limit).all())
    return '' if near else 'the results differ'


def take_turns(sides: list[Side], c: dict, job: str, *arguments) -> dict[str, list]:
    """Every side's turns, alternating, after one each that does not count."""
    turns = {side.label: [] for side in sides}
    for number in range(c['rounds'] + 1):
        for side in sides:
            result = side.turn(job, *arguments)
            if result and number:
                turns[side.label].append(result)
    return turns


# -----------------------------------------------------------------------------
# jobs


def measure_machine(runtime: Runtime) -> dict:
    """What bounds everything else: bytes/s of reading memory, FLOP/s of matrix products."""
    device, gib = runtime.device, 2**30
    found = {'device': device, 'python': platform.python_version(), 'torch': torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found['transformers'] = importlib.metadata.version('transformers')
    found['threads'] = torch.get_num_threads() if device == 'cpu' else None
    name = torch.cuda.get_device_name(device) if runtime.device_type == 'cuda' else processor()
    found['name'] = name
    big = torch.ones(gib // 8 if device == 'cpu' else gib, device=device)
    seconds = time_often(big.sum, device)
    found['read_bytes_per_second'] = big.numel() * 4 / statistics.median(seconds)
    for kind in {torch.float32, torch.bfloat16, runtime.dtype}:
        size = 2048 if device == 'cpu' else 8192
        a = torch.randn(size, size, device=device).to(kind)
        seconds = time_often(lambda a=a: a @ a, device)
        found[f'flops_{str(kind)[6:]}'] = 2 * size**3 / statistics.median(seconds)
    flops = ', '.join(f'{k[6:]} {v / 1e9:,.0f}' for k, v in sorted(found.items()) if 'flops' in k)
    threads = f', {found["threads"]} threads' if found['threads'] else ''
    print(f'{name}{threads}, torch {torch.__version__}')
    print(f'reads {found["read_bytes_per_second"] / 1e9:.0f} GB/s; products, GFLOP/s: {flops}')
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line_ in Path('/proc/cpuinfo').read_text().splitlines():
            if line_.startswith('model name'):
                return line_.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def time_often(run, device: str, times: int = 9) -> list[float]:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


@contextlib.contextmanager
def opened(names: list[tuple], c: dict, job: str):
    """The processes of (side, format), ended afterwards."""
    sides = []
    try:
        for name, kind in names:
            sides.append(Side(name, {**c, 'job': job, 'format': kind}))
        for side in sides:
            side.trouble = side.receive()
        yield sides
    finally:
        for side in sides:
            side.close()


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


def bench_writing(c: dict, runtime: Runtime, report: Report, jobs: list[str]) -> None:
    """Prefill and decoding, for each number of rows, of every format and library."""
    formats = [*dict.fromkeys(c['formats'].split(','))]
    names = [('flatGPT', kind) for kind in formats]
    names += [('transformers', kind) for kind in formats if kind != 'int8']
    against = {
        f'transformers {kind}': {f'flatGPT {kind}': 1e-3 if kind == 'float32' else 0.05}
        for kind in formats
        if kind != 'int8'
    }
    if {'bfloat16', 'int8'} <= {*formats}:  # it has no int8: ours stands beside its 16 bits
        against['transformers bfloat16']['flatGPT int8'] = 0.2
    with opened(names, c, 'writing') as sides:
        for job in jobs:
            for rows in map(int, c['rows'].split(',')):
                turns = take_turns(sides, c, job, rows)
                notes = {}
                for side in sides:
                    notes[side.label] = side.trouble
                    if turns[side.label] and side.name == 'flatGPT':
                        share = share_of_limit(c, report, job, side, rows, turns[side.label])
                        notes[side.label] = ', '.join(filter(None, (share, side.trouble)))
                report.compare(f'{job} {rows} row{"s" * (rows > 1)}', turns, notes, against)
            watch(sides[0], c, job, int(c['rows'].split(',')[0]))


def share_of_limit(c: dict, report: Report, job: str, side: Side, rows: int, turns: list) -> str:
    """How near a step comes to what reading weights and cache, or multiplying, takes at least.

    A step is the whole of a prefill, whose head computes one token a row, or one token a row.
    """
    machine = report.machine
    with torch.device('meta'):
        model = build_model(c)
    head = c['vocab_size'] * c['n_embd']
    weights = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}[side.format]
    steps = 1 if job == 'prefill' else c['new_tokens'] - 1
    per_row = c['prompt_tokens'] if job == 'prefill' else 1
    held = 0 if job == 'prefill' else c['prompt_tokens'] + c['new_tokens'] / 2
    keys = c['n_embd'] // c['n_head'] * (c['n_kv_head'] or c['n_head'])
    each = 4 if machine['device'] == 'cpu' else max(weights, 2)
    cache = rows * 2 * c['n_layer'] * keys * held * each
    reading = (model.num_params() * weights + cache) / machine['read_bytes_per_second']
    kind = 'bfloat16' if side.format == 'int8' else side.format
    products = 2 * rows * ((model.num_params() - head) * per_row + head)
    multiplying = products / machine.get(f'flops_{kind}', math.inf)
    seconds = statistics.median(turn[0] for turn in turns) / steps
    what = 'reading' if reading > multiplying else 'multiplying'
    return f'{max(reading, multiplying) / seconds:.0%} of the limit by {what}'


def watch(side: Side, c: dict, job: str, *arguments) -> None:
    if c['profile'] and side.trouble is None:
        path = str(Path(c['json']).with_name(f'trace_{job}.json'))
        if found := side.turn(job, *arguments, trace=path):
            print(found[0])
            print(f'written: {path}, for https://ui.perfetto.dev')
        else:
            print(f'{side.label} could not be profiled: {side.trouble}')


def bench_quality(c: dict, runtime: Runtime, report: Report) -> None:
    """Perplexity of a run's model on its own validation split, in each format."""
    formats = [*dict.fromkeys(c['formats'].split(','))]
    found = {}
    for kind in formats:
        model, tokenizer, state = checkpoint.load_model(c['out_dir'], 'best', runtime.device)
        model = in_format(model, kind)
        data = Dataset(dataset_of(state, c['dataset']), model.config.block_size)
        if tokenizer not in (None, data.tokenizer) or data.vocab_size > model.config.vocab_size:
            raise UserError(f'{data.folder}: was not made with the tokenizer of {c["out_dir"]}')
        windows = data.eval_windows('val', None if not c['quick'] else 64)
        total = count = 0
        for part in np.array_split(windows, math.ceil(len(windows) / 8)):
            x, y = (torch.from_numpy(a).to(runtime.device) for a in data.eval_batch('val', part))
            with torch.inference_mode():
                loss = model(x, y)[1].item()
            total, count = total + loss * int((y >= 0).sum()), count + int((y >= 0).sum())
        found[kind] = math.exp(total / count)
        change = f' ({found[kind] / found[formats[0]] - 1:+.3%})' if len(found) > 1 else ''
        note = f'perplexity {found[kind]:.4f}{change}, {count:,} tokens of {data.folder.name}'
        line('quality', kind, '', note)
        report.add('quality', kind, note, perplexity=found[kind])


def dataset_of(state: dict, dataset: str | None) -> Path:
    """The folder of `dataset`, by default what a checkpoint's state says it was trained on."""
    name = dataset or state.get('config', {}).get('dataset')
    if not name:
        raise UserError('quality: a model of others is measured on the data that --dataset= names')
    folder = Path(name) if Path(name).is_dir() else Path(__file__).parent / 'data' / name
    if not is_prepared(folder):
        raise UserError(f'{folder}: the data to measure on is not here; prepare it, or --dataset=')
    return folder


def bench_data(c: dict, runtime: Runtime, report: Report) -> None:
    """From a folder of files to a finished dataset, beside what only turns text into ids."""
    with tempfile.TemporaryDirectory() as folder:
        texts = copy_texts(c, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f'{"data":<16} {size / 1e6:.1f} MB in {len(texts):,} files')
        for name in ('char', 'byte', 'bpe', 'gpt2'):
            sides = {'flatGPT': lambda name=name: prepared(name, folder)}
            notes = {'flatGPT': 'read, split, encoded, written, sealed'}
            try:
                if name == 'gpt2':
                    tokenizer = get_tokenizer('gpt2')
                    slow = tokenizer.accelerate()
                    notes['flatGPT'] += ', by ' + (f'tiktoken: {slow}' if slow else 'gigatoken')
                    add_peers(sides, notes, tokenizer, texts)
                turns = {side: [] for side in sides}
                for _ in range(min(3, c['rounds'])):
                    for side, run in sides.items():
                        turns[side].append((*run(), 0))
            except UserError as error:
                line(f'data {name}', '', '', str(error))
                continue
            against = {side: {'flatGPT': 0.0} for side in sides if side != 'flatGPT'}
            turns |= {side: [] for side in notes if side not in turns}  # what is not installed
            report.compare(f'data {name}', turns, notes, against)


def copy_texts(c: dict, folder: Path) -> list[str]:
    """Up to text_bytes of UTF-8 files, copied into a folder -> their texts."""
    paths = sysconfig.get_paths()
    roots = [Path(c['text'])] if c['text'] else [Path(paths['stdlib']), Path(paths['purelib'])]
    texts, left = [], c['text_bytes']
    for root in roots:
        pattern = '*' if c['text'] else '*.py'
        for path in sorted(root.rglob(pattern)):
            try:
                content = b''
                if left > 0 and path.is_file():
                    with path.open('rb') as file:
                        content = file.read(left)
                cut = len(content) == left  # perhaps within a character
                text = content.decode('utf-8-sig', 'ignore' if cut else 'strict')
            except (UnicodeDecodeError, OSError):
                continue
            if text and '\0' not in text:
                (folder / f'{len(texts):06}.txt').write_bytes(text.encode())
                texts.append(text)
                left -= len(text.encode())
    if len(texts) < 2:
        raise UserError(f'text={c["text"]}: needs two files of UTF-8 text at least')
    return texts


def prepared(name: str, folder: str) -> tuple[float, dict]:
    """data/text/prepare.py on the folder, with its output held back."""
    with tempfile.TemporaryDirectory() as out, open(os.devnull, 'w') as nowhere:
        begin = time.perf_counter()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            prepare.main([folder, f'--out_dir={out}', f'--tokenizer={name}'])
        seconds = time.perf_counter() - begin
        data = Dataset(out, 1)
        parts = [np.fromfile(Path(out) / f'{split}.bin', data.tokenizer.dtype) for split in SPLITS]
    ids = np.concatenate(parts).astype(np.int64)
    ids = ids[ids != data.tokenizer.eot]  # between documents, which the others know nothing of
    return seconds, {'tokens': len(ids), 'result': [float(ids.sum())]}


def add_peers(sides: dict, notes: dict, tokenizer, texts: list[str]) -> None:
    """Add tiktoken's and transformers' own batch calls, with all cores, on text in memory."""
    import tiktoken

    encoding = tiktoken.get_encoding('gpt2')

    def timed(encode) -> tuple[float, dict]:
        begin = time.perf_counter()
        batches = encode()
        seconds = time.perf_counter() - begin
        total = float(sum(map(sum, batches)))
        return seconds, {'tokens': sum(map(len, batches)), 'result': [total]}

    sides['tiktoken'] = lambda: timed(
        lambda: encoding.encode_ordinary_batch(texts, num_threads=cores())
    )
    notes['tiktoken'] = 'ids in memory'
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter
    except ImportError:
        notes['transformers'] = 'transformers is not installed'
        return
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'ranks.tiktoken')
        tokenizer.write_ranks(path)
        fast = TikTokenConverter(path, tokenizer.pattern).converted()
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast)
    sides['transformers'] = lambda: timed(
        lambda: theirs(texts, add_special_tokens=False)['input_ids']
    )
    notes['transformers'] = 'ids in memory'


PEER_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
idx = torch.tensor([[1]])
written = model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=1,
                         do_sample=False, pad_token_id=0)
print(chr(0x4E00 + int(written[0, -1])), flush=True)
"""


def bench_startup(c: dict, runtime: Runtime, report: Report) -> None:
    """From the command to its end, after the first token that a small model writes on the CPU."""
    c = {**c, **SMALL, 'vocab_size': 4096, 'block_size': 256, 'device': 'cpu', 'dropout': 0.0}
    letters = [chr(0x4E00 + i) for i in range(c['vocab_size'])]
    with tempfile.TemporaryDirectory() as folder:
        run, exported = Path(folder) / 'run', Path(folder) / 'transformers'
        checkpoint.save(
            run, build_model(c), [], char_tokenizer(letters), {'step': 0}, keep_evaluated=False
        )
        options = [f'--out_dir={run}', '--num_samples=1', '--max_new_tokens=1', '--temperature=0']
        script = Path(__file__).with_name('sample.py')
        prompt = [letters[1], '--device=cpu', '--dtype=float32']
        commands = {'flatGPT': [sys.executable, script, *prompt, *options]}
        notes = {'flatGPT': 'to the first token: sample.py'}
        try:
            model = transformers_model(c)
            sys.modules['transformers'].utils.logging.disable_progress_bar()
            model.save_pretrained(exported)
            commands['transformers'] = [sys.executable, '-c', PEER_SCRIPT, exported]
            notes['transformers'] = 'of from_pretrained and generate'
        except ImportError:
            line('startup', 'transformers', '', 'not installed')
        turns = {side: [] for side in commands}
        for _ in range(c['rounds']):
            for side, command in commands.items():
                turns[side].append(first_token(command))
    for side, results in turns.items():
        seconds, beside = [r[0] for r in results], ''
        if side != 'flatGPT':
            times = [t[0] / o[0] for o, t in zip(turns['flatGPT'], results, strict=True)]
            same = results[0][1] == turns['flatGPT'][0][1]
            beside = f', flatGPT is {shown(times, ".2f")} times as fast'
            beside = beside if same else ', no ratio to flatGPT: it wrote another token'
        line('startup', side, shown(seconds, '.2f') + ' seconds', notes[side] + beside)
        report.add('startup', side, notes[side] + beside, seconds=spread(seconds))


def first_token(command: list) -> tuple[float, str]:
    begin = time.perf_counter()
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, encoding='utf-8')
    if result.returncode:
        raise UserError(f'startup: {(result.stderr.strip().splitlines() or ["no output"])[-1]}')
    return time.perf_counter() - begin, result.stdout.strip()[-1:]


# -----------------------------------------------------------------------------
# api.py under load


def bench_serving(c: dict, runtime: Runtime, report: Report) -> None:
    """Clients of api.py beside the engine without HTTP, and beside transformers without either."""
    kind, clients = c['serve_format'], c['clients']
    names = [('flatGPT', kind), ('transformers', kind.replace('int8', 'bfloat16'))]
    with tempfile.TemporaryDirectory() as folder, opened(names, c, 'writing') as (ours, theirs):
        run = save_random(Path(folder), c)
        flags = {'dtype': ours.dtype, 'quantize': 'int8' if kind == 'int8' else None}
        flags |= {'device': runtime.device, 'max_rows': clients, 'max_queue': 10 * clients}
        with load.Server(run, **flags) as server:
            bench_throughput(c, report, server, ours, theirs)
            bench_lone_client(c, report, server, ours)
            bench_latency(c, report, server)
    with tempfile.TemporaryDirectory() as folder:
        small = {**c, **SMALL, 'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'vocab_size': 256}
        with load.Server(save_random(Path(folder), small), max_rows=clients) as server:
            bench_plumbing(small, report, server)


def save_random(folder: Path, c: dict) -> Path:
    """A run's folder with the weights that all sides have."""
    letters = char_tokenizer([chr(0x10000 + i) for i in range(c['vocab_size'])])
    checkpoint.save(folder, build_model(c), [], letters, {'step': 0}, keep_evaluated=False)
    return folder


def bodies(c: dict, count: int, **fields) -> list[dict]:
    """Requests for greedy texts after the same prompts that the other sides get."""
    prompts = prompts_of(c, count).tolist()
    common = {'max_tokens': c['new_tokens'], 'temperature': 0, **fields}
    return [{'prompt': prompt, **common} for prompt in prompts]


def asked(answers: list[load.Answer], seconds: float) -> tuple[float, dict, int]:
    """What clients got, as a turn; UserError if one of them got nothing."""
    if lost := [answer for answer in answers if answer.status != 200]:
        raise UserError(f'serving: {len(lost)} of {len(answers)} requests failed')
    return seconds, {'tokens': sum(answer.tokens for answer in answers), 'result': []}, 0


def bench_throughput(c: dict, report: Report, server: load.Server, ours: Side, theirs: Side):
    """Tokens per second over the same requests, for each way to have them answered."""
    clients, count = c['clients'], 4 * c['clients']
    http, alone = f'{clients} clients, HTTP', f'{clients} clients, engine'
    static, batched = 'transformers static', 'transformers continuous'
    turns = {side: [] for side in (http, alone, static, batched)}
    for number in range(c['rounds'] + 1):
        begin = time.perf_counter()
        answers = load.closed_loop(server.address, bodies(c, count), clients)
        found = {http: asked(answers, time.perf_counter() - begin)}
        found[alone] = ours.turn('served', clients, count)
        found[static] = theirs.turn('whole', clients)
        found[batched] = theirs.turn('batched', clients)
        for side in turns:
            if number and found[side]:
                turns[side].append(found[side])
    speeds = {side: [work['tokens'] / s for s, work, _ in turns[side]] for side in turns}
    asks = f'{count} prompts of {c["prompt_tokens"]}, {c["new_tokens"]} tokens each'
    notes = {
        http: f'api.py: {asks}, each asked when its client has the answer before',
        alone: 'the same without HTTP',
        static: theirs.trouble or f'generate() of {clients} prompts at once',
        batched: theirs.trouble or f'generate_batch() of {clients} prompts at once',
    }
    for side in turns:
        line('serving', side, shown(speeds[side], ',.0f') if speeds[side] else '', notes[side])
        figures = {'tokens_per_second': spread(speeds[side])} if speeds[side] else {}
        if side != http and speeds[side]:
            times = [mine / other for mine, other in zip(speeds[http], speeds[side], strict=True)]
            print(f'{"":<16} {http} are {shown(times, ".2f")} times as fast', flush=True)
            figures['times as fast are clients over HTTP'] = spread(times)
        report.add('serving', side, notes[side], **figures)


def bench_lone_client(c: dict, report: Report, server: load.Server, ours: Side) -> None:
    """One client against sample.py's way to write one text."""
    shares, speeds = [], []
    for number in range(c['rounds'] + 1):
        begin = time.perf_counter()
        answers = load.closed_loop(server.address, bodies(c, 2), 1)
        seconds, work, _ = asked(answers, time.perf_counter() - begin)
        alone, done, _ = ours.turn('whole', 1)
        if number:
            speeds.append(work['tokens'] / seconds)
            shares.append(speeds[-1] / (done['tokens'] / alone))
    note = f'{shown(shares, ".0%")} of what sample.py writes by itself'
    line('serving', 'one client, HTTP', shown(speeds, ',.0f'), note)
    figures = {'tokens_per_second': spread(speeds), 'share of sample.py': spread(shares)}
    report.add('serving', 'one client, HTTP', note, **figures)


def bench_latency(c: dict, report: Report, server: load.Server) -> None:
    """What streaming clients wait for: in a closed loop, at random moments, and 64 at once."""
    streamed = {'stream': True, 'stream_options': {'include_usage': True}}
    clients = c['clients']
    begin = time.perf_counter()
    answers = load.closed_loop(server.address, bodies(c, 2 * clients, **streamed), clients)
    rate = len(answers) / (time.perf_counter() - begin)
    latency_lines(report, f'{clients} streams', answers)
    answers = load.poisson(server.address, bodies(c, 2 * clients, **streamed), 0.7 * rate)
    latency_lines(report, f'Poisson {0.7 * rate:.1f}/s', answers)
    with load.Prober(server.address) as prober:
        answers = load.closed_loop(server.address, bodies(c, 64, **streamed), 64)
    latency_lines(report, '64 streams', answers)
    health = load.percentiles(prober.seconds)
    note = f'/health meanwhile: {in_milliseconds(health)}, {prober.failed} failed'
    line('serving', '64 streams', '', note)
    report.add('serving', '/health beside 64 streams', note, seconds=health)


def latency_lines(report: Report, side: str, answers: list[load.Answer]) -> None:
    asked(answers, 0.0)
    waits = {
        'first token': [answer.first for answer in answers],
        'between tokens': [gap for answer in answers for gap in answer.gaps],
        'whole answer': [answer.total for answer in answers],
    }
    for what, seconds in waits.items():
        found = load.percentiles(seconds)
        line(
            'serving', side, in_milliseconds(found), f'to the {what}' if 'n t' not in what else what
        )
        report.add('serving', side, what, seconds=found)


def in_milliseconds(found: dict[str, float]) -> str:
    return ', '.join(f'{name} {value * 1e3:,.0f} ms' for name, value in found.items())


def bench_plumbing(c: dict, report: Report, server: load.Server) -> None:
    """Answers of one token of a tiny model: what is left is the server."""
    rates = []
    for number in range(c['rounds'] + 1):
        asks = [{'prompt': [1, 2, 3], 'max_tokens': 1}] * 500
        begin = time.perf_counter()
        answers = load.closed_loop(server.address, asks, c['clients'])
        seconds, _, _ = asked(answers, time.perf_counter() - begin)
        rates += [len(answers) / seconds] if number else []
    line('serving', 'a tiny model', shown(rates, ',.0f') + ' requests/s', 'answers of one token')
    report.add('serving', 'a tiny model', requests_per_second=spread(rates))


# -----------------------------------------------------------------------------
# the command line


def check(c: dict) -> list[str]:
    """The jobs that are asked for; ConfigError or UserError for what cannot be."""
    names = ('rounds', 'steps', 'new_tokens', 'prompt_tokens', 'batch_size', 'text_bytes')
    within(1, None, c, *names)
    within(2, None, c, 'block_size', 'vocab_size', 'new_tokens')
    one_of((True, False, 'auto'), c, 'compile')
    one_of(('adamw', 'muon'), c, 'optimizer')
    jobs = [job for job in c['only'].split(',') if job]
    for job in jobs:
        one_of(JOBS, {'only': job}, 'only')
    if 'quality' in jobs and not c['out_dir']:
        raise UserError('quality: needs --out_dir=RUN, a model that has learned something')
    jobs = jobs or [job for job in JOBS if job != 'quality' or c['out_dir']]
    if c['out_dir']:
        foreign = checkpoint.is_foreign(c['out_dir'])
        state = {} if foreign else checkpoint.read_state(checkpoint.find(c['out_dir']))
        dataset_of(state, c['dataset'])
    if c['text'] and not Path(c['text']).is_dir():
        raise UserError(f'text={c["text"]}: no such folder')
    folder = Path(c['json']).parent
    if not folder.is_dir() or Path(c['json']).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f'json={c["json"]}: is no file that can be written')
    for kind in c['formats'].split(','):
        one_of((*DTYPES, 'int8'), {'formats': kind}, 'formats')
    for count in c['rows'].split(','):
        if not count.isdigit() or not int(count):
            raise UserError(f'rows={c["rows"]!r}: give numbers of texts, such as 1,8,32')
    writing = {'prefill', 'decode'} & {*jobs}
    if writing and c['prompt_tokens'] + c['new_tokens'] > c['block_size']:
        raise UserError(
            f'prompt_tokens={c["prompt_tokens"]} and new_tokens={c["new_tokens"]} do not fit into '
            f'block_size={c["block_size"]}'
        )
    if c['nanogpt']:
        if c['arch'] != 'gpt2':
            raise UserError("nanogpt: is GPT-2, so it cannot be timed beside arch='modern'")
        import_nanogpt(c['nanogpt'])
    return jobs


def check_memory(c: dict, runtime: Runtime, jobs: list[str]) -> None:
    """Refuse a model that this device cannot hold, before minutes are spent on finding out."""
    with torch.device('meta'):  # of many layers two tell enough
        one, two = (
            sum(p.numel() for p in build_model({**c, 'n_layer': n}).parameters()) for n in (1, 2)
        )
    parameters = one + (two - one) * (c['n_layer'] - 1)
    copies = {'training': 16 * (2 + bool(c['nanogpt'])), 'decode': 16, 'prefill': 16}
    needed = parameters * max([copies.get(job, 4) for job in jobs])
    if runtime.device_type == 'cuda':
        free = torch.cuda.mem_get_info(runtime.device)[0]
    elif hasattr(os, 'sysconf') and 'SC_AVPHYS_PAGES' in os.sysconf_names:
        free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        with contextlib.suppress(OSError):  # what the page cache holds can be had, too
            for row in Path('/proc/meminfo').read_text().splitlines():
                if row.startswith('MemAvailable'):
                    free = int(row.split()[1]) * 1024
    else:
        return
    if needed > free:
        raise UserError(
            f'{parameters / 1e6:,.0f}M parameters on all sides need {needed / 2**30:.0f} GiB and '
            f'{runtime.device} has {free / 2**30:.0f} GiB free; lower --n_layer or --n_embd'
        )


def main(c: dict) -> None:
    if c['compare']:
        return print(track.draw_runs(c['compare'].split(','), 'runs.png'))
    jobs = check(c)
    device = pick_device(c['device'])
    runtime = Runtime(device, pick_dtype(c['dtype'], device, training=True))
    c['device'] = runtime.device
    check_memory(c, runtime, jobs)
    report = Report(c, measure_machine(runtime))
    line('job', 'side', 'tokens/s, median (low to high)', '')
    try:
        if c['serve']:
            return bench_serving(c, runtime, report)
        if 'training' in jobs:
            bench_training(c, runtime, report)
        writing = [job for job in ('prefill', 'decode') if job in jobs]
        if writing:
            bench_writing(c, runtime, report, writing)
        others = {'quality': bench_quality, 'data': bench_data, 'startup': bench_startup}
        for job in [job for job in others if job in jobs]:
            others[job](c, runtime, report)
    finally:  # what was measured stays, whatever happened after it
        report.write()


if __name__ == '__main__':
    defaults = {name: globals()[name] for name in QUICK}
    config = configure(globals(), sys.argv[1:])
    if config['quick']:  # a shape that a config or a flag gives stays
        config |= {name: QUICK[name] for name in QUICK if config[name] == defaults[name]}
    main(config)
