"""launch/nginx.conf: two servers that are killed, stopped and restarted under load."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from http.client import HTTPConnection

import pytest
from conftest import ROOT
from server import (
    GOES_ON,
    connect,
    in_background,
    post,
    started,
    wait_until,
)

pytest_plugins = ['server']
NGINX = shutil.which('nginx', path=f'{os.environ["PATH"]}:/usr/sbin')
pytestmark = [
    pytest.mark.load,
    pytest.mark.skipif(NGINX is None, reason='needs nginx: apt-get install nginx-light'),
]
AROUND = """
daemon off;
worker_processes 2;
pid nginx.pid;
error_log error.log;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include flatgpt.conf;
}
"""


class Cluster:
    """nginx with launch/nginx.conf, and the servers at its two ports."""

    def __init__(self, folder, start):
        self.folder, self.start_at = folder, start
        self.port, *self.ports = free_ports(3)
        self.servers, self.stack = {}, contextlib.ExitStack()

    def write_config(self):
        first, second = self.ports
        ports = {
            'listen 8000;': f'listen 127.0.0.1:{self.port};',
            'server 127.0.0.1:8001 ': f'server 127.0.0.1:{first} ',
            'server 127.0.0.1:8002 ': f'server 127.0.0.1:{second} ',
        }
        text = (ROOT / 'launch/nginx.conf').read_text(encoding='utf-8')
        for theirs, ours in ports.items():
            assert theirs in text
            text = text.replace(theirs, ours)
        (self.folder / 'flatgpt.conf').write_text(text, encoding='utf-8')
        around = ('user root;' if os.geteuid() == 0 else '') + AROUND
        (self.folder / 'nginx.conf').write_text(around, encoding='utf-8')

    def command(self, *args):
        log = self.folder / 'error.log'
        return [NGINX, '-p', f'{self.folder}/', '-c', 'nginx.conf', '-e', str(log), *args]

    def __enter__(self):
        self.write_config()
        for number in range(2):
            self.start(number)
        nginx = self.stack.enter_context(subprocess.Popen(self.command()))
        self.stack.callback(nginx.terminate)
        wait_until(lambda: answers(self.port))
        return self

    def __exit__(self, *error):
        self.stack.close()

    def start(self, number):
        self.servers[number], _ = self.stack.enter_context(self.start_at(self.ports[number]))
        in_background(self.servers[number].stderr.read)  # its log, which else fills the pipe

    def figure(self, number, name):
        connection = HTTPConnection('127.0.0.1', self.ports[number], timeout=10)
        with contextlib.closing(connection):
            connection.request('GET', '/metrics')
            text = connection.getresponse().read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def running(self):
        return [self.figure(number, 'flatgpt_requests_running') for number in range(2)]

    def finished(self, number):
        return self.figure(number, 'flatgpt_requests_finished_total')

    def ask(self, **body):
        return post(self.port, **{'prompt': 'ab', 'max_tokens': 10, **body})


def free_ports(count):
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(('127.0.0.1', 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in listeners]


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
        return True


@pytest.fixture
def cluster(tmp_path, out_dir, environment):
    with Cluster(tmp_path, lambda port: started(out_dir, environment, f'--port={port}')) as both:
        yield both


def test_nginx_has_nothing_to_say_against_its_configuration(tmp_path):
    cluster = Cluster(tmp_path, None)
    cluster.write_config()
    done = subprocess.run(cluster.command('-t'), capture_output=True, text=True)
    assert done.returncode == 0
    assert 'warn' not in done.stderr
    assert 'syntax is ok' in done.stderr


def test_a_stream_comes_as_it_is_written_and_ends_with_its_client(cluster):
    body = {'prompt': 'ab', 'max_tokens': 4000, 'stream': True, 'logit_bias': GOES_ON}
    clients = [connect(cluster.port, **body) for _ in range(4)]
    for client in clients:
        assert b'200 OK' in client.recv(1000)
    for client in clients:
        while b'data: ' not in client.recv(1000):
            pass
    assert cluster.running() == [2, 2]  # the next to the one that has fewer
    for client in clients:
        client.close()
    wait_until(lambda: cluster.running() == [0, 0])
    cancelled = 'flatgpt_requests_finished_total{reason="cancelled"}'
    wait_until(lambda: [cluster.figure(number, cancelled) for number in range(2)] == [2, 2])


def test_ids_and_errors_pass_through(cluster):
    connection = HTTPConnection('127.0.0.1', cluster.port, timeout=10)
    with contextlib.closing(connection):
        for sent, wanted in (({'X-Request-Id': 'mine-1'}, 'mine-1'), ({}, r'[0-9a-f]{32}')):
            connection.request('GET', '/v1/models', headers=sent)
            reply = connection.getresponse()
            assert re.fullmatch(wanted, reply.headers['X-Request-Id'])
            assert json.loads(reply.read())['data']
    status, _, reply = cluster.ask(prompt='')
    assert status == 400
    assert json.loads(reply)['error']['param'] == 'prompt'
    for size, wanted in ((4 * 2**20 - 40, 400), (4 * 2**20, 413)):
        status, headers, reply = cluster.ask(prompt='a' * size)
        assert status == wanted
        assert headers['Content-Type'] == 'application/json'
        assert json.loads(reply)['error']['message']


def test_a_request_that_takes_too_long_is_not_sent_to_the_other(tmp_path, out_dir, environment):
    def start(port):
        return started(out_dir, environment, f'--port={port}', '--max_seconds=0.3')

    with Cluster(tmp_path, start) as cluster:
        for count in range(1, 9):  # three failures would take a server out
            status, _, body = cluster.ask(max_tokens=4000, logit_bias=GOES_ON)
            assert (status, json.loads(body)['error']['code']) == (504, 'timeout')
            assert cluster.finished(0) + cluster.finished(1) == count
        assert all(cluster.finished(number) for number in range(2))


def test_no_request_fails_after_a_server_is_killed(cluster):
    long = [in_background(cluster.ask, max_tokens=300, logit_bias=GOES_ON) for _ in range(8)]
    wait_until(lambda: all(cluster.running()))
    cluster.servers[0].kill()
    assert [answer()[0] for answer in long] == [200] * 8  # nothing of them had been sent yet
    assert [cluster.ask()[0] for _ in range(40)] == [200] * 40


def test_a_server_that_ends_is_avoided_while_it_finishes_its_stream(cluster):
    client = connect(cluster.port, prompt='a', max_tokens=3000, stream=True, logit_bias=GOES_ON)
    assert client.recv(1000)
    busy = cluster.running().index(1)
    cluster.servers[busy].send_signal(signal.SIGTERM)
    before = cluster.finished(1 - busy)
    assert [cluster.ask()[0] for _ in range(20)] == [200] * 20
    assert cluster.finished(1 - busy) == before + 20
    assert cluster.servers[busy].poll() is None  # the stream goes on
    rest = b''
    with client:
        while b'[DONE]' not in rest:
            rest += client.recv(65536)
    assert b'"finish_reason": "length"' in rest
    assert cluster.servers[busy].wait(10) == 0


def test_servers_restarted_one_by_one_lose_no_request(cluster):
    end, statuses = threading.Event(), []

    def client(number):
        while not end.is_set():
            status, _, body = cluster.ask(stream=bool(number % 2), max_tokens=50)
            whole = body.endswith((b'[DONE]\n\n', b'}\n')) and b'"error"' not in body
            statuses.append(status if whole else 'cut')

    clients = [in_background(client, number) for number in range(6)]
    try:
        for number in range(2):
            cluster.servers[number].send_signal(signal.SIGTERM)
            assert cluster.servers[number].wait(20) == 0
            cluster.start(number)
            wait_until(lambda number=number: cluster.finished(number) > 5, 20)
    finally:
        end.set()
        for each in clients:
            each()
    assert {*statuses} == {200}
    assert len(statuses) > 50


def test_when_all_are_gone_the_client_is_told_in_json_to_come_again(cluster):
    for server in cluster.servers.values():
        server.kill()
        server.wait()
    status, headers, body = cluster.ask()
    assert status == 503
    assert headers['Retry-After'] == '5'
    assert json.loads(body)['error']['message'] == 'no server is available; try again'
