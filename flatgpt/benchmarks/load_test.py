"""
api.py under load: clients that ask for texts as people and programs do, and what they see of it.

    with Server(run_folder, max_rows=16) as server:          # python api.py, a process of its own
        answers = closed_loop(server.address, bodies, clients=16)
        print(percentiles([answer.total for answer in answers]))

The server's own process is one, and all clients are threads of this one: what they cost is part of
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
from flatgpt.benchmarks.baselines import Side, build_model, opened, prompts_of
from flatgpt.benchmarks.report import Report, line, shown, spread
from flatgpt.checkpoint.save import save
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime

PATIENCE = 300  # seconds for an answer, or for the server to be ready


@dataclass
class Answer:
    """What one request came to; moments are in seconds after it was sent."""

    status: int = 0  # of HTTP; 0: the connection broke
    tokens: int = 0
    first: float = 0.0  # to the first frame with text
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between frames, which may hold several tokens


class Server:
    """python api.py on a port of its own choice, ended with the `with`."""

    def __init__(self, out_dir: Path, **settings):
        flags = [f'--{name}={value}' for name, value in settings.items()]
        command = [sys.executable, ROOT / 'api.py', f'--out_dir={out_dir}']
        self.process = subprocess.Popen(
            [*map(str, command), '--port=0', *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding='utf-8',
        )

    def __enter__(self) -> 'Server':
        for text in self.process.stdout:
            if found := re.search(r'http://([\d.]+):(\d+)', text):
                self.address = found[1], int(found[2])
                return self
        raise UserError(f'api.py ended with status {self.process.wait()} before it served')

    def __exit__(self, *error) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def ask(connection: http.client.HTTPConnection, body: dict) -> Answer:
    """POST /v1/completions, streamed if the body says so."""
    answer, begin = Answer(), time.perf_counter()
    try:
        content, headers = json.dumps(body).encode(), {'Content-Type': 'application/json'}
        connection.request('POST', '/v1/completions', content, headers)
        reply = connection.getresponse()
        answer.status = reply.status
        if body.get('stream') and reply.status == 200:
            read_stream(reply, answer, begin)
        else:
            usage = json.loads(reply.read()).get('usage') or {}
            answer.tokens = usage.get('completion_tokens', 0)
    except (OSError, http.client.HTTPException, ValueError):
        connection.close()
        answer.status = 0
    answer.total = time.perf_counter() - begin
    return answer


def read_stream(reply: http.client.HTTPResponse, answer: Answer, begin: float) -> None:
    last, whole = None, False
    for text in reply:
        now, whole = time.perf_counter(), whole or text.startswith(b'data: [DONE]')
        if not text.startswith(b'data: {'):
            continue
        frame = json.loads(text[6:])
        if frame.get('usage'):
            answer.tokens = frame['usage']['completion_tokens']
        elif 'error' in frame:
            answer.status = 0
        elif last is None:
            answer.first, last = now - begin, now
        else:
            answer.gaps.append(now - last)
            last = now
    answer.status *= whole


def closed_loop(address: tuple, bodies: list[dict], clients: int) -> list[Answer]:
    """Each of `clients` sends its next request when it has its answer, until all are answered."""
    left: queue.SimpleQueue = queue.SimpleQueue()
    for body in bodies:
        left.put(body)
    answers = []

    def client() -> None:
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
        while True:
            try:
                answers.append(ask(connection, left.get_nowait()))
            except queue.Empty:
                return connection.close()

    together([client] * clients)
    return answers


def poisson(address: tuple, bodies: list[dict], rate: float, seed: int = 0) -> list[Answer]:
    """Requests that come at random, `rate` a second on average, whatever became of those before."""
    draw, answers, moment = random.Random(seed), [], 0.0
    begin, tasks = time.perf_counter(), []
    for body in bodies:
        moment += draw.expovariate(rate)

        def client(body=body, moment=moment) -> None:
            time.sleep(max(0.0, begin + moment - time.perf_counter()))
            connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
            answers.append(ask(connection, body))
            connection.close()

        tasks.append(client)
    together(tasks)
    return answers


def together(tasks: list) -> None:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Prober:
    """Asks for /health again and again while the `with` lasts; `seconds` has how long each took."""

    def __init__(self, address: tuple, pause: float = 0.02):
        self.address, self.pause, self.seconds, self.failed = address, pause, [], 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
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

    def __enter__(self) -> 'Prober':
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.done.set()
        self.thread.join()


def percentiles(values: list[float]) -> dict[str, float]:
    """The 50th, 90th and 99th, by the nearest rank."""
    ordered = sorted(values)
    rank = lambda share: ordered[max(0, -(-share * len(ordered) // 100) - 1)]  # noqa: E731
    return {f'p{share}': rank(share) for share in (50, 90, 99)} if ordered else {}


# -----------------------------------------------------------------------------
# what bench.py --serve measures


def bench_serving(c: dict, runtime: Runtime, report: Report) -> None:
    """Clients of api.py beside the engine without HTTP, and beside transformers without either."""
    kind, clients = c['serve_format'], c['clients']
    names = [('flatGPT', kind), ('transformers', kind.replace('int8', 'bfloat16'))]
    with tempfile.TemporaryDirectory() as folder, opened(names, c, 'writing') as (ours, theirs):
        run = save_random(Path(folder), c)
        flags = {'quantize': 'int8'} if kind == 'int8' else {'dtype': kind}
        flags |= {'device': runtime.device, 'max_rows': clients, 'max_queue': 1000}
        with Server(run, **flags) as server:
            bench_throughput(c, report, server, ours, theirs)
            bench_lone_client(c, report, server, ours)
            bench_latency(c, report, server)
    with tempfile.TemporaryDirectory() as folder:
        small = {**c, 'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'n_kv_head': None, 'vocab_size': 256}
        with Server(save_random(Path(folder), small), max_rows=clients) as server:
            bench_plumbing(small, report, server)


def save_random(folder: Path, c: dict) -> Path:
    """A run's folder with the weights that all sides have."""
    letters = char_tokenizer([chr(0x10000 + i) for i in range(c['vocab_size'])])
    save(folder, build_model(c), [], letters, {'step': 0}, keep_evaluated=False)
    return folder


