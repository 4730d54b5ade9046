"""
Clients that ask a server for texts as people and programs do, and what they see of it.

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
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError

PATIENCE = 300  # seconds for an answer, or for the server to be ready


@dataclass
class Answer:
    """What one request came to; moments are in seconds after it was sent."""

    status: int = 0  # of HTTP; 0: the connection broke
    tokens: int = 0
    first: float = 0.0  # to the first piece of text
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between pieces of text


class Server:
    """python api.py on a port of its own choice, ended with the `with`."""

    def __init__(self, out_dir: Path, **settings):
        flags = [f'--{name}={value}' for name, value in settings.items()]
        command = [sys.executable, Path(__file__).with_name('api.py'), f'--out_dir={out_dir}']
        self.process = subprocess.Popen(
            [*map(str, command), '--port=0', *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding='utf-8',
        )

    def __enter__(self) -> 'Server':
        for line in self.process.stdout:
            if found := re.search(r'http://([\d.]+):(\d+)', line):
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
    last = None
    for line in reply:
        if not line.startswith(b'data: {'):
            continue
        frame, now = json.loads(line[6:]), time.perf_counter()
        if frame.get('usage'):
            answer.tokens = frame['usage']['completion_tokens']
        elif 'error' in frame:
            answer.status = 0
        elif last is None:
            answer.first, last = now - begin, now
        else:
            answer.gaps.append(now - last)
            last = now


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
