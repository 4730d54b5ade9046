"""
Serve a model over HTTP, as the clients of OpenAI's API expect it.

$ python api.py                                      # the newest run below out/, this machine only
$ python api.py --out_dir=out/my_run --port=8080
$ FLATGPT_API_KEY=secret python api.py --host=0.0.0.0

$ curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"prompt": "To be", "max_tokens": 32, "stream": true}'

http://127.0.0.1:8000/ is a playground, /docs explains every path, /metrics is for Prometheus.
For another server than its own: create_app(out_dir='out/my_run') is the WSGI application.
"""

import codecs
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import flask
import waitress
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import BaseModel, ValidationError
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask
from werkzeug.exceptions import HTTPException

import schema
from configurator import ConfigError, UserError, configure, known, read_settings, within
from data.tokenizer import EOT, Tokenizer
from engine import Engine, Piece, Request
from model import GPT
from sample import load, source

# -----------------------------------------------------------------------------
# model
out_dir: str | None = None  # folder of the run; None is the newest run below out/
init_from = 'resume'  # without out_dir: a run's folder, or gpt2, gpt2-xl ...
checkpoint: str | None = None  # None or 'best' (lowest validation loss), 'last', or a path
tokenizer: str | None = None  # for a model that came without: a name, tokenizer.json or meta.pkl
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'
quantize: str | None = None  # 'int8': half the bytes of 16 bits; on a CPU faster for few texts
name: str | None = None  # what clients see as the model's name; None: that of its folder
# server
host = '127.0.0.1'  # address to listen at; one that others can reach needs a key
port = 8000  # 0: any that is free
api_key: str | None = None  # what clients must send; None: what FLATGPT_API_KEY says
log_prompts = False  # put prompts and answers into the log
# limits
max_rows: int | None = None  # texts computed at once; None: 8 on a CPU, 32 elsewhere
max_queue = 128  # further texts that wait for a row; a request for more is answered 429
max_prompt_tokens: int | None = None  # of each prompt; None: what the model's context holds
max_new_tokens: int | None = None  # of each text; None: the same
max_seconds = 600.0  # from when a request comes to its last token
max_body = 4.0  # MiB that a request may have
chunk: int | None = None  # tokens of prompts between two steps of the texts; None: 64, or 256
deterministic = False  # the same bits for a text whatever else is computed; slower
# -----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
PACE = 0.03  # seconds between the frames of a stream: threads that wake up hold up the engine
WATCH = 0.1  # seconds until a client that left is noticed
SPARE = 16  # threads for all that is not a text
LOWEST = -9999.0  # stands for a log-probability of minus infinity, which JSON has not
LOG = logging.getLogger('flatgpt')