def bodies(c: dict, count: int, **fields) -> list[dict]:
    """Requests for greedy texts after the same prompts that the other sides get."""
    prompts = prompts_of(c, count).tolist()
    common = {'max_tokens': c['new_tokens'], 'temperature': 0, **fields}
    return [{'prompt': prompt, **common} for prompt in prompts]


def asked(answers: list[Answer], seconds: float) -> tuple[float, dict, int]:
    """What clients got, as a turn; UserError if one of them got nothing."""
    if lost := [answer for answer in answers if answer.status != 200 or not answer.tokens]:
        raise UserError(f'serving: {len(lost)} of {len(answers)} requests failed')
    return seconds, {'tokens': sum(answer.tokens for answer in answers), 'result': []}, 0


def bench_throughput(c: dict, report: Report, server: Server, ours: Side, theirs: Side):
    """Tokens per second over the same requests, for each way to have them answered."""
    clients, count = c['clients'], 4 * c['clients']
    http, alone = f'{clients} clients, HTTP', f'{clients} clients, engine'
    static, batched = 'transformers static', 'transformers continuous'
    turns = {side: [] for side in (http, alone, static, batched)}
    for number in range(c['rounds'] + 1):
        begin = time.perf_counter()
        answers = closed_loop(server.address, bodies(c, count), clients)
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


def bench_lone_client(c: dict, report: Report, server: Server, ours: Side) -> None:
    """One client against sample.py's way to write one text."""
    shares, speeds = [], []
    for number in range(c['rounds'] + 1):
        begin = time.perf_counter()
        answers = closed_loop(server.address, bodies(c, 2), 1)
        seconds, work, _ = asked(answers, time.perf_counter() - begin)
        alone, done, _ = ours.turn('whole', 1)
        if number:
            speeds.append(work['tokens'] / seconds)
            shares.append(speeds[-1] / (done['tokens'] / alone))
    note = f'{shown(shares, ".0%")} of what sample.py writes by itself'
    line('serving', 'one client, HTTP', shown(speeds, ',.0f'), note)
    figures = {'tokens_per_second': spread(speeds), 'share of sample.py': spread(shares)}
    report.add('serving', 'one client, HTTP', note, **figures)


def bench_latency(c: dict, report: Report, server: Server) -> None:
    """What streaming clients wait for: in a closed loop, at random moments, and 64 at once."""
    streamed = {'stream': True, 'stream_options': {'include_usage': True}}
    clients = c['clients']
    begin = time.perf_counter()
    answers = closed_loop(server.address, bodies(c, 2 * clients, **streamed), clients)
    rate = len(answers) / (time.perf_counter() - begin)
    latency_lines(report, f'{clients} streams', answers)
    answers = poisson(server.address, bodies(c, 2 * clients, **streamed), 0.7 * rate)
    latency_lines(report, f'Poisson {0.7 * rate:.1f}/s', answers)
    with Prober(server.address) as prober:
        answers = closed_loop(server.address, bodies(c, 64, **streamed), 64)
    latency_lines(report, '64 streams', answers)
    health = percentiles(prober.seconds)
    note = f'/health meanwhile: {in_milliseconds(health)}, {prober.failed} failed'
    line('serving', '64 streams', '', note)
    report.add('serving', '/health beside 64 streams', note, seconds=health)


def latency_lines(report: Report, side: str, answers: list[Answer]) -> None:
    asked(answers, 0.0)
    waits = {
        'to the first frame': [answer.first for answer in answers],
        'between frames': [gap for answer in answers for gap in answer.gaps],
        'between tokens, mean of a text': [
            (answer.total - answer.first) / max(1, answer.tokens - 1) for answer in answers
        ],
        'to the end': [answer.total for answer in answers],
    }
    for what, seconds in waits.items():
        found = percentiles(seconds)
        line('serving', side, in_milliseconds(found), what)
        report.add('serving', side, what, seconds=found)


def in_milliseconds(found: dict[str, float]) -> str:
    return ', '.join(f'{name} {value * 1e3:,.0f} ms' for name, value in found.items())


def bench_plumbing(c: dict, report: Report, server: Server) -> None:
    """Answers of one token of a tiny model: what is left is the server."""
    rates = []
    for number in range(c['rounds'] + 1):
        asks = [{'prompt': [1, 2, 3], 'max_tokens': 1}] * 500
        begin = time.perf_counter()
        answers = closed_loop(server.address, asks, c['clients'])
        seconds, _, _ = asked(answers, time.perf_counter() - begin)
        rates += [len(answers) / seconds] if number else []
    line('serving', 'a tiny model', shown(rates, ',.0f') + ' requests/s', 'answers of one token')
    report.add('serving', 'a tiny model', requests_per_second=spread(rates))
