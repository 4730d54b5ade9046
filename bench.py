"""
Time this machine and this model beside others that do the same job; print a table, write JSON.

$ python bench.py                                     # GPT-2 124M: several minutes
$ python bench.py --quick                             # a minute, of a small model
$ python bench.py --only=decode --rows=1,16 --arch=modern
$ python bench.py train_shakespeare_char_cpu --vocab_size=65 --only=training --nanogpt=../nanoGPT
$ python bench.py --only=quality --out_dir=out/mine   # what 16 and 8 bits do to its perplexity
$ python bench.py --only=data --text=corpus/          # tokenizers, on your own files; reading
$ python bench.py --only=training --profile           # the slowest operators, and a trace
$ python bench.py --only=saving,processes             # what checkpoints and a second process cost
$ python bench.py --serve --block_size=1024           # api.py under load, beside transformers
$ python bench.py --task=lambada,cbt --out_dir=gpt2   # what a model knows, beside GPT-2's figures
$ python bench.py --compare=out/a,out/b               # the losses of runs in one picture, runs.png

Sides run in processes of their own, from the same weights, and take turns, so that a machine whose
speed drifts favours none. Figures are medians over the rounds, with the lowest and the highest. A
ratio is printed only between sides that did the same amount of work, and came to the same result
where that can be told: the loss before training, logits of a prompt, and tokens written in float32.
"""

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from json import dumps
from pathlib import Path

import numpy as np
import torch

import load
import track
from checkpoint import find, is_foreign, load_model, read_state, save
from configurator import UserError, configure, one_of, within
from data.dataset import SPLITS, Dataset, Writer, is_prepared, read_meta
from data.encode import cores
from data.text import prepare
from data.tokenizer import byte_tokenizer, char_tokenizer, get_tokenizer
from peers import (
    Side,
    build_model,
    import_nanogpt,
    in_format,
    opened,
    synchronize,
    transformers_model,
)
from report import Report, line, shown, spread
from runtime import DTYPES, Runtime, pick_device, pick_dtype
from scaling import bench_processes, bench_saving

# -----------------------------------------------------------------------------
# what is timed
only = (
    ''  # some of training,prefill,decode,quality,data,startup; saving,processes; empty: those six
)
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
# quality, the perplexity of a model in each format; and tasks, instead of all that
out_dir: str | None = None  # a run, or gpt2, owner/name, a folder of others
dataset: str | None = None  # to measure quality on; None: what the run was trained on
task = ''  # lambada,hellaswag,wikitext2,wikitext103,cbt,blimp or others of lm-evaluation-harness
limit: int | None = None  # examples of each task, the first ones; None: all
init_from = 'resume'  # tasks, without out_dir: the newest run, or as out_dir
checkpoint: str | None = None  # tasks: None or 'best', 'last', or a path
tokenizer: str | None = None  # tasks: for a model that came without
quantize: str | None = None  # tasks: 'int8' to see what it costs
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
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto: the fastest, but float32 for tasks
seed = 1337
# -----------------------------------------------------------------------------

