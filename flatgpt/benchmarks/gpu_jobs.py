"""
The jobs of gpu_day.py, each in a process of its own; a row is a line that print_row() writes.

Training is measured as a user would: by running train.py and bench.py and reading their files.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from flatgpt import ROOT
from flatgpt.benchmarks.baselines import (
    build_random_model,
    placeholder_tokenizer,
    random_prompts,
    transformers_model,
)
from flatgpt.benchmarks.gpu_day import (
    BELOW,
    FAILED,
    MEASURED,
    NO_GPU,
    NOT_COMPARABLE,
    PASSED,
    PLAN_TOTAL,
    RESULT,
    SKIPPED,
    WRONG_NUMBERS,
    last_error,
)
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import char_tokenizer, get_tokenizer
from flatgpt.errors import reason_of
from flatgpt.inference.engine import Engine
from flatgpt.inference.kv_cache import KVCache
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import SamplingParams
from flatgpt.runtime import code_hash, pick_dtype, synchronize
from model import GPT

GPT2 = {  # 124M parameters
    'block_size': 1024,
    'vocab_size': 50304,
    'n_layer': 12,
    'n_head': 12,
    'n_embd': 768,
    'n_kv_head': None,
    'dropout': 0.0,
    'bias': False,
    'seed': 1337,
}
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 256, 3
STEPS, LOG_INTERVAL = 50, 10  # of train.py, each of one micro-batch
TRAIN = f"""--gradient_accumulation_steps=1 --block_size=1024 --max_iters={STEPS} --warmup_iters=10
--lr_decay_iters=None --log_interval={LOG_INTERVAL} --eval_interval=None --eval_iters=1
--eval_train=False --sample_tokens=0 --compile=True""".split()
TARGET_LOSS = 1.4697  # the best in nanoGPT's README
SPEEDRUN_BAR, SPEEDRUN_GOAL = 20, 8  # seconds
MFU_BAR, MFU_GOAL = 0.5, 0.6  # on an H100 or H200
NANOGPT_BAR, NANOGPT_GOAL = 1.15, 1.3  # times as fast
DECODE_BAR = 5  # times as fast as generate()
PLAN_TOLERANCE = 0.15
ANY_ERROR = re.compile('')  # of --plan, whose table says what is wrong
WITH_PEAK = """
import atexit, runpy, sys, torch
atexit.register(lambda: print('peak', torch.cuda.max_memory_allocated(), 'bytes', flush=True))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# (GB of GPU memory, at least; the micro-batch of GPT-2 124M for it)
MICRO_BATCHES = ((40, 12), (20, 4), (0, 2))


# -----------------------------------------------------------------------------
# rows


def print_row(row: str, status: str, result: str, bar: str = '', **more) -> None:
    values = {'row': row, 'status': status, 'result': result, 'bar': bar, **more}
    print(RESULT + json.dumps(values), flush=True)


class Rows:
    """Reports rows, without the numbers of a device that does not compute, such as a stub of the
    CUDA libraries."""

    def __init__(self, computes: bool):
        self.computes = computes

    def measured(self, row: str, result: str, **more) -> None:
        if not self.computes:
            return self.ran(row)
        print_row(row, MEASURED, result, **more)

    def compare(self, row: str, is_good: bool, result: str, bar: str = '') -> None:
        """A number, which may have a bar or must equal another one."""
        if not self.computes:
            return self.ran(row)
        print_row(row, PASSED if is_good else BELOW if bar else FAILED, result, bar)

    def ran(self, row: str, counted: str = '') -> None:
        """counted: what counts even on a device that does not compute, such as peak memory."""
        result = 'it ran, but this device does not compute'
        print_row(row, NOT_COMPARABLE, f'{result}; {counted}' if counted else result)


# -----------------------------------------------------------------------------
# correctness


def arithmetic(options: dict, rows: Rows) -> None:
    """Whether the device computes: without that, no number below means anything."""
    if not torch.cuda.is_available():
        why = f'torch {torch.__version__} finds no CUDA GPU'
        return print_row('arithmetic', FAILED, why, machine={'GPU': NO_GPU})
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    apart = ((a.cuda() @ b.cuda()).cpu() - a @ b).abs().max().item()
    status = PASSED if apart < 1e-3 else NOT_COMPARABLE
    result = f'a product of matrices is {apart:.1e} from the CPU'
    result += '' if status == PASSED else ': this device does not compute'
    print_row('arithmetic', status, result, machine=describe_machine())


