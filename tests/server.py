"""What several test files need of a server: the tiny model's, in this process or in its own.

A test file takes the fixtures with `pytest_plugins = ['server']`, and imports the rest.
"""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import flask
import pytest
from conftest import random_model, saved

import api
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.serving.http_server import Server, StartupApp, listen
from flatgpt.serving.openapi import document

SCRIPT = Path(api.__file__)
SIZE = 64  # of the context
VOCABULARY = 257
PATH = '/v1/completions'
GOES_ON = {'256': -100}  # a bias that keeps a text from ending before max_tokens


@pytest.fixture(scope='module')
def model():
    return random_model(VOCABULARY, SIZE)


@pytest.fixture
def make_app(model):
    """Make an application of the tiny model, whose engine is gone when the test ends."""
    made = []

    def make(tokenizer=None, model=model, **settings):
        app = api.create_app((model, tokenizer or byte_tokenizer()), **settings)
        made.append(app.extensions['flatgpt'])
        return app

    yield make
    for service in made:
        service.close()


@pytest.fixture(scope='module')
def out_dir(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('served') / 'run', byte_tokenizer(), block_size=4096)


def documented_paths():
    """The paths of the OpenAPI document, without a model behind them."""
    app = flask.Flask('documented')
    app.register_blueprint(api.routes)
    return document(app, '')['paths']


def wait_until(reached, seconds=10):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, 'it did not come to that'
        time.sleep(0.005)


def write(service, text):
    """Make the engine generate these bytes, whatever the model predicts."""
    runner = service.engine.runner
    runner.sample_requests = lambda requests, *_: [text[len(r.output_ids)] for r in requests]


def in_background(work, *args, **options):
    """Start a function in a thread -> a function that waits for what it returns."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work(*args, **options)), daemon=True)
    thread.start()

    def result():
        thread.join(30)
        return results[0]

    return result


def figures(client):
    lines = client.get('/metrics').text.splitlines()
    return {
        key: float(value)
        for key, value in (line.rsplit(' ', 1) for line in lines if line[0] != '#')
    }


@contextlib.contextmanager
def serving(app):
    """Serve an application on a free port -> the server and the port."""
    service, listener = app.extensions['flatgpt'], listening()
    server = Server(StartupApp(app), listener, 4)
    server.set_max_completions(service.max_completions)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.close()


@contextlib.contextmanager
def served(app):
    with serving(app) as (_, port):
        yield port


def listening():
    return listen({'host': '127.0.0.1', 'port': 0, 'api_key': None})


def post(port, path=PATH, **body):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    with contextlib.closing(connection):
        connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
        reply = connection.getresponse()
        return reply.status, dict(reply.headers), reply.read()


def connect(port, **body):
    """A socket on which a request has been sent."""
    data = json.dumps(body).encode()
    kind = 'Host: localhost\r\nContent-Type: application/json'
    head = f'POST {PATH} HTTP/1.1\r\n{kind}\r\nContent-Length: {len(data)}\r\n\r\n'
    connection = socket.create_connection(('127.0.0.1', port), timeout=30)
    connection.sendall(head.encode() + data)
    return connection


def free_again(service, seconds=10):
    """Whether all slots and the queue are empty before this time has passed."""
    end = time.monotonic() + seconds
    while service.engine.running or service.engine.waiting or service.jobs:
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


@contextlib.contextmanager
def started(out_dir, environment, *args):
    """Start api.py -> the process and its port, once it listens."""
    command = [
        sys.executable,
        str(SCRIPT),
        f'--out_dir={out_dir}',
        '--port=0',
        '--dtype=float32',
        *args,
    ]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(
        command, env={**environment, 'PYTHONWARNINGS': 'error'}, **pipes
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r' at http://127\.0\.0\.1:(\d+)', line)
            assert found, line + process.stderr.read()
            yield process, int(found[1])
        finally:
            process.kill()
