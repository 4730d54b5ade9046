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

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flatgpt.errors import ConfigError, UserError, one_line_errors, within

if __name__ == '__main__':
    one_line_errors()  # also for a package that is missing, of those that only serving needs

import flask
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from configurator import check_known, configure, read_settings, update_settings
from flatgpt import ROOT
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.engine import Engine
from flatgpt.runtime import is_out_of_memory
from flatgpt.serving import middleware, schema
from flatgpt.serving.api_error import APIError
from flatgpt.serving.choices import ChatBuilder, ChoiceBuilder
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
from flatgpt.serving.middleware import current_service
from flatgpt.serving.openapi import (
    ACCESS_ERRORS,
    BODY_ERRORS,
    DOCS_PAGE,
    ENGINE_ERRORS,
    KEY,
    SWAGGER,
    Answers,
    api,
    document,
)
from flatgpt.serving.origins import Origins
from flatgpt.serving.service import Service, fewer_rows, key_of
from model import GPT
from sample import checkpoint_source, load

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
allow_origins: str | None = None  # pages that browsers let use it; None: with a key all, else local
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

# of a model that is to be loaded
OF_A_MODEL = ('out_dir', 'init_from', 'checkpoint', 'tokenizer', 'dtype', 'quantize')

# -----------------------------------------------------------------------------
# the application


def create_app(loaded: tuple[GPT, Tokenizer] | None = None, **given) -> flask.Flask:
    """The WSGI application. given: settings of this file. loaded: a model, else they say which.

    For a server of one process, with a thread for each text. What listens, `host` and `port`, and
    what ends are that server's; a client that leaves may be noticed no sooner than it is sent to.
    """
    settings = {name: globals()[name] for name in read_settings(__file__)}
    for key in given:
        check_known(key, settings, f'create_app({key}=)')
        if key in ('host', 'port'):
            raise ConfigError(f'create_app({key}=): the server that runs it has its own; leave out')
        if loaded and key in OF_A_MODEL and given[key] != settings[key]:
            raise ConfigError(f'create_app({key}=): the model is given, and stays so; leave out')
    settings = update_settings(__file__, settings, given, 'create_app({}=)')
    check(settings)
    return build(loaded, settings | {'host': None, 'port': None})


def build(loaded: tuple[GPT, Tokenizer] | None, settings: dict) -> flask.Flask:
    if loaded is None:
        settings['name'] = settings['name'] or Path(checkpoint_source(settings)[0]).name
    settings['name'] = settings['name'] or 'flatgpt'
    # GNU OpenMP keeps a team of workers for each thread that ever computed, as long as that lives;
    # where they are more than the cores, the engine's would sleep between any two products
    with ThreadPoolExecutor(1) as brief:
        engine = brief.submit(make_engine, loaded, settings).result()
    app = flask.Flask('flatgpt', static_folder=None)
    app.extensions['flatgpt'] = Service(engine, settings)
    app.extensions['origins'] = Origins(settings)
    app.config['MAX_CONTENT_LENGTH'] = int(settings['max_body'] * 2**20)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    app.json.sort_keys = False
    app.register_blueprint(middleware.blueprint)
    app.register_blueprint(routes)
    app.extensions['openapi'] = document(app, f'flatGPT: {settings["name"]}')
    return app


def make_engine(loaded: tuple[GPT, Tokenizer] | None, settings: dict) -> Engine:
    model, tokenizer = loaded or load(settings)
    on_cpu = model.embedding.weight.device.type == 'cpu'
    rows, always = settings['max_rows'] or (8 if on_cpu else 32), settings['deterministic']
    try:
        return Engine(model, tokenizer, rows, settings['chunk'], deterministic=always)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        text = f'max_rows={rows}: so many do not fit into memory; try {fewer_rows(rows)}'
        raise UserError(text) from error


def check(settings: dict) -> None:
    within(1, None, settings, 'max_rows', 'max_prompt_tokens', 'max_new_tokens', 'chunk')
    within(0, None, settings, 'max_queue')
    within(0, 65535, settings, 'port')
    within(0.001, None, settings, 'max_seconds', 'max_body')
    Origins(settings)  # raises for one that cannot be


# -----------------------------------------------------------------------------
# the routes; those declared with @api.validate are in the OpenAPI document, and it reads their body

routes = flask.Blueprint('flatgpt', __name__)


@routes.get('/')
def playground():
    return flask.send_from_directory(ROOT / 'flatgpt' / 'serving', 'playground.html')


