"""
Load test of api.py: throughput and latency for many clients.

$ python bench.py --serve --block_size=1024

    with ServerProcess(run_folder, max_rows=16) as server:   # python api.py, a process of its own
        completions = closed_loop(server.address, bodies, clients=16)
        print(percentiles([completion.total for completion in completions]))

The server is a process of its own, and all clients are threads of this one. Their cost is part of
the figures.
"""

import http.client
import json
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from flatgpt import ROOT
from flatgpt.benchmarks.baselines import build_random_model, placeholder_tokenizer, random_prompts
from flatgpt.benchmarks.decoding import fast_format
from flatgpt.benchmarks.implementations import Implementation, Measurement, start_implementations
from flatgpt.benchmarks.report import Report, format_spread, print_row, summarize
from flatgpt.checkpoint.save import save_checkpoint
from flatgpt.errors import UserError, counted
from flatgpt.runtime import Runtime

TIMEOUT = 300  # seconds for a completion


@dataclass
class Completion:
    """The response to one request; times are in seconds after it was sent."""

    status: int = 0  # of HTTP; 0: the connection broke
    tokens: int = 0
    first: float = 0.0  # until the first event with text
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between events, each with one or more tokens


class ServerProcess:
    """python api.py on a free port, stopped at the end of the `with`."""

    def __init__(self, out_dir: Path, **settings):
        flags = [f'--{name}={value}' for name, value in settings.items()]
        command = [sys.executable, ROOT / 'api.py', f'--out_dir={out_dir}']
        self.errors = tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace')
        self.process = subprocess.Popen(
            [*map(str, command), '--port=0', *flags],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            encoding='utf-8',
        )

    def __enter__(self) -> 'ServerProcess':
        for text in self.process.stdout:
            if found := re.search(r'http://([\d.]+):(\d+)', text):
                self.address = found[1], int(found[2])
                return self
        status = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ['it printed no error'])[-1]
        raise UserError(f'serving: api.py exited with status {status}: {last}')

    def __exit__(self, *error) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.errors.close()


def request_completion(connection: http.client.HTTPConnection, body: dict) -> Completion:
    """POST /v1/completions, streamed if the body says so."""
    completion = Completion()
    begin = time.perf_counter()
    try:
        headers = {'Content-Type': 'application/json'}
        connection.request('POST', '/v1/completions', json.dumps(body).encode(), headers)
        reply = connection.getresponse()
        completion.status = reply.status
        if body.get('stream') and reply.status == 200:
            read_stream(reply, completion, begin)
        else:
            usage = json.loads(reply.read()).get('usage') or {}
            completion.tokens = usage.get('completion_tokens', 0)
    except (OSError, http.client.HTTPException, ValueError):
        connection.close()
        completion.status = 0
    completion.total = time.perf_counter() - begin
    return completion


def read_stream(reply: http.client.HTTPResponse, completion: Completion, begin: float) -> None:
    """Read server-sent events; status 0 for a stream that has an error or breaks off."""
    last, done = None, False
    for line in reply:
        now = time.perf_counter()
        done = done or line.startswith(b'data: [DONE]')
        if not line.startswith(b'data: {'):
            continue
        event = json.loads(line[6:])
        if event.get('usage'):
            completion.tokens = event['usage']['completion_tokens']
        elif 'error' in event:
            completion.status = 0
        elif last is None:
            completion.first, last = now - begin, now
        else:
            completion.gaps.append(now - last)
            last = now
    completion.status *= done


def closed_loop(address: tuple, bodies: list[dict], clients: int) -> list[Completion]:
    """`clients` that each send their next request when the previous one is complete."""
    left: queue.SimpleQueue = queue.SimpleQueue()
    for body in bodies:
        left.put(body)
    completions = []

    def client() -> None:
        connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
        while True:
            try:
                completions.append(request_completion(connection, left.get_nowait()))
            except queue.Empty:
                return connection.close()

    run_threads([client] * clients)
    return completions


def poisson_arrivals(address: tuple, bodies: list[dict], rate: float) -> list[Completion]:
    """Requests at random times, `rate` per second on average, however many are running."""
    generator, arrival = random.Random(0), 0.0
    completions, tasks = [], []
    begin = time.perf_counter()
    for body in bodies:
        arrival += generator.expovariate(rate)

        def client(body=body, arrival=arrival) -> None:
            time.sleep(max(0.0, begin + arrival - time.perf_counter()))
            connection = http.client.HTTPConnection(*address, timeout=TIMEOUT)
            completions.append(request_completion(connection, body))
            connection.close()

        tasks.append(client)
    run_threads(tasks)
    return completions


