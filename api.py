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

import hmac
import re
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import flask
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from configurator import configure, known, read_settings
from flatgpt import ROOT
from flatgpt.data.tokenizer import EOT, Tokenizer
from flatgpt.errors import ConfigError, UserError, within
from flatgpt.inference.engine import Engine
from flatgpt.serving import schema
from flatgpt.serving.http_server import (
    CONNECTIONS,
    Server,
    StartupApp,
    allow_open_files,
    drain_on_signals,
    listen,
    log_to_stderr,
    wait_until_drained,
)
from flatgpt.serving.service import LOG, APIError, Chat, Service, key_of
from model import GPT
from sample import load, source

# -----------------------------------------------------------------------------
# model
out_dir: str | None = None  # folder of the run; None is the newest run below out/
init_from = 'resume'  # without out_dir: a run's folder, or gpt2, gpt2-xl ...
checkpoint: str | None = None  # None or 'best' (lowest validation loss), 'last', or a path
tokenizer: str | None = None  # not the model's own: a name, tokenizer.json or meta.pkl
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
chunk = 256  # tokens of prompts computed between two tokens of the texts: more for throughput
deterministic = False  # the same bits for a text whatever else is computed; slower
# -----------------------------------------------------------------------------


PAGE = ROOT / 'flatgpt' / 'serving'
SWAGGER = Path(find_spec('flask_openapi3_swagger').origin).parent / 'templates' / 'swagger'
DOCS = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>flatGPT: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<body>
<div id="ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({url: 'openapi.json', dom_id: '#ui', validatorUrl: null, deepLinking: true})
</script>
"""


# -----------------------------------------------------------------------------
# the application


def create_app(loaded: tuple[GPT, Tokenizer] | None = None, **given) -> flask.Flask:
    """The WSGI application. given: settings of this file. loaded: a model, else they say which.

    For a server of one process, with a thread for each text. What listens, `host` and `port`, and
    what ends are that server's; a client that leaves may be noticed no sooner than it is sent to.
    """
    settings = {name: globals()[name] for name in read_settings(__file__)}
    for key in given:
        known(key, settings, f'create_app({key}=)')
        if key in ('host', 'port'):
            raise ConfigError(f'create_app({key}=): the server that runs it has its own; leave out')
    settings |= given
    check(settings)
    return build(loaded, settings)


def build(loaded: tuple[GPT, Tokenizer] | None, settings: dict) -> flask.Flask:
    if loaded is None:
        settings['name'] = settings['name'] or Path(source(settings)[0]).name
    settings['name'] = settings['name'] or 'flatgpt'
    # GNU OpenMP keeps a team of workers for each thread that ever computed, as long as that lives;
    # where they are more than the cores, the engine's would sleep between any two products
    with ThreadPoolExecutor(1) as brief:
        engine = brief.submit(make_engine, loaded, settings).result()
    app = flask.Flask('flatgpt', static_folder=None)
    app.extensions['flatgpt'] = Service(engine, settings)
    app.config['MAX_CONTENT_LENGTH'] = int(settings['max_body'] * 2**20)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    app.json.sort_keys = False
    app.register_blueprint(routes)
    return app


def make_engine(loaded: tuple[GPT, Tokenizer] | None, settings: dict) -> Engine:
    model, tokenizer = loaded or load(settings)
    on_cpu = model.embedding.weight.device.type == 'cpu'
    rows, always = settings['max_rows'] or (8 if on_cpu else 32), settings['deterministic']
    try:
        return Engine(model, tokenizer, rows, settings['chunk'], deterministic=always)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f'max_rows={rows}: so many do not fit into memory; try fewer') from error


def check(settings: dict) -> None:
    within(1, None, settings, 'max_rows', 'max_prompt_tokens', 'max_new_tokens', 'chunk')
    within(0, None, settings, 'max_queue')
    within(0, 65535, settings, 'port')
    within(0.001, None, settings, 'max_seconds', 'max_body')


routes = flask.Blueprint('flatgpt', __name__)


def here() -> Service:
    return flask.current_app.extensions['flatgpt']


# --- around every request


@routes.before_app_request
def enter():
    """Name the request, and let it in if it needs no key or has it."""
    g, headers = flask.g, flask.request.headers
    given = headers.get('X-Request-Id', '')
    g.id = given if re.fullmatch(r'[\w.-]{1,64}', given, re.ASCII) else secrets.token_hex(12)
    g.began, g.job, g.code = time.monotonic(), None, None
    guarded = flask.request.path.startswith(('/v1/', '/tokenize', '/detokenize'))
    key, sent = key_of(here().settings), headers.get('Authorization', '').removeprefix('Bearer ')
    if key and guarded and not hmac.compare_digest(sent.encode('latin-1', 'replace'), key.encode()):
        message = 'send the key of this server, as in "Authorization: Bearer KEY"'
        challenge = {'WWW-Authenticate': 'Bearer'}
        raise APIError(401, message, code='invalid_api_key', headers=challenge)


@routes.after_app_request
def leave(response):
    g, request, with_text = flask.g, flask.request, here().settings['log_prompts']
    response.direct_passthrough = False  # which would never be closed
    response.headers['X-Request-Id'] = g.id
    response.headers['X-Content-Type-Options'] = 'nosniff'
    response.headers['Content-Security-Policy'] = "default-src 'self' 'unsafe-inline' data:"
    line = {
        'id': g.id,
        'client': request.remote_addr,
        'method': request.method,
        'path': request.path,
        'status': response.status_code,
        **({'code': g.code} if g.code else {}),
    }

    @response.call_on_close
    def write_line(job=g.job, began=g.began):
        took = {'seconds': round(time.monotonic() - began, 4)}
        fields = line | took | (job.record(with_text) if job else {})
        LOG.info('request', extra={'fields': fields})

    return response


@routes.app_errorhandler(APIError)
def answer_error(error: APIError):
    here().metrics.rejected.labels(error.status).inc()
    flask.g.code = error.code  # for the log
    return error.body, error.status, error.headers


@routes.app_errorhandler(HTTPException)
def answer_http_error(error: HTTPException):
    said = {
        404: f'there is no {flask.request.path}; /docs shows what there is',
        405: f'{flask.request.path} does not take {flask.request.method}',
        413: f'the body has more than {here().settings["max_body"]:g} MiB',
    }
    allow = {name: value for name, value in error.get_headers() if name == 'Allow'}
    message = said.get(error.code, error.description)
    return answer_error(APIError(error.code, message, headers=allow))


@routes.app_errorhandler(Exception)
def answer_unforeseen(error: Exception):
    LOG.error('%s %s', flask.request.method, flask.request.path, exc_info=error)
    return answer_error(APIError(500, 'this should not have happened; the log has the details'))


# --- what people and machines look at


@routes.get('/')
def playground():
    return flask.send_from_directory(PAGE, 'playground.html')


@routes.get('/docs')
def docs():
    return DOCS


@routes.get('/docs/<file>')
def docs_file(file: str):
    folder = {'css': 'css', 'js': 'js'}.get(file.rpartition('.')[2], '')
    return flask.send_from_directory(SWAGGER / folder, file, max_age=3600)


@routes.get('/openapi.json')
def openapi():
    return schema.openapi(here().name)


@routes.get('/health')
def health():
    return {'status': 'ok'}


@routes.get('/ready')
def ready():
    if trouble := here().trouble():
        raise trouble
    return {'status': 'ok'}


@routes.get('/metrics')
def metrics():
    figures = generate_latest(here().metrics.registry)
    return flask.Response(figures, content_type=CONTENT_TYPE_LATEST)


# --- the model


def read(kind: type[BaseModel]):
    """The body of this HTTP request, checked."""
    if flask.request.mimetype != 'application/json':
        raise APIError(415, 'send JSON, with the header "Content-Type: application/json"')
    try:
        return kind.model_validate_json(flask.request.get_data(cache=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message, param = first['msg'], '.'.join(map(str, first['loc'][:1])) or None
    if param == 'prompt' and first['type'] != 'missing':
        message = 'must be a text, token ids, or a list of either, none of them empty'
    raise APIError(400, f'{param or "the body"}: {message}', param)


@routes.post('/v1/completions')
def completions():
    return answer(read(schema.CompletionRequest), 'cmpl', 'text_completion')


@routes.post('/v1/chat/completions')
def chat_completions():
    body, service = read(schema.ChatRequest), here()
    ids, end = service.conversation(body.messages)
    asked = body.completion(ids, service.size - len(ids), end)
    kind = 'chat.completion.chunk' if body.stream else 'chat.completion'
    return answer(asked, 'chatcmpl', kind, Chat('delta' if body.stream else 'message'))


def answer(body: schema.CompletionRequest, prefix: str, kind: str, shape=None):
    """The texts of a completion, whole or as they come; shape: of its choices, if another's."""
    service, g = here(), flask.g
    disconnected = flask.request.environ.get('waitress.client_disconnected', lambda: False)
    job = g.job = service.begin(body, disconnected, shape)
    head = {
        'id': f'{prefix}-{g.id}',
        'object': kind,
        'created': int(time.time()),
        'model': service.name,
    }
    if not body.stream:
        try:
            return job.whole(head)
        finally:
            service.release(job)
    response = flask.Response(job.frames(head), content_type='text/event-stream; charset=utf-8')
    response.headers['Cache-Control'] = 'no-cache'
    response.headers['X-Accel-Buffering'] = 'no'  # nginx would hold it back
    # a generator that is closed before its first frame never comes to a `finally`
    response.call_on_close(lambda: service.release(job))
    return response