@routes.get('/docs')
def docs():
    return DOCS_PAGE


@routes.get('/docs/<file>')
def docs_file(file: str):
    folder = {'css': 'css', 'js': 'js'}.get(file.rpartition('.')[2], '')
    return flask.send_from_directory(SWAGGER / folder, file, max_age=3600)


@routes.get('/openapi.json')
def openapi():
    return flask.current_app.extensions['openapi']


@routes.get('/health')
@api.validate(resp=Answers(schema.Status))
def health():
    """Whether the process lives."""
    return {'status': 'ok'}


@routes.get('/ready')
@api.validate(resp=Answers(schema.Status, 503))
def ready():
    """Whether it can compute."""
    if trouble := current_service().trouble():
        raise trouble
    return {'status': 'ok'}


@routes.get('/metrics')
@api.validate(resp=Answers(None, other={'text/plain': 'flatgpt_slots 8.0\n'}))
def metrics():
    """Figures for Prometheus."""
    figures = generate_latest(current_service().metrics.registry)
    return flask.Response(figures, content_type=CONTENT_TYPE_LATEST)


@routes.post('/v1/completions')
@api.validate(
    resp=Answers(schema.CompletionResponse, *BODY_ERRORS, *ENGINE_ERRORS, stream=True),
    security=KEY,
)
def completions(json: schema.CompletionRequest):
    """Continue texts. With stream, the answer comes as server-sent events."""
    return answer(json, 'cmpl', 'text_completion')


@routes.post('/v1/chat/completions')
@api.validate(
    resp=Answers(schema.ChatResponse, *BODY_ERRORS, *ENGINE_ERRORS, stream=True),
    security=KEY,
)
def chat_completions(json: schema.ChatRequest):
    """Answer a conversation, if the tokenizer has a chat template; else 400."""
    service = current_service()
    ids, end = service.conversation(json.messages)
    body = json.completion(ids, service.room(ids), end)
    kind, part = 'chat.completion', 'message'
    if body.stream:
        kind, part = 'chat.completion.chunk', 'delta'
    return answer(body, 'chatcmpl', kind, partial(ChatBuilder, part))


def answer(body: schema.CompletionRequest, prefix: str, kind: str, builder=ChoiceBuilder):
    """The texts of a completion, whole or as they come; builder: of its choices."""
    service, g = current_service(), flask.g
    disconnected = flask.request.environ.get('waitress.client_disconnected', lambda: False)
    job = g.job = service.begin(body, disconnected, builder)
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


@routes.get('/v1/models')
@api.validate(resp=Answers(schema.ModelList, *ACCESS_ERRORS), security=KEY)
def models():
    """A list of the one model."""
    return {'object': 'list', 'data': [current_service().card()]}


@routes.get('/v1/models/<path:model>')
@api.validate(resp=Answers(schema.Model, *ACCESS_ERRORS, 404), security=KEY)
def one_model(model: str):
    """The model, by its name."""
    service = current_service()
    if model != service.name:
        raise APIError(404, f'there is no model {model!r}; this is {service.name!r}', 'model')
    return service.card()


@routes.get('/tokenizer_info')
@api.validate(resp=Answers(schema.TokenizerInfo, *ACCESS_ERRORS), security=KEY)
def tokenizer_info():
    """The vocabulary and its special tokens."""
    tokenizer = current_service().tokenizer
    special = dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), tokenizer.eot_text)
    about = {'name': tokenizer.name, 'vocab_size': tokenizer.vocab_size}
    return about | special | {'chat_template': tokenizer.chat_template}


@routes.post('/tokenize')
@api.validate(resp=Answers(schema.TokenizeResponse, *BODY_ERRORS), security=KEY)
def tokenize(json: schema.TokenizeRequest):
    """The token ids of a text."""
    service = current_service()
    ids = service.to_ids(json.prompt, 'prompt')
    return {'tokens': ids, 'count': len(ids), 'max_model_len': service.size}


@routes.post('/detokenize')
@api.validate(resp=Answers(schema.DetokenizeResponse, *BODY_ERRORS), security=KEY)
def detokenize(json: schema.DetokenizeRequest):
    """The text of token ids."""
    service = current_service()
    return {'prompt': service.tokenizer.decode(service.to_ids(json.tokens, 'tokens'))}


# -----------------------------------------------------------------------------
# its own server


def main(settings: dict) -> None:
    check(settings)
    allow_open_files(4 * CONNECTIONS)
    startup, listener = StartupApp(origins=Origins(settings)), listen(settings)
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