def describe_machine() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    return {
        'GPU': f'{torch.cuda.device_count()} x {properties.name}, '
        f'{properties.total_memory / 2**30:.0f} GiB',
        'driver': driver_version(),
        'versions': f'torch {torch.__version__}, transformers {version_of("transformers")}, '
        f'numpy {version_of("numpy")}, Python {platform.python_version()}',
        'processor': f'{os.cpu_count()} cores',
        'source': code_hash(),
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def driver_version() -> str:
    try:
        text = Path('/proc/driver/nvidia/version').read_text()
        return re.search(r'\d+\.\d+[.\d]*', text)[0]
    except (OSError, TypeError):
        return 'unknown'


def tests(options: dict, rows: Rows) -> None:
    """The requested functions of tests/test_gpu.py."""
    torch.set_num_threads(1)  # more threads are slower for tiny models
    module = runpy.run_path(str(ROOT / 'tests' / 'test_gpu.py'))
    if len(options['rows']) == len([name for name in module if name.startswith('test_')]):
        module['start_runs']()
    for name in options['rows']:
        run_test(name, module[name], rows, name not in module['WITHOUT_NUMBERS'])


def run_test(name: str, test: Callable[[], None], rows: Rows, has_numbers: bool) -> None:
    """Report a test. has_numbers: whether it compares what a device computed."""
    written, real = LastLine(sys.stdout), sys.stdout
    sys.stdout = written
    try:
        test()
        error = None
    except Exception as caught:
        traceback.print_exc()
        error = caught
    finally:
        sys.stdout = real
    if error is None and not has_numbers:
        return print_row(name, PASSED, written.last)
    if error is None:
        return rows.compare(name, True, written.last)
    text, compared = reason_of(error), isinstance(error, AssertionError)
    if not rows.computes and WRONG_NUMBERS.search(text):
        return print_row(name, NOT_COMPARABLE, f'stopped by a number that is wrong: {text}')
    if not rows.computes and compared and has_numbers:
        return rows.ran(name)
    print_row(name, FAILED, text)
    if 'CUDA error' in str(error):  # every later call would fail: another process does the rest
        sys.stdout.flush()
        os._exit(1)


class LastLine:
    """A stream that remembers the last line."""

    def __init__(self, stream):
        self.stream, self.last = stream, ''

    def write(self, text: str) -> None:
        self.last = text.strip() or self.last
        self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


# -----------------------------------------------------------------------------
# the speedrun


def speedrun(options: dict, rows: Rows) -> None:
    run_speedrun('speedrun', options, rows)


def speedrun_eager(options: dict, rows: Rows) -> None:
    run_speedrun('speedrun without torch.compile', options, rows, '--compile=False')


def run_speedrun(row: str, options: dict, rows: Rows, *flags: str) -> None:
    if options['text'] is None:
        return print_row(row, SKIPPED, 'needs --data=DIR with input.txt')
    with tempfile.TemporaryDirectory() as folder:
        text = Path(options['text']).read_bytes().decode()
        write_dataset(Path(folder) / 'text', char_tokenizer(sorted(set(text))), text)
        config = str(ROOT / 'config' / 'speedrun_shakespeare_char_gpu.py')
        out_dir = Path(folder) / 'run'
        begin = time.perf_counter()
        data = (f'--dataset={folder}/text', f'--out_dir={out_dir}', '--log_interval=1')
        printed = run_train(config, *data, *flags, rows=rows)
        whole = time.perf_counter() - begin
        lines = read_log(out_dir)
    if not rows.computes:
        return rows.ran(row, f'{len(lines)} steps, {peak_memory(printed) / 1e9:.1f} GB')
    *steps, end = lines  # the last line is that of the evaluation
    step_seconds = (steps[-1]['seconds'] - steps[0]['seconds']) / (len(steps) - 1)
    # the first step also compiles Muon's kernels; its own time is taken to be the others' mean
    compiling = steps[0]['seconds'] - step_seconds
    loss, seconds = end['val_loss'], end['seconds'] - compiling
    result = (
        f'loss {loss:.4f} in {seconds:.1f} s from the first step to the end of the evaluation; '
        f'compiling before it {compiling:.1f} s, the whole command {whole:.1f} s'
    )
    reached = loss <= TARGET_LOSS and seconds <= SPEEDRUN_BAR
    if reached and seconds <= SPEEDRUN_GOAL:
        result += '; goal reached'
    bar = f'loss {TARGET_LOSS}, {SPEEDRUN_BAR} s; goal {SPEEDRUN_GOAL} s'
    rows.compare(row, reached, result, bar)


def write_dataset(folder: Path, tokenizer, text: str) -> None:
    border = int(len(text) * 0.9)
    with Writer(folder, tokenizer) as writer:
        writer.write('train', tokenizer.encode(text[:border]))
        writer.write('val', tokenizer.encode(text[border:]))


def run_train(*arguments: str, rows: Rows) -> str:
    """The output of train.py and the allocator's peak, which is printed even if the run fails."""
    expected = None if rows.computes else WRONG_NUMBERS
    return run_script('-c', WITH_PEAK, 'train.py', *arguments, expected=expected)


def run_script(*command: str, expected: re.Pattern | None = None) -> str:
    """The output of a script. SystemExit if it fails, unless its error is an expected one."""
    command = [sys.executable, *command]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, **pipes, encoding='utf-8', errors='replace')
    print(done.stdout, flush=True)
    error = last_error(done.stdout)
    if done.returncode and not (expected and expected.search(error)):
        print(f'exit status {done.returncode}: {error}')
        raise SystemExit(1)
    return done.stdout