TOKENS = 50_000_000  # to read batches from
JOBS = ('training', 'prefill', 'decode', 'quality', 'data', 'startup')
ASKED = ('saving', 'processes')  # only when they are named
SMALL = {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'vocab_size': 8192, 'n_kv_head': None}
QUICK = {**SMALL, 'rounds': 3, 'rows': '1,8', 'formats': 'bfloat16,int8', 'text_bytes': 5_000_000}


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
        model, tokenizer, state = load_model(c['out_dir'], 'best', runtime.device)
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
    for shards in (1, 100) if c['quick'] else (1, 100, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            turns = read_batches(cut_into(Path(folder), shards), c['rounds'])
        side, note = f'{shards:,} files', 'batches of 64 x 1,024, in time of one core'
        report.compare('data reading', {side: turns}, {side: note}, {})


def cut_into(folder: Path, shards: int) -> Dataset:
    """Random ids in so many files, without an fsync for each."""
    ids = np.random.default_rng(0).integers(0, 256, TOKENS // shards)
    with Writer(folder, byte_tokenizer()) as writer:
        for split in SPLITS:
            writer.write(split, ids)
    meta = read_meta(folder)
    names = [f'train-{n:05d}.bin' for n in range(shards)]
    for name in names:
        shutil.copyfile(folder / 'train.bin', folder / name)
    listed = [{'file': name, 'tokens': len(ids)} for name in names]
    meta['splits']['train'] = {'tokens': len(ids) * shards, 'bytes': None, 'shards': listed}
    (folder / 'meta.json').write_text(dumps(meta))
    return Dataset(folder, 1024)


def read_batches(data: Dataset, rounds: int) -> list[tuple[float, dict, int]]:
    turns = []
    for number in range(rounds + 1):
        begin = time.thread_time()
        for step in range(20):
            data.batch((20 * number + step) * 64, 64)
        turns.append((time.thread_time() - begin, {'tokens': 20 * 64 * 1024}, 0))
    return turns[1:]


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


def bench_tasks(c: dict) -> None:
    """What a model knows, by lm-evaluation-harness."""
    within(1, None, c, 'limit')
    check_writable(c)
    try:
        import harness
    except ModuleNotFoundError as error:
        raise UserError(f'task={c["task"]}: needs pip install "lm_eval>=0.4.13"') from error
    versions = {'torch': torch.__version__, 'lm_eval': importlib.metadata.version('lm_eval')}
    report = Report(c, {'device': pick_device(c['device']), **versions})
    try:
        harness.run(c, report.entries)
    finally:  # what was measured stays, whatever happened after it
        if report.entries:
            report.write()


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
        save(run, build_model(c), [], char_tokenizer(letters), {'step': 0}, keep_evaluated=False)
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
        one_of((*JOBS, *ASKED), {'only': job}, 'only')
    if 'quality' in jobs and not c['out_dir']:
        raise UserError('quality: needs --out_dir=RUN, a model that has learned something')
    jobs = jobs or [job for job in JOBS if job != 'quality' or c['out_dir']]
    if c['out_dir']:
        foreign = is_foreign(c['out_dir'])
        state = {} if foreign else read_state(find(c['out_dir']))
        dataset_of(state, c['dataset'])
    if c['text'] and not Path(c['text']).is_dir():
        raise UserError(f'text={c["text"]}: no such folder')
    check_writable(c)
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


def check_writable(c: dict) -> None:
    folder = Path(c['json']).parent
    if not folder.is_dir() or Path(c['json']).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f'json={c["json"]}: is no file that can be written')


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
    modes = [name for name in ('compare', 'task', 'serve', 'only') if c[name]]
    if len(modes) > 1:
        raise UserError(f'--{modes[0]} and --{modes[1]}: give one of them')
    if c['serve'] and c['out_dir']:
        raise UserError('--serve: times random weights of the shape given; leave out --out_dir')
    if c['compare'] is not None:
        return print(track.draw_runs(c['compare'].split(','), 'runs.png'))
    if c['task']:
        return bench_tasks(c)
    jobs = check(c)
    device = pick_device(c['device'])
    runtime = Runtime(device, pick_dtype(c['dtype'], device, training=True))
    c['device'] = runtime.device
    check_memory(c, runtime, jobs)
    report = Report(c, measure_machine(runtime))
    line('job', 'side', 'tokens/s, median (low to high)', '')
    try:
        if c['serve']:
            return load.bench_serving(c, runtime, report)
        if 'training' in jobs:
            bench_training(c, runtime, report)
        writing = [job for job in ('prefill', 'decode') if job in jobs]
        if writing:
            bench_writing(c, runtime, report, writing)
        others = {'quality': bench_quality, 'data': bench_data, 'startup': bench_startup}
        others |= {'saving': bench_saving, 'processes': bench_processes}
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
