"""
Serve a model over HTTP, with OpenAI's completions API.

$ python api.py                                      # the newest run in out/, this machine only
$ python api.py --out_dir=out/my_run --port=8080
$ FLATGPT_API_KEY=secret python api.py --host=0.0.0.0

$ curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"prompt": "To be", "max_tokens": 32, "stream": true}'

http://127.0.0.1:8000/ is a playground, /docs documents the API, /metrics is for Prometheus.
For other WSGI servers: create_app(out_dir='out/my_run') returns the application.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from flatgpt.errors import ConfigError, UserError, check_range, counted, one_line_errors

if __name__ == '__main__':
    one_line_errors()  # before the imports, which may lack a package that only serving needs

import flask
import torch
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from configurator import check_known, configure, setting_annotations, update_settings
from flatgpt import ROOT
from flatgpt.checkpoint.load import read_adapters
from flatgpt.data.tokenizer import Tokenizer
from flatgpt.inference.adapters import adapted_model
from flatgpt.inference.engine import Engine
from flatgpt.runtime import is_out_of_memory
from flatgpt.serving import middleware, schema
from flatgpt.serving.api_error import APIError
from flatgpt.serving.choices import ChatBuilder, ChoiceBuilder, ToolBuilder
from flatgpt.serving.engines import memory_advice
from flatgpt.serving.http_server import (
    CONNECTIONS,
    Server,
    StartupApp,
    allow_open_files,
    drain_on_signals,
    listen,
    log_to_stderr,
    reload_on_signal,
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
    Responses,
    api,
    document,
)
from flatgpt.serving.origins import Origins
from flatgpt.serving.service import Service, api_key_of
from model import GPT
from sample import checkpoint_source, load, load_draft

# -----------------------------------------------------------------------------
# model
out_dir: str | None = None  # run directory or other model; None: that of init_from
init_from = 'resume'  # without out_dir: 'resume' (the newest run in out/), a run, or gpt2 ...
checkpoint: str | None = None  # None or 'best' (lowest validation loss), 'last', or a path
tokenizer: str | None = None  # replaces the model's own: a name, tokenizer.json or meta.pkl
device = 'auto'  # 'cpu', 'mps', 'cuda', 'cuda:1' ...; 'auto': a GPU if there is one
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; 'auto': the fastest that is safe on the device
# 'int8': weights in half the memory of 16 bits; faster on a CPU for few completions, not on a GPU
quantize: str | None = None
# guesses tokens, to compute several at once with the same result: 'ngram' from the text itself, a
# run from a smaller model with the same tokenizer; None: no guesses; without effect on a GPU
draft: str | None = None
name: str | None = None  # the model's name for clients; None: the name of its folder
adapters: str | None = None  # LoRA adapters of it, name:path with commas; clients choose by `model`
# server
host = '127.0.0.1'  # address to listen on; one that other machines can reach needs an API key
port = 8000  # port to listen on; 0: any free one
api_key: str | None = None  # API key that clients must send; None: FLATGPT_API_KEY, if set
allow_origins: str | None = None  # allowed CORS origins; None: any if there is a key, else local
log_prompts = False  # write prompts and completions to the log
# limits
max_rows: int | None = None  # completions that run at once; None: 8 on a CPU, 32 on a GPU
max_queue = 128  # completions that may wait for their turn; more get status 429
max_prompt_tokens: int | None = None  # limit for each prompt; None: the model's context
max_new_tokens: int | None = None  # limit for each completion; None: the model's context
max_seconds = 600.0  # time limit of a request, until its last token
max_body = 4.0  # MiB in the body of a request
chunk = 256  # prompt tokens per step, between decoding steps; more raises throughput and latency
deterministic = False  # compute each completion bit for bit the same under any load; slower
# -----------------------------------------------------------------------------

# settings that load a model
MODEL_SETTINGS = (
    'out_dir', 'init_from', 'checkpoint', 'tokenizer', 'device', 'dtype', 'quantize', 'adapters',
)  # fmt: skip

# -----------------------------------------------------------------------------
# the application


def create_app(loaded: tuple[GPT, Tokenizer] | None = None, **changes) -> flask.Flask:
    """The WSGI application. changes: settings of this file. loaded: a model to use, if any.

    The WSGI server must run one process, with a thread for each completion. It sets the address
    and handles signals. Depending on it, a disconnected client is detected at the next write.
    """
    settings = {name: globals()[name] for name in setting_annotations(__file__)}
    for key in changes:
        check_known(key, settings, f'create_app({key}=)')
        if key in ('host', 'port'):
            raise ConfigError(f'create_app({key}=): the WSGI server sets its address; omit it')
        same = changes[key] == settings[key]
        if loaded and key == 'device':
            same |= is_device(changes[key], loaded[0].embedding.weight.device)
        if loaded and key in MODEL_SETTINGS and not same:
            raise ConfigError(f'create_app({key}=): the model is already loaded; omit it')
    settings = update_settings(__file__, settings, changes, 'create_app({}=)')
    check_settings(settings)
    return build_app(loaded, settings | {'host': None, 'port': None})


def is_device(name: str, device: torch.device) -> bool:
    """Whether the setting `device` is this one: 'cuda' is the current GPU, such as 'cuda:0'."""
    try:
        given = torch.device(name)
    except (RuntimeError, TypeError):
        return False
    if given.type != device.type or given.index is not None:
        return given == device
    return given.type != 'cuda' or torch.cuda.current_device() == device.index


def build_app(loaded: tuple[GPT, Tokenizer] | None, settings: dict) -> flask.Flask:
    if loaded is None:
        settings['name'] = settings['name'] or Path(checkpoint_source(settings)[0]).name
    settings['name'] = settings['name'] or 'flatgpt'

    def build() -> Engine:
        # GNU OpenMP keeps a team of workers for each live thread that has computed. With more
        # workers than cores, the engine's would sleep between any two matmuls. This thread ends.
        with ThreadPoolExecutor(1) as temporary:
            return temporary.submit(build_engine, loaded, settings).result()

    app = flask.Flask('flatgpt', static_folder=None)
    app.extensions['flatgpt'] = Service(build(), settings, None if loaded else build)
    app.extensions['origins'] = Origins(settings)
    app.config['MAX_CONTENT_LENGTH'] = int(settings['max_body'] * 2**20)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    app.json.sort_keys = False
    app.register_blueprint(middleware.blueprint)
    app.register_blueprint(routes)
    app.extensions['openapi'] = document(app, f'flatGPT: {settings["name"]}')
    return app


def build_engine(loaded: tuple[GPT, Tokenizer] | None, settings: dict) -> Engine:
    paths, layers = parse_adapters(settings), {}
    base = loaded or checkpoint_source(settings)[0]
    read = lambda model: layers.update(read_adapters(paths, model, base))  # noqa: E731
    model, tokenizer = loaded or load(settings, read)
    adapters = {name: adapted_model(model, found) for name, found in layers.items()}
    draft = load_draft(settings, tokenizer)
    on_cpu = model.embedding.weight.device.type == 'cpu'
    slots, deterministic = settings['max_rows'] or (8 if on_cpu else 32), settings['deterministic']
    try:
        engine = Engine(
            model,
            tokenizer,
            slots,
            settings['chunk'],
            deterministic=deterministic,
            draft=draft,
            adapters=adapters,
        )
        begin = time.monotonic()
        if graphs := engine.capture_graphs():
            seconds = time.monotonic() - begin
            print(f'captured {graphs} CUDA graphs in {seconds:.1f} s', file=sys.stderr, flush=True)
        return engine
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = f'max_rows={slots}: the cache does not fit in memory; try {memory_advice(slots)}'
        raise UserError(message) from error


def parse_adapters(settings: dict) -> dict[str, str]:
    """{name: path} of the setting `adapters`; ConfigError if it has another form."""
    text = settings['adapters']
    pairs = [part.strip().partition(':') for part in (text or '').split(',') if part.strip()]
    names = [name for name, _, _ in pairs]
    if any(not (name and path) for name, _, path in pairs) or len({*names}) < len(names):
        raise ConfigError(
            f'adapters={text!r}: must be name:path, with commas between; each name once'
        )
    if settings['name'] in names:
        raise ConfigError(f'adapters={text!r}: {settings["name"]} is the base; choose another name')
    return {name: path for name, _, path in pairs}


def check_settings(settings: dict) -> None:
    check_range(1, None, settings, 'max_rows', 'max_prompt_tokens', 'max_new_tokens', 'chunk')
    check_range(0, None, settings, 'max_queue')
    check_range(0, 65535, settings, 'port')
    check_range(0.001, None, settings, 'max_seconds', 'max_body')
    if settings['deterministic'] and settings['draft']:
        raise ConfigError(
            f'draft={settings["draft"]}: deterministic=True computes tokens one by one; omit one '
            'of the two'
        )
    Origins(settings)  # ConfigError for an invalid origin
    parse_adapters(settings)


# -----------------------------------------------------------------------------
# routes: @api.validate reads the body and adds the route to the OpenAPI document

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
@api.validate(resp=Responses(schema.Status))
def health():
    """Check that the process is alive."""
    return {'status': 'ok'}


@routes.get('/ready')
@api.validate(resp=Responses(schema.Status, 503))
def ready():
    """Check that the model can run."""
    if error := current_service().unavailable():
        raise error
    return {'status': 'ok'}


@routes.get('/metrics')
@api.validate(resp=Responses(None, other={'text/plain': 'flatgpt_slots 8.0\n'}))
def metrics():
    """Metrics for Prometheus."""
    content = generate_latest(current_service().metrics.registry)
    return flask.Response(content, content_type=CONTENT_TYPE_LATEST)


@routes.post('/v1/completions')
@api.validate(
    resp=Responses(schema.CompletionResponse, *BODY_ERRORS, *ENGINE_ERRORS, stream=True),
    security=KEY,
)
def completions(json: schema.CompletionRequest):
    """Complete prompts. With stream, the response is sent as server-sent events."""
    return respond(json, 'cmpl', 'text_completion')


@routes.post('/v1/chat/completions')
@api.validate(
    resp=Responses(schema.ChatResponse, *BODY_ERRORS, *ENGINE_ERRORS, stream=True),
    security=KEY,
)
def chat_completions(json: schema.ChatRequest):
    """Respond to a conversation. The tokenizer must have a chat template."""
    service = current_service()
    ids, end = service.encode_messages(json)
    body = json.completion(ids, service.max_new_tokens(ids), end)
    kind, part = 'chat.completion', 'message'
    if body.stream:
        kind, part = 'chat.completion.chunk', 'delta'
    builder = partial(ToolBuilder if json.calls_tools else ChatBuilder, part)
    return respond(body, 'chatcmpl', kind, builder, json.tool_grammars())


def respond(
    body: schema.CompletionRequest, prefix: str, kind: str, builder=ChoiceBuilder, grammars=()
):
    """The response to a completion request, or its stream. builder: makes the choices."""
    service, g = current_service(), flask.g
    disconnected = flask.request.environ.get('waitress.client_disconnected', lambda: False)
    job = g.job = service.submit(body, disconnected, builder, grammars)
    envelope = {
        'id': f'{prefix}-{g.id}',
        'object': kind,
        'created': int(time.time()),
        'model': job.requests[0].adapter or service.name,
    }
    if not body.stream:
        try:
            return job.response(envelope)
        finally:
            service.release(job)
    events = job.events(envelope)
    response = flask.Response(events, content_type='text/event-stream; charset=utf-8')
    response.headers['Cache-Control'] = 'no-cache'
    response.headers['X-Accel-Buffering'] = 'no'  # or nginx would buffer the stream
    # not in a `finally` of the generator, which never runs if the generator was not started
    response.call_on_close(lambda: service.release(job))
    return response


@routes.get('/v1/models')
@api.validate(resp=Responses(schema.ModelList, *ACCESS_ERRORS), security=KEY)
def models():
    """List the model, and its adapters."""
    service = current_service()
    return {'object': 'list', 'data': [service.model_info(name) for name in service.names]}


@routes.get('/v1/models/<path:model>')
@api.validate(resp=Responses(schema.Model, *ACCESS_ERRORS, 404), security=KEY)
def one_model(model: str):
    """Describe the model with this name."""
    service = current_service()
    service.check_name(model)
    return service.model_info(model)


@routes.post('/reload')
@api.validate(resp=Responses(schema.Model, 400, *ACCESS_ERRORS, 429, 503), security=KEY)
def reload():
    """Load the weights that the checkpoint has now; running requests finish on the old ones."""
    if flask.request.args or flask.request.get_data().strip() not in (b'', b'{}', b'null'):
        message = '/reload takes no fields: it loads the newest checkpoint; send none'
        raise APIError(400, message)
    service = current_service()
    service.reload()
    return service.model_info(service.name)


@routes.get('/tokenizer_info')
@api.validate(resp=Responses(schema.TokenizerInfo, *ACCESS_ERRORS), security=KEY)
def tokenizer_info():
    """Describe the tokenizer."""
    tokenizer = current_service().tokenizer
    special = dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), tokenizer.eot_text)
    info = {'name': tokenizer.name, 'vocab_size': tokenizer.vocab_size}
    return info | special | {'chat_template': tokenizer.chat_template}


@routes.post('/tokenize')
@api.validate(resp=Responses(schema.TokenizeResponse, *BODY_ERRORS), security=KEY)
def tokenize(json: schema.TokenizeRequest):
    """Encode a string to token ids."""
    service = current_service()
    ids = service.to_ids(json.prompt, 'prompt')
    return {'tokens': ids, 'count': len(ids), 'max_model_len': service.block_size}


@routes.post('/detokenize')
@api.validate(resp=Responses(schema.DetokenizeResponse, *BODY_ERRORS), security=KEY)
def detokenize(json: schema.DetokenizeRequest):
    """Decode token ids to a string."""
    service = current_service()
    return {'prompt': service.tokenizer.decode(service.to_ids(json.tokens, 'tokens'))}


# -----------------------------------------------------------------------------
# its own server


def main(settings: dict) -> None:
    check_settings(settings)
    allow_open_files(4 * CONNECTIONS)
    startup, listener = StartupApp(origins=Origins(settings)), listen(settings)
    server = Server(startup, listener, settings['max_body'])
    app = build_app(None, settings)
    service, (address, port) = app.extensions['flatgpt'], listener.getsockname()[:2]
    server.set_max_completions(service.max_completions)
    log_to_stderr()
    drain_on_signals(service)
    reload_on_signal(service)
    startup.app = app
    address = f'[{address}]' if ':' in address else address
    print(f'{service.name} at http://{address}:{port}, documentation at /docs')
    print(
        f'{counted(len(service.engine.slots), "slot")}, queue of {settings["max_queue"]}, '
        f'context of {service.block_size} tokens; {settings["max_body"]:g} MiB and '
        f'{settings["max_seconds"]:g} s per request; '
        f'{"API key required" if api_key_of(settings) else "no API key"}',
        flush=True,
    )
    wait_until_drained(service, server)
    server.close()
    service.close()


if __name__ == '__main__':
    main(configure(globals(), sys.argv[1:]))
