"""A newer checkpoint is loaded while the server runs: POST /reload and SIGHUP."""

import contextlib
import os
import signal
import threading

import pytest
import torch
from conftest import random_model
from error_lines import error_line
from server import PATH, in_background, started, wait_until

import api
from flatgpt.checkpoint import save
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.inference.engine import Engine, complete
from flatgpt.inference.sampling import SamplingParams
from flatgpt.serving import engines
from flatgpt.serving.engines import Engines

pytest_plugins = ['server']
BODY = {'prompt': 'a', 'max_tokens': 12, 'temperature': 0}


def write(folder, step, tokenizer=None, block_size=32):
    """Add a checkpoint of a random model to a run, better than the ones before -> the model."""
    model = random_model(257, block_size, seed=step)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {'step': step, 'val_loss': 9.0 - step, 'evaluated': True}
    save.save_checkpoint(folder, model, [optimizer], tokenizer or byte_tokenizer(), state)
    return model


def expected(model):
    (text,) = complete(model, byte_tokenizer(), ['a'], SamplingParams(12, temperature=0))
    return text


@pytest.fixture
def run(tmp_path):
    return tmp_path / 'run'


@pytest.fixture
def client(run):
    """A client of a server of step 1, to whose run step 2 has been added since."""
    write(run, 1)
    app = api.create_app(out_dir=str(run), device='cpu', dtype='float32')
    write(run, 2)
    yield app.test_client()
    app.extensions['flatgpt'].close()


def service_of(client):
    return client.application.extensions['flatgpt']


def ask(client, status=200, path=PATH, **body):
    reply = client.post(path, json=BODY | body) if path == PATH else client.post(path)
    assert reply.status_code == status, reply.text
    return reply.json


def text(client):
    return ask(client)['choices'][0]['text']


@contextlib.contextmanager
def held(engine):
    """Keep an engine from computing anything."""
    step, go = engine.step, threading.Event()
    engine.step = lambda: (go.wait(30), step())[1]
    try:
        yield
    finally:
        engine.step = step
        go.set()


def test_requests_after_a_reload_use_the_newest_checkpoint(client, run):
    service = service_of(client)
    first = text(client)
    assert first == expected(random_model(257, 32, seed=1))
    assert ask(client, path='/reload')['id'] == 'run'
    assert text(client) == expected(random_model(257, 32, seed=2)) != first
    wait_until(lambda: service.engines.open == [service.engine])
    write(run, 3)
    ask(client, path='/reload')
    assert text(client) == expected(random_model(257, 32, seed=3))
    assert client.get('/metrics').text.count('\nflatgpt_slots 8.0\n') == 1


@error_line('requests are still running on the previous weights')
def test_running_requests_finish_on_the_weights_they_began_with(client):
    service = service_of(client)
    old = service.engine
    with held(old):
        running = in_background(client.post, PATH, json=BODY)
        wait_until(lambda: old.waiting)
        ask(client, path='/reload')
        assert service.engine is not old
        assert text(client) == expected(random_model(257, 32, seed=2))
        ask(client, 429, path='/reload')  # there would be three models
    assert running().json['choices'][0]['text'] == expected(random_model(257, 32, seed=1))
    wait_until(lambda: service.engines.open == [service.engine])
    ask(client, path='/reload')


@error_line('a reload is running; wait')
def test_one_reload_runs_at_a_time(client):
    service = service_of(client)
    with service.reload_lock:
        assert 'Retry-After' in client.post('/reload').headers
        ask(client, 429, path='/reload')
    ask(client, path='/reload')


@error_line('a second model needs')
def test_without_memory_for_two_models_nothing_changes(client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engines, 'available_host_memory', lambda: engines.resident_memory() + 1e5)
        error = ask(client, 503, path='/reload')['error']
    assert error['code'] == 'memory'
    assert text(client) == expected(random_model(257, 32, seed=1))
    ask(client, path='/reload')


def test_a_second_engine_needs_memory_for_its_draft_too():
    def needed(draft):
        model = random_model(257, 32)
        engine = Engine(model, byte_tokenizer(), 2, draft=draft)
        parameters = sum(p.numel() for p in model.parameters())
        with contextlib.closing(Engines(engine)) as running:
            return parameters, engine.runner.cache.kv.nbytes, running.second_engine_bytes()

    parameters, cache, (alone, device) = needed(None)
    assert (alone, device) == (8 * parameters + cache, 0)
    assert needed(random_model(257, 32))[2] == (2 * alone, 0)


@error_line('the reload failed')
def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(client, run):
    for path in (run / 'checkpoints').glob('*/model.safetensors'):
        path.write_bytes(path.read_bytes()[:-1])
    error = ask(client, 503, path='/reload')['error']
    assert 'every checkpoint is damaged' in error['message']
    assert text(client) == expected(random_model(257, 32, seed=1))
    write(run, 3)
    ask(client, path='/reload')


@error_line('the new model has another tokenizer or context')
@pytest.mark.parametrize(
    'change', [{'tokenizer': char_tokenizer('abc', eot=True)}, {'block_size': 64}], ids=str
)
def test_a_model_with_another_tokenizer_or_context_needs_a_restart(client, run, change):
    write(run, 3, **change)
    ask(client, 503, path='/reload')
    assert text(client) == expected(random_model(257, 32, seed=1))


@error_line('this application was given a loaded model')
def test_an_application_that_was_given_a_model_cannot_reload(make_app):
    ask(make_app().test_client(), 400, path='/reload')


@pytest.mark.parametrize(
    ('query', 'body'), [('', b'{"checkpoint": "last"}'), ('', b'last'), ('?checkpoint=last', b'')]
)
@error_line('/reload takes no fields')
def test_a_reload_that_asks_for_something_is_refused(client, query, body):
    before = text(client)
    assert client.post(f'/reload{query}', data=body).status_code == 400
    assert text(client) == before
    assert client.post('/reload', data=b'{}' if body else b'').status_code == 200
    assert text(client) != before


def test_a_reload_replaces_an_engine_that_failed(client):
    service = service_of(client)
    service.engine.drop_cancelled = lambda: 1 / 0
    ask(client, 500)
    assert client.get('/ready').status_code == 503
    ask(client, path='/reload')
    assert client.get('/ready').status_code == 200
    assert text(client) == expected(random_model(257, 32, seed=2))
    wait_until(lambda: service.engines.open == [service.engine])


def test_a_reload_needs_the_key(run):
    write(run, 1)
    app = api.create_app(out_dir=str(run), device='cpu', dtype='float32', api_key='k')
    client = app.test_client()
    assert client.post('/reload').status_code == 401
    assert client.post('/reload', headers={'Authorization': 'Bearer k'}).status_code == 200
    app.extensions['flatgpt'].close()


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='needs SIGHUP')
def test_sighup_reloads_the_model(run, environment):
    write(run, 1)
    with started(run, environment) as (process, _):
        os.kill(process.pid, signal.SIGHUP)
        assert any('"reloaded"' in line for line in process.stderr)
        process.terminate()
        process.stdout.read()
        process.stderr.read()