def read_log(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]


# -----------------------------------------------------------------------------
# training GPT-2 124M


def gpt2(options: dict, rows: Rows) -> None:
    run_124m('gpt2', options, rows, micro_batch())


def modern(options: dict, rows: Rows) -> None:
    run_124m('modern', options, rows, micro_batch(), *MODERN_FLAGS)


MODERN_FLAGS = ('--arch=modern', '--n_head=6', '--optimizer=muon', '--learning_rate=4e-3')


def batch_32(options: dict, rows: Rows) -> None:
    run_micro_batch(options, rows, 32)


def batch_48(options: dict, rows: Rows) -> None:
    run_micro_batch(options, rows, 48)


def run_micro_batch(options: dict, rows: Rows, size: int) -> None:
    row = f'gpt2, micro-batch {size}'
    with tempfile.TemporaryDirectory() as folder:
        flags = train_flags(options, Path(folder), size)
        plan = run_script('train.py', *flags, '--plan', expected=ANY_ERROR)
        if 'does not fit' in plan:
            return print_row(row, SKIPPED, re.search(r'does not fit.*', plan)[0])
        printed = run_train(*flags, rows=rows)
        peak = f'{peak_memory(printed) / 1e9:.1f} GB'
        if not rows.computes:
            return rows.ran(row, peak)
        rows.measured(row, f'{speed_of(read_log(Path(folder) / "run"))[0]}, {peak}')


def run_124m(arch: str, options: dict, rows: Rows, size: int, *flags: str) -> None:
    """Training as a user starts it; its speed, and its peak memory next to --plan."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*train_flags(options, Path(folder), size), *flags]
        printed = run_train(*flags, rows=rows)
        lines = read_log(Path(folder) / 'run') if rows.computes else []
        plan = run_script('train.py', *flags, '--plan', expected=ANY_ERROR)
    peak = f'{size} x 1,024, {peak_memory(printed) / 1e9:.1f} GB'
    if rows.computes:
        report_speed(f'train {arch}', lines, peak, rows)
    else:
        rows.ran(f'train {arch}', peak)
    compare_plan(arch, plan, printed)


def report_speed(row: str, lines: list[dict], peak: str, rows: Rows) -> None:
    text, mfu = speed_of(lines)
    if not re.search('H100|H200', torch.cuda.get_device_name()):
        return rows.measured(row, f'{text}; {peak}')
    bar = f'MFU {MFU_BAR:.0%}; goal {MFU_GOAL:.0%}'
    rows.compare(row, mfu >= MFU_BAR, f'{text}; {peak}', bar)


def micro_batch() -> int:
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    return next(size for least, size in MICRO_BATCHES if total >= least)


def train_flags(options: dict, folder: Path, size: int) -> list[str]:
    make_124m_dataset(options, folder / 'tokens')
    data = [f'--dataset={folder}/tokens', f'--out_dir={folder}/run', f'--batch_size={size}']
    return [*TRAIN, *data]


def make_124m_dataset(options: dict, folder: Path) -> None:
    """Shakespeare in GPT-2's tokens; without the vocabulary or tiktoken, random tokens."""
    if options['text'] and options['vocabulary'] and find_spec('tiktoken'):
        text = Path(options['text']).read_text(encoding='utf-8')
        return write_dataset(folder, get_tokenizer('gpt2'), text)
    print('training on random tokens')
    ids = torch.randint(50257, (300_000,), generator=torch.Generator().manual_seed(0)).numpy()
    with Writer(folder, placeholder_tokenizer(50257)) as writer:
        writer.write('train', ids[:270_000])
        writer.write('val', ids[270_000:])