def run_threads(tasks: list) -> None:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class HealthProbe:
    """Requests /health repeatedly during the `with`; `seconds` has the time of each."""

    def __init__(self, address: tuple, pause: float = 0.02):
        self.address, self.pause = address, pause
        self.seconds: list[float] = []
        self.failed = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        connection = http.client.HTTPConnection(*self.address, timeout=TIMEOUT)
        while not self.done.wait(self.pause):
            begin = time.perf_counter()
            try:
                connection.request('GET', '/health')
                reply = connection.getresponse()
                reply.read()
                self.failed += reply.status != 200
            except (OSError, http.client.HTTPException):
                self.failed += 1
                connection.close()
            self.seconds.append(time.perf_counter() - begin)
        connection.close()

    def __enter__(self) -> 'HealthProbe':
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()


def percentiles(values: list[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile, by nearest rank."""
    ordered = sorted(values)
    rank = lambda share: ordered[max(0, -(-share * len(ordered) // 100) - 1)]  # noqa: E731
    return {f'p{share}': rank(share) for share in (50, 90, 99)} if ordered else {}


# -----------------------------------------------------------------------------
# bench.py --serve


def bench_serving(settings: dict, runtime: Runtime, report: Report) -> None:
    """Compare clients of api.py with the engine without HTTP, and with transformers."""
    kind, clients = settings['serve_format'], settings['clients']
    theirs = fast_format(runtime.device) if kind == 'int8' else kind
    names = [('flatGPT', kind), ('transformers', theirs)]
    flags = {'quantize': 'int8'} if kind == 'int8' else {'dtype': kind}
    flags |= {'device': runtime.device, 'max_rows': clients, 'max_queue': 1000}
    flags['draft'] = None  # greedy text of random weights soon repeats itself
    with (
        tempfile.TemporaryDirectory() as folder,
        start_implementations(names, settings, 'generation') as (ours, theirs),
        ServerProcess(save_random(Path(folder), settings), **flags) as server,
    ):
        bench_throughput(settings, report, server, ours, theirs)
        bench_lone_client(settings, report, server, ours)
        bench_latency(settings, report, server)
    tiny = {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'n_kv_head': None, 'vocab_size': 256}
    with tempfile.TemporaryDirectory() as folder:
        run = save_random(Path(folder), {**settings, **tiny})
        with ServerProcess(run, max_rows=clients) as server:
            bench_overhead(settings, report, server)


def save_random(folder: Path, settings: dict) -> Path:
    """A run directory with the same weights as the other implementations."""
    tokenizer = placeholder_tokenizer(settings['vocab_size'])
    save_checkpoint(
        folder, build_random_model(settings), [], tokenizer, {'step': 0}, keep_evaluated=False
    )
    return folder


def request_bodies(settings: dict, count: int, **fields) -> list[dict]:
    """Requests for greedy completions of the same prompts as the other implementations."""
    prompts = random_prompts(settings, count).tolist()
    common = {'max_tokens': settings['new_tokens'], 'temperature': 0, **fields}
    return [{'prompt': prompt, **common} for prompt in prompts]


def check_all_complete(completions: list[Completion]) -> None:
    if lost := [each for each in completions if each.status != 200 or not each.tokens]:
        raise UserError(
            f'serving: {len(lost)} of {len(completions)} requests failed; lower --clients'
        )


def timed_loop(server: ServerProcess, bodies: list[dict], clients: int) -> Measurement:
    """Measure a closed loop; UserError if a request failed."""
    begin = time.perf_counter()
    completions = closed_loop(server.address, bodies, clients)
    seconds = time.perf_counter() - begin
    check_all_complete(completions)
    return Measurement(seconds, {'tokens': sum(each.tokens for each in completions)})


def bench_throughput(
    settings: dict,
    report: Report,
    server: ServerProcess,
    ours: Implementation,
    theirs: Implementation,
) -> None:
    """Tokens per second of the same requests, by each implementation."""
    clients, count = settings['clients'], 4 * settings['clients']
    http_name, engine_name = f'{clients} clients, HTTP', f'{clients} clients, engine'
    bodies = request_bodies(settings, count)
    variants = {
        http_name: lambda: timed_loop(server, bodies, clients),
        engine_name: lambda: ours.measure('serve', clients, count),
        'transformers static': lambda: theirs.measure('generate', clients),
        'transformers continuous': lambda: theirs.measure('serve', clients),
    }
    speeds = {variant: [] for variant in variants}
    for number in range(settings['rounds'] + 1):
        for variant, run in variants.items():
            measurement = run()
            if number and measurement:
                speeds[variant].append(measurement.tokens_per_second)
    each = (
        f'{counted(count, "prompt")} of {settings["prompt_tokens"]}, '
        f'{counted(settings["new_tokens"], "token")} each'
    )
    notes = {
        http_name: f"api.py: {each}, each sent when the client's previous one is complete",
        engine_name: ours.failure or 'the same without HTTP',
        'transformers static': theirs.failure
        or f'generate() of {counted(clients, "prompt")} at once',
        'transformers continuous': theirs.failure
        or f'generate_batch() of {counted(clients, "prompt")} at once',
    }
    for variant, values in speeds.items():
        figures = format_spread(values, ',.0f') if values else ''
        print_row('serving', variant, figures, notes[variant])
        figures = {'tokens_per_second': summarize(values)} if values else {}
        if values and variant != http_name:
            pairs = zip(speeds[http_name], values, strict=True)
            ratios = [over_http / other for over_http, other in pairs]
            spread = format_spread(ratios, '.2f')
            print(f'{"":<16} {http_name} are {spread} times as fast', flush=True)
            figures['times as fast are clients over HTTP'] = summarize(ratios)
        report.add('serving', variant, notes[variant], **figures)


def bench_lone_client(
    settings: dict, report: Report, server: ServerProcess, ours: Implementation
) -> None:
    """One client of api.py, compared with generating as sample.py does."""
    shares, speeds = [], []
    for number in range(settings['rounds'] + 1):
        over_http = timed_loop(server, request_bodies(settings, 2), 1)
        alone = ours.measure('generate', 1)
        if number and alone:
            speeds.append(over_http.tokens_per_second)
            shares.append(speeds[-1] / alone.tokens_per_second)
    if ours.failure:
        raise UserError(f'serving: {ours.label}: {ours.failure}')
    note = f'{format_spread(shares, ".0%")} of the speed of sample.py'
    print_row('serving', 'one client, HTTP', format_spread(speeds, ',.0f'), note)
    figures = {'tokens_per_second': summarize(speeds), 'share of sample.py': summarize(shares)}
    report.add('serving', 'one client, HTTP', note, **figures)


def bench_latency(settings: dict, report: Report, server: ServerProcess) -> None:
    """Latency of streams: in a closed loop, at random times, and 64 at once."""
    clients = settings['clients']
    streamed = {'stream': True, 'stream_options': {'include_usage': True}}
    bodies = request_bodies(settings, 2 * clients, **streamed)
    begin = time.perf_counter()
    completions = closed_loop(server.address, bodies, clients)
    rate = 0.7 * len(completions) / (time.perf_counter() - begin)  # sustainable
    report_latency(report, f'{clients} streams', completions)
    completions = poisson_arrivals(server.address, bodies, rate)
    report_latency(report, f'Poisson {rate:.1f}/s', completions)
    with HealthProbe(server.address) as probe:
        bodies = request_bodies(settings, 64, **streamed)
        completions = closed_loop(server.address, bodies, 64)
    report_latency(report, '64 streams', completions)
    health = percentiles(probe.seconds)
    note = f'/health meanwhile: {format_milliseconds(health)}, {probe.failed} failed'
    print_row('serving', '64 streams', '', note)
    report.add('serving', '/health during 64 streams', note, seconds=health)


def report_latency(report: Report, variant: str, completions: list[Completion]) -> None:
    check_all_complete(completions)
    waits = {
        'to the first event': [each.first for each in completions],
        'between events': [gap for each in completions for gap in each.gaps],
        'between tokens, mean of a completion': [
            (each.total - each.first) / max(1, each.tokens - 1) for each in completions
        ],
        'to the end': [each.total for each in completions],
    }
    for what, seconds in waits.items():
        found = percentiles(seconds)
        print_row('serving', variant, format_milliseconds(found), what)
        report.add('serving', variant, what, seconds=found)


def format_milliseconds(found: dict[str, float]) -> str:
    return ', '.join(f'{name} {value * 1e3:,.0f} ms' for name, value in found.items())


def bench_overhead(settings: dict, report: Report, server: ServerProcess) -> None:
    """Completions of one token by a tiny model, whose time is mostly the server's overhead."""
    bodies = [{'prompt': [1, 2, 3], 'max_tokens': 1}] * 500
    rates = []
    for number in range(settings['rounds'] + 1):
        measurement = timed_loop(server, bodies, settings['clients'])
        if number:  # the first is a warm-up
            rates.append(len(bodies) / measurement.seconds)
    figures = format_spread(rates, ',.0f') + ' requests/s'
    print_row('serving', 'a tiny model', figures, 'completions of one token')
    report.add('serving', 'a tiny model', requests_per_second=summarize(rates))
