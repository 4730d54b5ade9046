"""
The HTTP server of api.py: waitress with its threads, the log, signals and shutdown.

    server = Server(startup := StartupApp(), listen(settings), max_body=4.0)
    startup.app = build_app(None, settings)              # until then: 503, the model is loading
    wait_until_drained(service, server)                  # after a signal: finish what is running
"""

import ipaddress
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import flask
import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask
from waitress.utilities import RequestEntityTooLarge

from flatgpt.errors import ConfigError, UserError
from flatgpt.serving.api_error import APIError, error_body
from flatgpt.serving.job import LOG
from flatgpt.serving.origins import Origins, is_preflight
from flatgpt.serving.service import Service, api_key_of

MAX_DISCARDED = 2**28  # bytes of a body over the limit that are read, to be able to respond
CONNECTIONS = 1000  # at once; idle ones are closed after two minutes
EXTRA_THREADS = 16  # for requests other than completions
STALL_TIMEOUT = 60.0  # seconds without a byte read until a client is disconnected
STALL_CHECK_INTERVAL = 1.0  # seconds
DRAIN_GRACE = 0.5  # seconds in which a drained server still answers late requests, by 503
DRAIN_TIMEOUT = 30.0  # seconds in which clients must read the rest of their responses


class JsonLines(logging.Formatter):
    """Formats log records as JSON objects, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))
        line = {
            'time': f'{moment}.{int(record.msecs):03}Z',
            'level': record.levelname.lower(),
            'message': record.getMessage(),
            **getattr(record, 'fields', {}),
        }
        if record.exc_info:
            line['traceback'] = self.formatException(record.exc_info)
        return json.dumps(line)


class JsonErrorTask(ErrorTask):
    """The response to malformed or oversized HTTP, which waitress rejects by itself."""

    def execute(self):
        error = self.request.error
        body = json.dumps(error_body(error.code, f'{error.reason}: {error.body}')).encode()
        self.status = f'{error.code} {error.reason}'
        self.response_headers.append(('Content-Type', 'application/json'))
        self.response_headers += self.channel.server.startup.headers(self.request.headers)
        self.channel.server.startup.log_rejected(self.channel.addr[0], error.code)
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Parser(HTTPRequestParser):
    """Reads and discards the rest of an oversized body.

    A client that is disconnected while it sends never reads the response.
    """

    to_discard = 0  # bytes that are still to come

    def received(self, data: bytes) -> int:
        if not self.to_discard:
            count = super().received(data)
            if isinstance(self.error, RequestEntityTooLarge):
                length = self.content_length
                self.to_discard = length if length < MAX_DISCARDED else 0
        else:
            count = min(len(data), self.to_discard)
            self.to_discard -= count
        self.completed = self.completed if not self.error else not self.to_discard
        return count


class Channel(HTTPChannel):
    error_task_class = JsonErrorTask
    parser_class = Parser


def listen(settings: dict) -> socket.socket:
    """A listening socket at the configured host and port.

    UserError if they cannot be used, or if other machines could without an API key.
    """
    host, port = settings['host'], settings['port']
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not (ipaddress.ip_address(address[0]).is_loopback or api_key_of(settings)):
            raise ConfigError(
                f'host={host}: other machines can reach it, so clients must send an API key; '
                'set FLATGPT_API_KEY or --api_key=KEY, or use --host=127.0.0.1'
            )
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f'--host={host} --port={port}: {error.strerror or error}; use another host or port '
            '(--port=0: any free one)'
        ) from error


def header_reader(request: dict) -> Callable[[str], str | None]:
    """A function that reads a header by its name, of headers under WSGI's names."""
    return lambda name: request.get(name.upper().replace('-', '_'))


class StartupApp:
    """The WSGI application; while the model is loading, it responds with 503."""

    def __init__(self, app: flask.Flask | None = None, origins: Origins | None = None):
        self.app, self.origins = app, origins

    def __call__(self, environ: dict, start_response):
        if self.app:
            return self.app(environ, start_response)
        request = {name.removeprefix('HTTP_'): value for name, value in environ.items()}
        status, body = self.while_loading(request)
        headers = [('Content-Type', 'application/json'), *self.headers(request)]
        headers += [('Retry-After', '5')] if status.startswith('503') else []
        start_response(status, headers)
        return [json.dumps(body).encode()]

    def while_loading(self, request: dict) -> tuple[str, dict]:
        """The status and body of the response to a request's headers and environment."""
        try:
            if self.origins:
                self.origins.check(request.get('ORIGIN'), request.get('HOST'))
        except APIError as error:
            return '403 Forbidden', error.body
        # if its preflight failed, a page could not read the 503
        preflight = is_preflight(request['REQUEST_METHOD'], header_reader(request))
        if preflight or request['PATH_INFO'] == '/health':
            return '200 OK', {'status': 'ok'}
        return '503 Service Unavailable', error_body(
            503, 'the model is loading; try again', code='loading'
        )

    def headers(self, request: dict) -> list[tuple[str, str]]:
        """The CORS headers of the response to a request's headers."""
        origins = self.app.extensions['origins'] if self.app else self.origins
        if origins is None:
            return []
        return list(origins.response_headers(header_reader(request)).items())

    def log_rejected(self, client: str, status: int) -> None:
        """Log and count a request that waitress rejected: malformed or oversized HTTP."""
        LOG.info('request', extra={'fields': {'client': client, 'status': status}})
        if self.app:
            self.app.extensions['flatgpt'].metrics.rejected.labels(status).inc()