def speed_of(lines: list[dict]) -> tuple[str, float]:
    """Tokens/s and MFU as text, and the MFU; without the first steps, which are slower."""
    steady = [line for line in lines if line['step'] > LOG_INTERVAL and 'mfu' in line]
    if not steady:
        return 'MFU unknown: train.py does not know the peak of this GPU', math.nan
    tokens, mfu = (statistics.median(line[k] for line in steady) for k in ('tokens_per_s', 'mfu'))
    return f'{tokens:,.0f} tokens/s, MFU {mfu:.1%}', mfu


def peak_memory(printed: str) -> float:
    """The allocator's peak in bytes, as WITH_PEAK prints it."""
    return float(re.search(r'^peak (\d+) bytes', printed, re.MULTILINE)[1])


def compare_plan(arch: str, plan: str, printed: str) -> None:
    """--plan next to the allocator's peak, which counts even on a device that does not compute."""
    planned = re.search(PLAN_TOTAL, plan)
    if not planned:
        return print_row(f'plan {arch}', FAILED, plan.strip().splitlines()[-1][:200])
    planned, peak = float(planned[1].replace(',', '')), peak_memory(printed) / 1e6
    result = f'plan {planned:,.0f} MB, peak {peak:,.0f} MB: {peak / planned - 1:+.0%}'
    status = PASSED if abs(peak / planned - 1) <= PLAN_TOLERANCE else BELOW
    print_row(f'plan {arch}', status, result, f'{PLAN_TOLERANCE:.0%}')


def saving(options: dict, rows: Rows) -> None:
    """bench.py's checkpoint of the 124M model and its AdamW."""
    (entry,) = bench('--only=saving', '--rounds=2')
    rows.measured('saving', f'{entry["seconds"]["median"]:.1f} s, {entry["note"]}')


def bench(*flags: str) -> list[dict]:
    """The results that bench.py writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'bench.json'
        run_script('bench.py', *flags, f'--json={path}')
        return json.loads(path.read_text())['results']


# --- compared with other programs


def compare_gpt2(options: dict, rows: Rows) -> None:
    flags = [f'--nanogpt={options["nanogpt"]}'] if options['nanogpt'] else []
    results = bench_training(*flags)
    report_ratio('gpt2 vs transformers', 'transformers', results, rows)
    row = 'gpt2 vs nanoGPT'
    if not options['nanogpt']:
        return print_row(row, SKIPPED, 'needs --nanogpt=DIR')
    bar = f'{NANOGPT_BAR} times; goal {NANOGPT_GOAL} times'
    report_ratio(row, 'nanoGPT', results, rows, NANOGPT_BAR, bar)


def compare_modern(options: dict, rows: Rows) -> None:
    results = bench_training('--arch=modern', '--n_head=6')
    report_ratio('modern vs transformers', 'transformers', results, rows)


def bench_training(*flags: str) -> dict[str, dict]:
    """bench.py's result for each program."""
    fixed = ('--only=training', '--block_size=1024', '--rounds=3', '--steps=10')
    results = bench(*fixed, f'--batch_size={micro_batch()}', *flags)
    return {entry['side']: entry for entry in results}


