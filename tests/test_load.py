"""The server under many requests, wrong ones, and the clients that people use.

$ python -m pytest -m load                          # some minutes
$ FLATGPT_LOAD=10 python -m pytest -m load          # a tenth of the counts
"""

import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model
from test_api import (
    GOES_ON,
    PATH,
    SIZE,
    VOCABULARY,
    ask,
    connect,
    figures,
    free_again,
    in_background,
    make_app,  # noqa: F401 - a fixture
    model,  # noqa: F401 - another
    out_dir,  # noqa: F401
    post,
    served,
    service_of,
    started,
)

from data.tokenizer import byte_tokenizer
from schema import openapi

pytestmark = pytest.mark.load
OPERATIONS = [(path, way) for path, ways in openapi('')['paths'].items() for way in ways]
SHARE = int(os.environ.get('FLATGPT_LOAD', '100')) / 100


def times(count):
    return max(1, round(count * SHARE))


def together(count, work):
    """Run work(number) in as many threads -> what each returned."""
    results = [in_background(work, number) for number in range(count)]
    return [result() for result in results]


# -----------------------------------------------------------------------------
# many requests


@contextlib.contextmanager
def kept(port):
    """A connection for many requests -> a function that sends one and gives status and body."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)

    def send(**body):
        given = json.dumps(body), {'Content-Type': 'application/json'}
        connection.request('POST', PATH, *given)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()

    with contextlib.closing(connection):
        yield send


def test_four_times_too_many_clients_get_200_or_429_and_nothing_else(make_app):  # noqa: F811
    app = make_app(max_rows=4, max_queue=12)
    answers = []

    def client(number):
        draw = random.Random(number)
        with kept(port) as send:
            for _ in range(times(40)):
                streamed = draw.random() < 0.5
                answers.append(send(prompt='ab', max_tokens=draw.randrange(1, 40), stream=streamed))

    with served(app) as port:
        together(64, client)
        assert free_again(app.extensions['flatgpt'])
    statuses = [status for status, _, _ in answers]
    assert {*statuses} == {200, 429}
    assert len(statuses) == 64 * times(40)
    for status, headers, body in answers:
        if status == 429:
            assert int(headers['Retry-After']) > 0
        else:
            assert b'"finish_reason": "' in body or b'"finish_reason":"' in body


def test_200_clients_that_leave_at_any_moment_leave_no_row_taken(make_app):  # noqa: F811
    app, draw = make_app(max_rows=2, model=random_model(VOCABULARY, 4096)), random.Random(0)
    service = app.extensions['flatgpt']
    with served(app) as port:
        for _ in range(times(200)):
            clients = [
                connect(
                    port,
                    prompt='a' * draw.randrange(1, 2000),
                    max_tokens=2000,
                    stream=draw.random() < 0.6,
                    n=draw.randrange(1, 3),
                    logit_bias=GOES_ON,
                )
                for _ in range(draw.randrange(1, 4))
            ]
            time.sleep(draw.random() ** 3 * 0.3)
            for client in clients:
                client.close()
            assert free_again(service)
        assert post(port, prompt='a')[0] == 200
    seen = figures(app.test_client())
    assert seen['flatgpt_requests_running'] == seen['flatgpt_requests_waiting'] == 0
    assert seen['flatgpt_requests_finished_total{reason="cancelled"}'] >= times(200)


def test_10_000_requests_leave_memory_threads_and_rows_as_they_were(out_dir, environment):  # noqa: F811
    psutil = pytest.importorskip('psutil')
    count = times(10_000)
    with started(out_dir, environment) as (process, port):
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        used = psutil.Process(process.pid)

        def client(number):
            with kept(port) as send:
                for i in range(count // 16):
                    given = {'max_tokens': 1 + i % 5, 'stream': i % 3 == 0, 'echo': i % 2 == 0}
                    status, _, _ = send(prompt='abc' * (1 + i % 7), **given, logprobs=i % 3)
                    assert status == 200

        def usage():
            return used.memory_info().rss / 2**20, used.num_threads(), used.num_fds()

        for number in range(3):  # every count of rows, every thread
            together(16, lambda i: post(port, prompt='abc' * 100, max_tokens=20, n=1 + i % 4))
        before = usage()
        together(16, client)
        after = usage()
    print(f'{count} requests: {before} MiB, threads, files, then {after}')
    assert after[0] < before[0] + 20
    assert after[1:] <= (before[1], before[2] + 2)


def test_idle_sockets_and_slow_uploads_starve_nobody(make_app):  # noqa: F811
    app, end = make_app(), threading.Event()
    with served(app) as port, contextlib.ExitStack() as stack:
        slow = []
        for number in range(500):
            client = stack.enter_context(socket.create_connection(('127.0.0.1', port), timeout=60))
            if number % 2:
                client.sendall(f'POST {PATH} HTTP/1.1\r\nContent-Length: 100000\r\n\r\n'.encode())
                slow.append(client)

        def dribble():
            while not end.wait(0.05):
                for client in slow:
                    client.sendall(b' ')

        thread = threading.Thread(target=dribble)
        thread.start()
        took = []
        for _ in range(times(200)):
            began = time.monotonic()
            assert post(port, prompt='a', max_tokens=2)[0] == 200
            took.append(time.monotonic() - began)
        end.set()
        thread.join()
    print(f'beside 250 idle and 250 slow: median {sorted(took)[len(took) // 2]:.4f} s')
    assert sorted(took)[int(0.95 * len(took))] < 0.5


@pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
def test_sigterm_under_32_streams_loses_none(out_dir, environment):  # noqa: F811
    for _ in range(times(5)):
        with started(out_dir, environment) as (process, port):
            streams = [
                connect(port, prompt='ab', max_tokens=150, stream=True, logit_bias=GOES_ON, seed=i)
                for i in range(32)
            ]
            while True:
                connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
                with contextlib.closing(connection):
                    connection.request('GET', '/metrics')
                    lines = connection.getresponse().read().decode().splitlines()
                seen = dict(line.rsplit(' ', 1) for line in lines)
                if (
                    float(seen['flatgpt_requests_running'])
                    + float(seen['flatgpt_requests_waiting'])
                    == 32
                ):
                    break
            process.terminate()
            for client in streams:
                with client, client.makefile('rb') as file:
                    text = file.read()
                assert text.startswith(b'HTTP/1.1 200')
                assert b'"finish_reason": "length"' in text
                assert b'data: [DONE]\n\n' in text
                assert text.endswith(b'0\r\n\r\n')
            assert process.wait(10) == 0


def test_many_streams_at_once_leave_health_answering(make_app):  # noqa: F811
    app, took = make_app(model=random_model(VOCABULARY, 1024)), []
    with served(app) as port:
        streams = [
            in_background(post, port, prompt='a', max_tokens=400, stream=True, logit_bias=GOES_ON)
            for _ in range(64)
        ]
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
        with contextlib.closing(connection):
            while app.extensions['flatgpt'].jobs or not took:
                began = time.monotonic()
                connection.request('GET', '/health')
                assert connection.getresponse().read()
                took.append(time.monotonic() - began)
                time.sleep(0.01)
        assert all(b'[DONE]' in stream()[2] for stream in streams)
    print(
        f'/health beside 64 streams: p99 {sorted(took)[int(0.99 * len(took))]:.4f} s of {len(took)}'
    )


# -----------------------------------------------------------------------------
# wrong requests


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize(('path', 'method'), OPERATIONS)
def test_nothing_that_a_schema_allows_or_forbids_is_a_server_error(make_app, path, method):  # noqa: F811
    schemathesis = pytest.importorskip('schemathesis')
    import hypothesis

    app = make_app(max_queue=1000)
    document = schemathesis.openapi.from_wsgi('/openapi.json', app)
    operation, statuses = document[path][method], []
    modes = schemathesis.GenerationMode
    cases = operation.as_strategy(generation_mode=modes.POSITIVE) | operation.as_strategy(
        generation_mode=modes.NEGATIVE
    )

    @hypothesis.settings(
        max_examples=times(2000),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases)
    def check(case):
        reply = case.call()
        statuses.append(reply.status_code)
        case.validate_response(
            reply,
            excluded_checks=[
                schemathesis.checks.negative_data_rejection,
                schemathesis.checks.positive_data_acceptance,
            ],
        )

    check()
    counts = {status: statuses.count(status) for status in sorted({*statuses})}
    print(operation.label, counts)
    assert max(statuses) < 500
