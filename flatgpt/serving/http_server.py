"""
What stands between api.py and the network: waitress, its threads, the log, signals, the end.

    server = Server(startup := StartupApp(), listen(settings), max_body=4.0)
    startup.app = create_app(**settings)                 # until then: 503, it is being loaded
    wait_until_drained(service, server)                  # after a signal, what has begun is done
"""

import ipaddress
import json
import logging
import os
import select
import signal
import socket
import threading
import time
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
from flatgpt.serving.origins import Origins
from flatgpt.serving.service import LOG, Service, key_of

MOST_SURPLUS = 2**28  # bytes of a body that is too large, which are read all the same
CONNECTIONS = 1000  # at once; idle ones are closed after two minutes
SPARE = 16  # threads for all that is not a text
STALLED = 60.0  # seconds in which a client must take some byte of its answer, or is cut off
LOOK = 1.0  # seconds between two looks for them
LINGER = 0.5  # seconds in which a server that is done refuses what was on its way to it
FLUSH = 30.0  # seconds in which the clients of such a server must have read what was begun
ASKS_METHOD = 'ACCESS_CONTROL_REQUEST_METHOD'  # a header that makes an OPTIONS a preflight


class JsonLines(logging.Formatter):
    """A line of the log as a JSON object."""

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
    """What waitress answers by itself to what is no HTTP, or too much of it."""

    def execute(self):
        error = self.request.error
        body = json.dumps(error_body(error.code, f'{error.reason}: {error.body}')).encode()
        self.status = f'{error.code} {error.reason}'
        self.response_headers.append(('Content-Type', 'application/json'))
        self.response_headers += self.channel.server.startup.headers(self.request.headers)
        self.channel.server.startup.note(self.channel.addr[0], error.code)
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Parser(HTTPRequestParser):
    """Reads what is too large to its end, within reason: a client cut off would read no answer."""

    surplus = 0  # bytes still to come, and to be thrown away

    def received(self, data: bytes) -> int:
        if not self.surplus:
            count = super().received(data)
            if isinstance(self.error, RequestEntityTooLarge):
                self.surplus = self.content_length if self.content_length < MOST_SURPLUS else 0
        else:
            count = min(len(data), self.surplus)
            self.surplus -= count
        self.completed = self.completed if not self.error else not self.surplus
        return count


class Channel(HTTPChannel):
    error_task_class = JsonErrorTask
    parser_class = Parser


def listen(settings: dict) -> socket.socket:
    """A socket at the host and port asked for. UserError if that may not or cannot be."""
    where, at = settings['host'], settings['port']
    try:
        family, _, _, _, address = socket.getaddrinfo(where, at, type=socket.SOCK_STREAM)[0]
        if not (ipaddress.ip_address(address[0]).is_loopback or key_of(settings)):
            raise ConfigError(
                f'host={where}: others could reach it, so it needs a key that clients must send; '
                'set FLATGPT_API_KEY, or --api_key='
            )
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f'--host={where} --port={at}: {error.strerror or error}; try another'
        ) from error


class StartupApp:
    """The application; until it is there, a word that it is being loaded."""

    def __init__(self, app: flask.Flask | None = None, origins: Origins | None = None):
        self.app, self.origins = app, origins

    def __call__(self, environ: dict, start_response):
        if self.app:
            return self.app(environ, start_response)
        asked = {name.removeprefix('HTTP_'): value for name, value in environ.items()}
        status, body = self.while_loading(asked)
        headers = [('Content-Type', 'application/json'), *self.headers(asked)]
        headers += [('Retry-After', '5')] if status.startswith('503') else []
        start_response(status, headers)
        return [json.dumps(body).encode()]

    def while_loading(self, asked: dict) -> tuple[str, dict]:
        """Status and body, by a request's environment."""
        try:
            if self.origins:
                self.origins.check(asked.get('ORIGIN'), asked.get('HOST'))
        except APIError as error:
            return '403 Forbidden', error.body
        # after a preflight that fails, a page could not read what the 503 says
        preflight = asked['REQUEST_METHOD'] == 'OPTIONS' and ASKS_METHOD in asked
        if preflight or asked['PATH_INFO'] == '/health':
            return '200 OK', {'status': 'ok'}
        return '503 Service Unavailable', error_body(
            503, 'the model is being loaded', code='loading'
        )

    def headers(self, asked: dict) -> list[tuple[str, str]]:
        """What the answer says to a page elsewhere, by the headers that it sent."""
        origins = self.app.extensions['origins'] if self.app else self.origins
        if origins is None:
            return []
        wanted = None
        if ASKS_METHOD in asked:
            wanted = asked.get('ACCESS_CONTROL_REQUEST_HEADERS', '')
        return list(origins.headers(asked.get('ORIGIN'), wanted).items())

    def note(self, client: str, status: int) -> None:
        """Log and count what never got here, as it was no HTTP, or too much of it."""
        LOG.info('request', extra={'fields': {'client': client, 'status': status}})
        if self.app:
            self.app.extensions['flatgpt'].metrics.rejected.labels(status).inc()