def report_ratio(
    row: str, side: str, results: dict, rows: Rows, least: float = 0.0, bar: str = ''
) -> None:
    ours, other = results['flatGPT'], results[side]
    for name, entry in (('flatGPT', ours), (side, other)):
        if 'tokens_per_second' not in entry:
            return print_row(row, FAILED, f'{name}: {entry["note"]}')
    ratio = other.get('times as fast is flatGPT')
    result = ', '.join(
        f'{name} {entry["tokens_per_second"]["median"]:,.0f} tokens/s ({entry["note"]})'
        for name, entry in (('flatGPT', ours), (side, other))
    )
    if ratio is None:
        return rows.compare(row, False, f'no ratio, the results differ: {result}')
    times = f'{ratio["median"]:.2f} times ({ratio["low"]:.2f} to {ratio["high"]:.2f}); '
    if not bar:
        return rows.measured(row, times + result)
    rows.compare(row, ratio['median'] >= least, times + result, bar)


# -----------------------------------------------------------------------------
# decoding and prefill of GPT-2 124M, one sequence


def settings_of_124m() -> dict:
    return {**GPT2, 'arch': 'gpt2', 'device': 'cuda', 'prompt_tokens': PROMPT_TOKENS}


def model_of_124m(device: str, dtype: torch.dtype) -> GPT:
    model = build_random_model(settings_of_124m()).to(dtype).to(device).eval()
    return prepare_for_inference(model, None)


def prompt() -> list[int]:
    return random_prompts(settings_of_124m(), 1)[0].tolist()


class OurEngine:
    """An engine that completes one prompt again and again, as a server or a console does."""

    def __init__(self, device: str, dtype: torch.dtype):
        model = model_of_124m(device, dtype)
        tokenizer = placeholder_tokenizer(GPT2['vocab_size'])
        self.engine = Engine(model, tokenizer, 1, max_length=PROMPT_TOKENS + NEW_TOKENS)

    def complete(self) -> list[int]:
        tokens = []
        sampling = SamplingParams(NEW_TOKENS, temperature=0)
        on_token = lambda output: tokens.append(output.token)  # noqa: E731
        self.engine.submit(Request(prompt(), sampling, on_token))
        while self.engine.step():
            pass
        return tokens


class TheirGenerate:
    """generate() of transformers, with its dynamic cache or a static one."""

    def __init__(self, dtype: torch.dtype, **options):
        self.model = transformers_model(settings_of_124m()).to(dtype).eval()
        self.options = {'max_new_tokens': NEW_TOKENS, 'min_new_tokens': NEW_TOKENS, **options}

    @torch.inference_mode()
    def complete(self) -> list[int]:
        ids = torch.tensor([prompt()], device='cuda')
        mask, greedy = torch.ones_like(ids), {'do_sample': False, 'pad_token_id': 0}
        output = self.model.generate(ids, attention_mask=mask, **greedy, **self.options)
        return output[0, PROMPT_TOKENS:].tolist()


def time_in_turns(*runs: Callable) -> list[list[float]]:
    """Seconds of each in ROUNDS rounds, after two rounds of warm-up."""
    seconds = [[] for _ in runs]
    for number in range(ROUNDS + 2):
        for run, own in zip(runs, seconds, strict=True):
            synchronize('cuda')
            begin = time.perf_counter()
            run()
            synchronize('cuda')
            own.append(time.perf_counter() - begin)
            print(f'round {number}: {own[-1]:.3f} s')
    return [own[2:] for own in seconds]


def compare_decoding(
    row: str, theirs: TheirGenerate, ours: OurEngine, rows: Rows, least: float
) -> None:
    if not rows.computes:  # their generate() would never end: it tests a value on the device
        return rows.ran(row, f'{len(ours.complete())} tokens')
    for side in (ours, theirs):
        if len(side.complete()) != NEW_TOKENS:
            raise RuntimeError('a text ended early: the logits are not finite')
    mine, its = map(statistics.median, time_in_turns(ours.complete, theirs.complete))
    result = (
        f'{its / mine:.2f} times: {NEW_TOKENS / mine:,.0f} tokens/s and {NEW_TOKENS / its:,.0f} '
        f'tokens/s, {PROMPT_TOKENS} tokens of prompt and {NEW_TOKENS} new'
    )
    if not least:
        return rows.measured(row, result)
    rows.compare(row, its >= least * mine, result, f'{least} times')