class Refusal(Exception):
    """An error as a client gets it."""

    def __init__(self, status: int, message: str, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.headers = status, dict(headers)
        kind = schema.TYPES.get(status, 'invalid_request_error')
        self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


# -----------------------------------------------------------------------------
# between the threads of the requests and the engine's


class Job:
    """The texts that one HTTP request asks for, on their way from the engine's thread to its own.

    gone(): whether the client has left.
    """

    def __init__(self, prompts: list, body: schema.CompletionRequest, gone: Callable[[], bool]):
        sampling, n = body.sampling(), body.n or 1
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        score = bool(body.echo) and body.logprobs is not None
        self.prompts, self.gone = prompts, gone
        self.requests = [
            Request(ids, sampling, self.take, i * n + j, (seed, j), body.logprobs, score)
            for i, ids in enumerate(prompts)
            for j in range(n)
        ]
        self.pieces: deque[Piece] = deque()
        self.left = len(self.requests)
        self.hungry = False  # whether a thread waits for the next piece
        self.arrived, self.finished = threading.Event(), threading.Event()
        self.late = False

    def take(self, piece: Piece) -> None:
        """Called by the engine: never waits."""
        self.pieces.append(piece)
        if piece.finish:
            self.left -= 1
            if not self.left:
                self.finished.set()
        if self.hungry:
            self.arrived.set()

    def batches(self) -> Iterator[list[Piece]]:
        """Pieces as they come: the first and the last at once, others together every PACE."""
        done = False
        while not done:
            self.hungry = True
            if not self.pieces:
                self.arrived.wait()
            self.hungry = False
            self.arrived.clear()
            done = not self.left  # looked at first: what ends a text is in `pieces` by then
            yield [self.pieces.popleft() for _ in range(len(self.pieces))]
            self.finished.wait(PACE)

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    def usage(self) -> dict:
        prompt, written = sum(map(len, self.prompts)), sum(len(r.written) for r in self.requests)
        return {
            'prompt_tokens': prompt,
            'completion_tokens': written,
            'total_tokens': prompt + written,
        }


class Metrics:
    """What /metrics tells."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        for kind, read, text in (
            ('slots', lambda: len(engine.slots), 'Texts that can be computed at once'),
            ('requests_running', lambda: engine.running, 'Texts being computed'),
            ('requests_waiting', lambda: len(engine.waiting), 'Texts that wait for a row'),
        ):
            Gauge(f'flatgpt_{kind}', text, registry=registry).set_function(read)
        counter = lambda *args: Counter(*args, registry=registry)  # noqa: E731
        self.prompt_tokens = counter('flatgpt_prompt_tokens', 'Tokens of prompts')
        self.generation_tokens = counter('flatgpt_generation_tokens', 'Tokens written')
        self.finished = counter('flatgpt_requests_finished', 'Texts ended', ['reason'])
        self.rejected = counter('flatgpt_requests_rejected', 'Requests refused', ['status'])
        times = lambda name, text, *buckets: Histogram(  # noqa: E731
            f'flatgpt_{name}_seconds', text, buckets=buckets, registry=registry
        )
        long = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
        self.queue = times('queue', 'From a request to a row', *long)
        self.first = times('time_to_first_token', 'From a request to its first token', *long)
        self.total = times('request', 'From a request to its last token', *long)
        short = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
        self.inter_token = times('inter_token', "Between a text's tokens, their mean", *short)

    def count(self, job: Job) -> None:
        for request in job.requests:
            written = len(request.written)
            self.finished.labels(request.finish or 'cancelled').inc()
            self.generation_tokens.inc(written)
            if request.began:
                self.prompt_tokens.inc(len(request.prompt))
                self.queue.observe(request.began - request.came)
            if request.finish in ('stop', 'length'):
                self.total.observe(request.ended - request.came)
            if written:
                self.first.observe(request.first - request.came)
            if request.ended and written > 1:
                self.inter_token.observe((request.ended - request.first) / (written - 1))


class Service:
    """The engine in a thread of its own, and who may use it."""

    def __init__(self, engine: Engine, settings: dict):
        self.engine, self.seconds = engine, settings['max_seconds']
        self.name = settings['name'] or 'flatgpt'
        self.most = len(engine.slots) + settings['max_queue']  # texts at once
        self.metrics = Metrics(engine)
        self.lock = threading.Lock()
        self.jobs: set[Job] = set()
        self.draining = False
        self.closed = threading.Event()
        for work in (self.run, self.watch):
            threading.Thread(target=work, name=f'flatgpt-{work.__name__}', daemon=True).start()

    def run(self) -> None:
        try:
            self.engine.serve()
        except BaseException:
            LOG.exception('the engine failed; nothing can be computed until a restart')

    def watch(self) -> None:
        """Drop what nobody waits for any more, and what takes too long."""
        while not self.closed.wait(WATCH):
            now = time.monotonic()
            for job in list(self.jobs):
                job.late = job.late or now - job.requests[0].came > self.seconds
                if job.late or job.gone():
                    job.cancel()

    def trouble(self) -> Refusal | None:
        """Why nothing can be computed now."""
        if self.engine.error or self.engine.closed:
            return Refusal(503, 'the engine has stopped; the log says why', code='engine_stopped')
        if self.draining:
            after = {'Retry-After': '5'}
            return Refusal(503, 'the server is shutting down', code='draining', headers=after)
        return None

    def start(self, job: Job) -> None:
        """Have the engine compute a job; release() must follow. Refusal if it cannot be now."""
        texts = len(job.requests)
        with self.lock:
            if trouble := self.trouble():
                raise trouble
            if sum(len(other.requests) for other in self.jobs) + texts > self.most:
                message = f'{self.most} texts are being written or wait; try again later'
                raise Refusal(429, message, code='queue_full', headers={'Retry-After': '1'})
            self.jobs.add(job)
        try:
            for request in job.requests:
                self.engine.submit(request)
        except BaseException:
            self.release(job)
            raise self.trouble() or Refusal(500, 'the engine failed') from None

    def release(self, job: Job) -> None:
        job.cancel()
        with self.lock:
            if job not in self.jobs:
                return
            self.jobs.remove(job)
        self.metrics.count(job)

    def failure(self, job: Job) -> Refusal | None:
        """Why a finished job has no answer."""
        if job.late:
            message = f'it took longer than {self.seconds:g} seconds'
            return Refusal(503, message, code='timeout', headers={'X-Should-Retry': 'false'})
        if any(request.finish in ('error', 'cancelled') for request in job.requests):
            return Refusal(500, 'the engine failed; the log says why', code='engine_stopped')
        return None

    def close(self) -> None:
        self.closed.set()
        self.engine.close()


# -----------------------------------------------------------------------------
# what a client reads


class Answer:
    """One text of an answer: what there is of it in a frame, or in all."""

    def __init__(self, request: Request, tokenizer: Tokenizer, echo: bool):
        self.request, self.tokenizer, self.echo = request, tokenizer, echo
        self.decoder, self.offset = codecs.getincrementaldecoder('utf-8')('replace'), 0

    def choice(self, pieces: list[Piece]) -> dict | None:
        """The next pieces as a client reads them; None if there is nothing yet to read."""
        r = self.request
        text = ''.join(piece.text for piece in pieces)
        scores = [(p.token, p.logprob, p.top) for p in pieces if p.token is not None]
        if self.echo:
            text, self.echo = self.tokenizer.decode(r.prompt) + text, False
            if r.score_prompt:
                scores[:0] = [(i, *each) for i, each in zip(r.prompt, r.prompt_scores, strict=True)]
        if not (text or pieces[-1].finish or (r.top is not None and scores)):
            return None
        logprobs = None if r.top is None else self.logprobs(scores)
        return {
            'index': r.row,
            'text': text,
            'logprobs': logprobs,
            'finish_reason': pieces[-1].finish,
        }

    def logprobs(self, scores: list[tuple]) -> dict:
        decode, offsets = self.tokenizer.decode, []
        for token, _, _ in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(self.tokenizer.token_bytes[token] or b''))
        return {
            'tokens': [decode([token]) for token, _, _ in scores],
            'token_logprobs': [None if p is None else max(p, LOWEST) for _, p, _ in scores],
            'top_logprobs': [None if s[1] is None else self.likeliest(*s) for s in scores],
            'text_offset': offsets,
        }

    def likeliest(self, token: int, logprob: float, top: tuple) -> dict[str, float]:
        out: dict[str, float] = {}
        for i, p in (*top, (token, logprob)):  # several tokens may read alike
            text = self.tokenizer.decode([i])
            out[text] = max(p, out.get(text, LOWEST))
        return out


def frame(data: dict) -> bytes:
    return b'data: ' + json.dumps(data).encode() + b'\n\n'


def stream(service: Service, job: Job, answers: list[Answer], head: dict, usage: bool):
    """The frames of a streamed answer."""
    beside = {'usage': None} if usage else {}
    for pieces in job.batches():
        rows: dict[int, list[Piece]] = {}
        for piece in pieces:
            rows.setdefault(piece.row, []).append(piece)
        if any(piece.finish in ('error', 'cancelled') for piece in pieces):
            yield frame((service.failure(job) or Refusal(500, 'cancelled')).body)
            break
        choices = [answers[row].choice(group) for row, group in rows.items()]
        yield b''.join(frame({**head, 'choices': [c], **beside}) for c in choices if c)
    else:
        if usage:
            yield frame({**head, 'choices': [], 'usage': job.usage()})
    yield b'data: [DONE]\n\n'


# -----------------------------------------------------------------------------
# the application


def create_app(loaded: tuple[GPT, Tokenizer] | None = None, **given) -> flask.Flask:
    """The WSGI application. given: settings of this file. loaded: a model, else they say which."""
    settings = {name: globals()[name] for name in read_settings(__file__)}
    for key in given:
        known(key, settings, f'create_app({key}=)')
    settings |= given
    check(settings)
    if loaded is None:
        settings['name'] = settings['name'] or Path(source(settings)[0]).name
        loaded = load(settings)
    on_cpu = loaded[0].embedding.weight.device.type == 'cpu'
    rows, piece = (8, 64) if on_cpu else (32, 256)
    rows, piece = settings['max_rows'] or rows, settings['chunk'] or piece
    engine = Engine(*loaded, rows, piece, deterministic=settings['deterministic'])
    app = flask.Flask('flatgpt', static_folder=None)
    app.extensions['flatgpt'] = service = Service(engine, settings)
    app.config['MAX_CONTENT_LENGTH'] = int(settings['max_body'] * 2**20)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    app.json.sort_keys = False
    add_errors(app)
    add_access(app, settings)
    add_pages(app, service)
    add_api(app, service, settings)
    return app


def check(settings: dict) -> None:
    within(1, None, settings, 'max_rows', 'max_prompt_tokens', 'max_new_tokens', 'chunk')
    within(0, None, settings, 'max_queue')
    within(0, 65535, settings, 'port')
    within(0.001, None, settings, 'max_seconds', 'max_body')


def key_of(settings: dict) -> str:
    return settings['api_key'] or os.environ.get('FLATGPT_API_KEY', '')


def add_errors(app: flask.Flask) -> None:
    def answer(refusal: Refusal):
        response = flask.jsonify(refusal.body)
        response.status_code = refusal.status
        response.headers.update(refusal.headers)
        flask.current_app.extensions['flatgpt'].metrics.rejected.labels(refusal.status).inc()
        return response

    app.register_error_handler(Refusal, answer)

    @app.errorhandler(HTTPException)
    def of_flask(error):
        allow = {k: v for k, v in error.get_response().headers if k == 'Allow'}
        return answer(Refusal(error.code, error.description, headers=allow))

    @app.errorhandler(Exception)
    def unforeseen(error):
        LOG.error('%s %s', flask.request.method, flask.request.path, exc_info=error)
        return answer(Refusal(500, 'this should not have happened; the log has the details'))


def add_access(app: flask.Flask, settings: dict) -> None:
    """Who may come in, and a line in the log for each who did."""
    key = key_of(settings).encode()

    @app.before_request
    def enter():
        g, request = flask.g, flask.request
        given = request.headers.get('X-Request-Id', '')
        g.id = given if re.fullmatch(r'[\w.-]{1,64}', given, re.ASCII) else secrets.token_hex(12)
        g.began, g.fields = time.monotonic(), {}
        guarded = request.path.startswith(('/v1/', '/token', '/detoken'))
        sent = request.headers.get('Authorization', '').removeprefix('Bearer ')
        if key and guarded and not hmac.compare_digest(sent.encode('latin-1', 'replace'), key):
            message = 'this server needs its key, as in "Authorization: Bearer KEY"'
            headers = {'WWW-Authenticate': 'Bearer'}
            raise Refusal(401, message, code='invalid_api_key', headers=headers)

    @app.after_request
    def leave(response):
        g, request = flask.g, flask.request
        response.headers['X-Request-Id'] = g.id
        response.headers['X-Content-Type-Options'] = 'nosniff'
        fields = {
            'id': g.id,
            'client': request.remote_addr,
            'method': request.method,
            'path': request.path,
            'status': response.status_code,
        }
        job, began, more = g.get('job'), g.began, g.fields

        def write_line():
            took = {'seconds': round(time.monotonic() - began, 4)}
            used = {**job.usage(), 'finish': [r.finish for r in job.requests]} if job else {}
            LOG.info('request', extra={'fields': fields | took | used | more})

        response.call_on_close(write_line)
        return response


def add_pages(app: flask.Flask, service: Service) -> None:
    """What people and machines look at; no key needed."""

    @app.get('/')
    def playground():
        return flask.send_file(ROOT / 'web' / 'playground.html')

    @app.get('/health')
    def health():
        return {'status': 'ok'}

    @app.get('/ready')
    def ready():
        if trouble := service.trouble():
            raise trouble
        return {'status': 'ok'}

    @app.get('/metrics')
    def metrics():
        return flask.Response(
            generate_latest(service.metrics.registry), content_type=CONTENT_TYPE_LATEST
        )


def read(kind: type[BaseModel]):
    """The body of this HTTP request, checked."""
    if flask.request.mimetype != 'application/json':
        raise Refusal(415, 'send JSON, with the header "Content-Type: application/json"')
    try:
        return kind.model_validate_json(flask.request.get_data(cache=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if not first['loc']:
            raise Refusal(400, f'the body: {first["msg"]}') from None
        param = str(first['loc'][0])
        message = first['msg']
        if param == 'prompt' and first['type'] != 'missing':
            message = 'needs a text, a list of texts, a list of token ids or a list of such lists'
        raise Refusal(400, f'{param}: {message}', param) from None


def add_api(app: flask.Flask, service: Service, settings: dict) -> None:
    engine = service.engine
    tokenizer, size = engine.tokenizer, engine.model.config.block_size
    label = service.name
    card = {
        'id': label,
        'object': 'model',
        'created': int(time.time()),
        'owned_by': 'flatgpt',
        'max_model_len': size,
    }

    def to_ids(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return tokenizer.encode(prompt, allow_eot=True).tolist()
            except UserError as error:
                raise Refusal(400, f'prompt: {error}', 'prompt') from None
        if max(prompt, default=0) >= tokenizer.vocab_size:
            most = tokenizer.vocab_size
            raise Refusal(400, f'prompt: {max(prompt)} is no token; there are {most}', 'prompt')
        return prompt

    def check_lengths(prompts: list[list[int]], new: int) -> None:
        longest = max(map(len, prompts))
        if longest + new > size:
            raise Refusal(
                400,
                f'the prompt has {longest} tokens, and max_tokens={new} more make '
                f'{longest + new}; the context of this model is {size}',
                'prompt' if longest >= size else 'max_tokens',
                'context_length_exceeded',
            )
        for count, setting, param in (
            (longest, 'max_prompt_tokens', 'prompt'),
            (new, 'max_new_tokens', 'max_tokens'),
        ):
            most = settings[setting]
            if most is not None and count > most:
                raise Refusal(400, f'{param}: {count} tokens; this server takes {most}', param)

    def begin(body: schema.CompletionRequest) -> Job:
        if body.max_tokens == 0 and not body.echo:
            raise Refusal(400, 'max_tokens: 0 needs echo', 'max_tokens')
        prompts = body.prompts()
        if len(prompts) * (body.n or 1) > service.most:
            param = 'n' if body.n and body.n > 1 else 'prompt'
            raise Refusal(400, f'{param}: at most {service.most} texts in a request', param)
        if body.logit_bias and max(body.logit_bias) >= tokenizer.vocab_size:
            raise Refusal(400, f'logit_bias: there are {tokenizer.vocab_size} tokens', 'logit_bias')
        ids = [to_ids(prompt) for prompt in prompts]
        check_lengths(ids, 16 if body.max_tokens is None else body.max_tokens)
        gone = flask.request.environ.get('waitress.client_disconnected', lambda: False)
        job = Job(ids, body, gone)
        service.start(job)
        flask.g.job = job
        return job

    @app.post('/v1/completions')
    def completions():
        body = read(schema.CompletionRequest)
        job = begin(body)
        answers = [Answer(request, tokenizer, bool(body.echo)) for request in job.requests]
        head = {
            'id': f'cmpl-{flask.g.id}',
            'object': 'text_completion',
            'created': int(time.time()),
            'model': label,
        }
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            frames = stream(service, job, answers, head, usage)
            response = flask.Response(frames, content_type='text/event-stream; charset=utf-8')
            response.headers['Cache-Control'] = 'no-cache'
            response.headers['X-Accel-Buffering'] = 'no'
            response.call_on_close(lambda: service.release(job))
            return response
        try:
            job.finished.wait()
            if failure := service.failure(job):
                raise failure
        finally:
            service.release(job)
        pieces: list[list[Piece]] = [[] for _ in answers]
        for piece in job.pieces:
            pieces[piece.row].append(piece)
        choices = [a.choice(mine) for a, mine in zip(answers, pieces, strict=True)]
        return {**head, 'choices': choices, 'usage': job.usage()}

    @app.post('/v1/chat/completions')
    def chat():
        raise Refusal(400, 'this model has no chat template', 'messages', 'no_chat_template')

    @app.get('/v1/models')
    def models():
        return {'object': 'list', 'data': [card]}

    @app.get('/v1/models/<path:which>')
    def one_model(which):
        if which != label:
            raise Refusal(404, f'there is no model {which!r}; this is {label!r}', 'model')
        return card

    @app.get('/tokenizer_info')
    def tokenizer_info():
        end = None if tokenizer.eot is None else EOT
        return {
            'name': tokenizer.name,
            'vocab_size': tokenizer.vocab_size,
            'bos_token': end,
            'eos_token': end,
            'pad_token': end,
            'chat_template': None,
        }

    @app.post('/tokenize')
    def tokenize():
        ids = to_ids(read(schema.TokenizeRequest).prompt)
        return {'tokens': ids, 'count': len(ids), 'max_model_len': size}

    @app.post('/detokenize')
    def detokenize():
        return {'prompt': tokenizer.decode(to_ids(read(schema.DetokenizeRequest).tokens))}


# -----------------------------------------------------------------------------
# the server


class JsonLines(logging.Formatter):
    """A line of the log as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))
        line = {
            'time': f'{moment}.{record.msecs:03.0f}Z',
            'level': record.levelname.lower(),
            'message': record.getMessage(),
            **getattr(record, 'fields', {}),
        }
        if record.exc_info:
            line['traceback'] = self.formatException(record.exc_info)
        return json.dumps(line)