class Server:
    """waitress in a thread of its own, from now on."""

    def __init__(self, startup: StartupApp, listener: socket.socket, max_body: float):
        self.channels: dict = {}
        self.server = waitress.create_server(
            startup,
            map=self.channels,
            sockets=[listener],
            threads=SPARE,
            connection_limit=CONNECTIONS,
            channel_request_lookahead=1,  # without it nobody notices a client that left
            max_request_body_size=int(max_body * 2**20),
            trusted_proxy='127.0.0.1',  # nginx on this machine says whose request it passes on
            trusted_proxy_headers={'x-forwarded-for'},
            ident='flatgpt',
        )
        self.server.startup = startup
        self.server.channel_class = Channel
        self.looked, self.closed = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self.run, name='flatgpt server', daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.closed.is_set():
            wasyncore.loop(0.5, use_poll=hasattr(select, 'poll'), map=self.channels, count=1)
            if time.monotonic() - self.looked > LOOK:
                self.looked = time.monotonic()
                self.cut_off_stalled()

    def cut_off_stalled(self) -> None:
        """Hang up on who reads nothing: a thread may wait for them, and a socket does."""
        for channel in self.open_channels():
            if not channel.outbuf_lock.acquire(False):
                continue  # something is being written
            try:
                if channel.total_outbufs_len and time.time() - channel.last_activity > STALLED:
                    channel.handle_close()
            finally:
                channel.outbuf_lock.release()

    def expect(self, texts: int) -> None:
        """Have a thread for each text that may be open: 429 and /health must not wait for them."""
        self.server.task_dispatcher.set_thread_count(texts + SPARE)

    def open_channels(self) -> list[Channel]:
        return list(self.server.active_channels.values())

    def busy(self) -> set[Channel]:
        """Those who wait for an answer, or for the end of one."""
        return {each for each in self.open_channels() if each.requests or each.total_outbufs_len}

    def close(self) -> None:
        self.closed.set()
        self.server.pull_trigger()
        self.thread.join()
        for channel in self.open_channels():
            channel.handle_close()  # lets go a thread that waits for its client
        self.server.task_dispatcher.shutdown()  # its threads write to what is closed next
        wasyncore.close_all(self.channels)


def drain_on_signals(service: Service) -> None:
    """SIGTERM and Ctrl-C let what has begun be finished; a second one does not."""

    def stop(number, stack):
        if service.draining:
            os._exit(128 + number)  # the engine is at work, and would abort an orderly end
        service.draining = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def wait_until_drained(service: Service, server: Server) -> None:
    """Return once it drains, all texts are written, and their clients have read them.

    What comes afterwards is refused, and nobody who goes on asking, or does not read, keeps it.
    """
    while not service.draining or any(job.left for job in service.open_jobs()):
        wait_a_moment(server)
    done, unread = time.monotonic(), server.busy()
    while (past := time.monotonic() - done) < LINGER or (unread and past < FLUSH):
        wait_a_moment(server)
        unread &= server.busy()


def wait_a_moment(server: Server) -> None:
    if not server.thread.is_alive():
        raise RuntimeError('the server failed')  # what it died of was printed
    time.sleep(0.05)


def log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    LOG.setLevel(logging.INFO)
    logging.getLogger('waitress.queue').setLevel(logging.ERROR)  # a line for each that waits


def allow_open_files(count: int) -> None:
    """Have the system allow a process so many sockets and files, or as many as it ever does."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