def card(service: Service) -> dict:
    return {
        'id': service.name,
        'object': 'model',
        'created': service.began,
        'owned_by': 'flatgpt',
        'max_model_len': service.size,
    }


@routes.get('/v1/models')
def models():
    return {'object': 'list', 'data': [card(here())]}


@routes.get('/v1/models/<path:which>')
def one_model(which: str):
    if which != here().name:
        raise APIError(404, f'there is no model {which!r}; this is {here().name!r}', 'model')
    return card(here())


@routes.get('/tokenizer_info')
def tokenizer_info():
    tokenizer = here().tokenizer
    end = None if tokenizer.eot is None else EOT
    special = dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), end)
    about = {'name': tokenizer.name, 'vocab_size': tokenizer.vocab_size}
    return about | special | {'chat_template': tokenizer.chat_template}


@routes.post('/tokenize')
def tokenize():
    ids = here().to_ids(read(schema.TokenizeRequest).prompt, 'prompt')
    return {'tokens': ids, 'count': len(ids), 'max_model_len': here().size}


@routes.post('/detokenize')
def detokenize():
    ids = here().to_ids(read(schema.DetokenizeRequest).tokens, 'tokens')
    return {'prompt': here().tokenizer.decode(ids)}


# -----------------------------------------------------------------------------
# its own server


def main(settings: dict) -> None:
    check(settings)
    allow_open_files(4 * CONNECTIONS)
    startup, listener = StartupApp(), listen(settings)
    server = Server(startup, listener, settings['max_body'])
    app = build(None, settings)
    service, (address, number) = app.extensions['flatgpt'], listener.getsockname()[:2]
    server.expect(service.most)
    log_to_stderr()
    drain_on_signals(service)
    startup.app = app
    address = f'[{address}]' if ':' in address else address
    print(f'{service.name} at http://{address}:{number}, documentation at /docs')
    print(
        f'{len(service.engine.slots)} texts at once, {settings["max_queue"]} more wait, of '
        f'{service.size} tokens; {settings["max_body"]:g} MiB and {settings["max_seconds"]:g} '
        f's a request; {"with a key" if key_of(settings) else "no key"}',
        flush=True,
    )
    wait_until_drained(service, server)
    server.close()
    service.close()


if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:]))