class JsonErrorTask(ErrorTask):
    """What waitress answers by itself: no HTTP, or too much of it."""

    def execute(self):
        error = self.request.error
        body = json.dumps(Refusal(error.code, f'{error.reason}: {error.body}').body).encode()
        self.status = f'{error.code} {error.reason}'
        self.response_headers.append(('Content-Type', 'application/json'))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    error_task_class = JsonErrorTask


def listen(settings: dict) -> socket.socket:
    """A socket at the host and port asked for; UserError if it may not be or cannot be."""
    where, at = settings['host'], settings['port']
    try:
        family, _, _, _, address = socket.getaddrinfo(where, at, type=socket.SOCK_STREAM)[0]
        if not (ipaddress.ip_address(address[0]).is_loopback or key_of(settings)):
            raise ConfigError(
                f'host={where}: others could reach it, so set a key that clients must send, with '
                'FLATGPT_API_KEY or --api_key='
            )
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        text = error.strerror or error
        raise UserError(f'--host={where} --port={at}: {text}; try another --port') from error


def serve(app: flask.Flask, listener: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C, and then until all that has begun is answered."""
    service = app.extensions['flatgpt']
    channels: dict = {}
    server = waitress.create_server(
        app,
        map=channels,
        sockets=[listener],
        threads=service.most + SPARE,  # a text holds one; 429 and /health need others
        connection_limit=1000,
        channel_request_lookahead=1,  # without it, nobody notices a client that left
        max_request_body_size=app.config['MAX_CONTENT_LENGTH'],
        ident='flatgpt',
    )
    server.channel_class = Channel

    def stop(number, stack):
        if service.draining:
            raise SystemExit(128 + number)
        service.draining = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

    def busy():
        channels = list(server.active_channels.values())
        return any(channel.requests or channel.total_outbufs_len for channel in channels)

    while not service.draining or service.jobs or busy():
        wasyncore.loop(0.5, use_poll=hasattr(select, 'poll'), map=channels, count=1)
    service.close()


def main(settings: dict) -> None:
    check(settings)
    listener = listen(settings)
    app = create_app(**settings)
    service = app.extensions['flatgpt']
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    LOG.setLevel(logging.INFO)
    logging.getLogger('waitress.queue').setLevel(logging.ERROR)  # a line for each that waits
    address, number = listener.getsockname()[:2]
    address = f'[{address}]' if ':' in address else address
    print(f'{service.name} at http://{address}:{number}', flush=True)
    rows = len(service.engine.slots)
    print(
        f'limits: {rows} texts at once and {settings["max_queue"]} that wait, context '
        f'{service.engine.model.config.block_size}, {settings["max_body"]:g} MiB and '
        f'{settings["max_seconds"]:g} s a request; '
        + ('a key is needed' if key_of(settings) else 'no key, this machine only'),
        flush=True,
    )
    serve(app, listener)


if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:]))