class Server:
    """waitress, started in a thread of its own."""

    def __init__(self, startup: StartupApp, listener: socket.socket, max_body: float):
        self.channels: dict = {}
        self.server = waitress.create_server(
            startup,
            map=self.channels,
            sockets=[listener],
            threads=EXTRA_THREADS,
            connection_limit=CONNECTIONS,
            channel_request_lookahead=1,  # detects clients that disconnect
            max_request_body_size=int(max_body * 2**20),
            trusted_proxy='127.0.0.1',  # nginx on this machine reports the client's address
            trusted_proxy_headers={'x-forwarded-for'},
            ident='flatgpt',
        )
        self.server.startup = startup
        self.server.channel_class = Channel
        self.checked_at, self.closed = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self.run, name='flatgpt server', daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.closed.is_set():
            wasyncore.loop(0.5, use_poll=hasattr(select, 'poll'), map=self.channels, count=1)
            if time.monotonic() - self.checked_at > STALL_CHECK_INTERVAL:
                self.checked_at = time.monotonic()
                self.disconnect_stalled()

    def disconnect_stalled(self) -> None:
        """Disconnect clients that stopped reading: each holds a socket, and perhaps a thread."""
        for channel in self.open_channels():
            if not channel.outbuf_lock.acquire(False):
                continue  # it is being written to
            try:
                idle = time.time() - channel.last_activity
                if channel.total_outbufs_len and idle > STALL_TIMEOUT:
                    channel.handle_close()
            finally:
                channel.outbuf_lock.release()

    def set_max_completions(self, count: int) -> None:
        """Run a thread for each open completion, so that 429 and /health never wait for one."""
        self.server.task_dispatcher.set_thread_count(count + EXTRA_THREADS)

    def open_channels(self) -> list[Channel]:
        return list(self.server.active_channels.values())

    def busy(self) -> set[Channel]:
        """The channels whose response is not completely sent."""
        return {each for each in self.open_channels() if each.requests or each.total_outbufs_len}

    def close(self) -> None:
        self.closed.set()
        self.server.pull_trigger()
        self.thread.join()
        for channel in self.open_channels():
            channel.handle_close()  # releases a thread that waits for its client
        self.server.task_dispatcher.shutdown()  # before the sockets that its threads write to
        wasyncore.close_all(self.channels)


def drain_on_signals(service: Service) -> None:
    """Drain the service at SIGTERM or Ctrl-C; exit at once at a second signal."""

    def stop(number, stack):
        if service.draining:
            os._exit(128 + number)  # a regular exit would abort in the engine's thread
        service.draining = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def reload_on_signal(service: Service) -> None:
    """Reload the model at SIGHUP. In a terminal, it still ends the server: the terminal closes."""

    def reload() -> None:
        try:
            service.reload()
        except APIError as error:
            LOG.error('%s', error)

    if hasattr(signal, 'SIGHUP') and not (sys.stdin and sys.stdin.isatty()):
        start = lambda number, stack: threading.Thread(target=reload, daemon=True).start()  # noqa: E731
        signal.signal(signal.SIGHUP, start)


def wait_until_drained(service: Service, server: Server) -> None:
    """Return once the service drains, all completions are finished and their clients read them.

    New requests get 503. Clients that keep sending requests, or do not read, do not delay it.
    """
    while not service.draining or any(job.unfinished for job in service.open_jobs()):
        sleep_while_alive(server)
    done, unread = time.monotonic(), server.busy()
    while (past := time.monotonic() - done) < DRAIN_GRACE or (unread and past < DRAIN_TIMEOUT):
        sleep_while_alive(server)
        unread &= server.busy()


def sleep_while_alive(server: Server) -> None:
    if not server.thread.is_alive():
        raise RuntimeError('the server failed')  # its thread printed the traceback
    time.sleep(0.05)


def log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    LOG.setLevel(logging.INFO)
    logging.getLogger('waitress.queue').setLevel(logging.ERROR)  # it warns at each queued request


def allow_open_files(count: int) -> None:
    """Raise the process's limit of open files and sockets to `count`, or as near as allowed."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