def decode(options: dict, rows: Rows) -> None:
    dtype = pick_dtype('auto', 'cuda')
    compare_decoding('decode', TheirGenerate(dtype), OurEngine('cuda', dtype), rows, DECODE_BAR)
    expected, found = (OurEngine(device, torch.float32).complete() for device in ('cpu', 'cuda'))
    equal = next(
        (i for i, pair in enumerate(zip(expected, found, strict=True)) if len({*pair}) > 1), 0
    )
    same = found == expected
    result = 'as on the CPU in float32' if same else f'differ from the CPU after {equal}'
    rows.compare('greedy tokens', same, f'{NEW_TOKENS} tokens: {result}')


def decode_static(options: dict, rows: Rows) -> None:
    dtype = pick_dtype('auto', 'cuda')
    static = TheirGenerate(dtype, cache_implementation='static')  # which transformers compiles
    compare_decoding('decode vs a static cache', static, OurEngine('cuda', dtype), rows, 0)


def prefill(options: dict, rows: Rows) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = pick_dtype('auto', 'cuda')
    model, other = model_of_124m('cuda', dtype), TheirGenerate(dtype).model
    ids = torch.randint(50257, (1, 1024), generator=torch.Generator().manual_seed(0)).cuda()

    @torch.inference_mode()
    def ours():
        return model(ids, cache=KVCache(model, 1, 1025))[0]

    @torch.inference_mode()
    def theirs():
        return other(ids, use_cache=True, logits_to_keep=1).logits

    mine, its = map(statistics.median, time_in_turns(ours, theirs))
    result = f'{its / mine:.2f} times: {mine * 1e3:.2f} and {its * 1e3:.2f} ms for 1,024 tokens'
    rows.measured('prefill vs transformers', result)
    found = []
    for name, backend in (
        ('flash', SDPBackend.FLASH_ATTENTION),
        ('cuDNN', SDPBackend.CUDNN_ATTENTION),
        ('memory-efficient', SDPBackend.EFFICIENT_ATTENTION),
    ):
        try:
            with sdpa_kernel(backend):
                found.append(f'{name} {statistics.median(time_in_turns(ours)[0]) * 1e3:.2f} ms')
        except RuntimeError as error:
            found.append(f'{name} is not available ({str(error).partition(chr(10))[0][:60]})')
    rows.measured('flash vs cuDNN', ', '.join(found))


# -----------------------------------------------------------------------------
# two GPUs


def ddp(options: dict, rows: Rows) -> None:
    """Tokens/s and peak of two processes with and without gradient_as_bucket_view."""
    row = 'gradient_as_bucket_view'
    if torch.cuda.device_count() < 2:
        return print_row(row, SKIPPED, 'needs two GPUs')
    launch = '-m torch.distributed.run --standalone --nproc_per_node=2 -m'.split()
    command = [
        sys.executable,
        *launch,
        'flatgpt.benchmarks.gpu_jobs',
        'ddp_rank',
        '{"computes": 0}',
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout)
    rows.measured(row, ', '.join(re.findall(r'^bucket view .*', done.stdout, re.MULTILINE)))


def ddp_rank(options: dict, rows: Rows) -> None:
    """One of two processes: GPT-2 124M under DDP."""
    from flatgpt.runtime import init_runtime

    runtime = init_runtime('cuda', 'auto')
    x = torch.randint(50257, (micro_batch(), 1024), device=runtime.device)
    for view in (False, True):
        torch.cuda.reset_peak_memory_stats()
        model = build_random_model(settings_of_124m()).to(runtime.device)
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
        adamw = torch.optim.AdamW(model.parameters(), fused=True)
        for step in range(12):
            if step == 2:
                synchronize(runtime.device)
                begin = time.perf_counter()
            with runtime.autocast():
                loss = model(x, x)[1]
            loss.backward()
            adamw.step()
            adamw.zero_grad(set_to_none=True)
        synchronize(runtime.device)
        speed = 2 * 10 * x.numel() / (time.perf_counter() - begin)
        memory = runtime.peak_memory() / 1e9
        runtime.print0(f'bucket view {view}: {speed:,.0f} tokens/s, {memory:.1f} GB')
        del model, adamw, loss
    runtime.exit()


if __name__ == '__main__':
    # at the time limit: end through the `with` blocks, which remove their folders
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    name, given = sys.argv[1], json.loads(sys.argv[2])
    globals()[name](given, Rows(given['computes']))
