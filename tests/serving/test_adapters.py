"""LoRA adapters of one base model, chosen by the field `model`."""

import copy

import pytest
import torch
from conftest import random_model
from error_lines import case, error_line
from server import PATH, in_background, wait_until

import api
from flatgpt.checkpoint import load, peft, save
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.errors import UserError
from flatgpt.inference import decode_graph, model_runner
from flatgpt.inference.adapters import adapted_model
from flatgpt.inference.engine import Engine, complete
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import SamplingParams
from flatgpt.lora import add_lora, lora_layers

pytest_plugins = ['server']
GREEDY = SamplingParams(12, temperature=0)
SHAPES = [{}, {'arch': 'modern', 'n_kv_head': 1}]


def with_adapter(model, seed, targets='all'):
    """A copy of a model with a random adapter."""
    adapted = copy.deepcopy(model)
    add_lora(adapted, rank=2, alpha=4, dropout=0.0, targets=targets)
    torch.manual_seed(seed)
    for layer in lora_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    return adapted.eval()


def write(folder, model, base):
    folder.mkdir(parents=True)
    for name, content in peft.adapter_files(model, str(base)).items():
        (folder / name).write_bytes(content)
    return folder


def write_run(folder, model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    state = {'step': 1, 'val_loss': 1.0, 'evaluated': True}
    save.save_checkpoint(folder, model, [optimizer], byte_tokenizer(), state)
    return folder


@pytest.fixture
def models(tmp_path):
    """A run, and two adapters of its model: a folder of peft, and a run -> their models."""
    base = random_model(257, 32)
    write_run(tmp_path / 'base', base)
    found = {'base': base, 'one': with_adapter(base, 1), 'two': with_adapter(base, 2)}
    write(tmp_path / 'one', found['one'], tmp_path / 'base')
    write_run(tmp_path / 'two', found['two'])
    return found


def app_of(tmp_path, adapters='one:{0}/one,two:{0}/two', **settings):
    paths = adapters.format(tmp_path)
    where = {'out_dir': str(tmp_path / 'base'), 'device': 'cpu', 'dtype': 'float32'}
    return api.create_app(**where, adapters=paths, **settings)


@pytest.fixture
def client(models, tmp_path):
    app = app_of(tmp_path)
    yield app.test_client()
    app.extensions['flatgpt'].close()


def ask(client, status=200, **body):
    reply = client.post(PATH, json={'prompt': 'a', 'max_tokens': 12, 'temperature': 0, **body})
    assert reply.status_code == status, reply.text
    return reply.json


def expected(model):
    return complete(copy.deepcopy(model), byte_tokenizer(), ['a'], GREEDY)[0]


def test_the_field_model_chooses_the_adapter(client, models):
    texts = {name: expected(model) for name, model in models.items()}
    assert len({*texts.values()}) == 3
    for name in ('one', 'base', 'two', 'one', 'base', 'two'):  # no cached keys are mixed up
        reply = ask(client, model=name)
        assert (reply['model'], reply['choices'][0]['text']) == (name, texts[name])
    assert ask(client)['choices'][0]['text'] == texts['base']


def test_the_base_and_the_adapters_are_listed(client):
    assert [each['id'] for each in client.get('/v1/models').json['data']] == ['base', 'one', 'two']
    assert client.get('/v1/models/two').json['id'] == 'two'
    assert client.get('/v1/models/three').status_code == 404


@error_line('model {} does not exist; use {}')
def test_an_unknown_model_is_404_if_there_are_adapters(client):
    error = ask(client, 404, model='three')['error']
    assert error['message'] == "model 'three' does not exist; use 'base', 'one', 'two'"
    assert ask(client, model='two')['choices']


def test_requests_of_different_adapters_wait_for_one_another(client, models):
    engine = client.application.extensions['flatgpt'].engine
    names = ['one', 'two', 'two', 'base', 'one']
    seen, step = [], engine.step

    def watched():
        found = step()
        seen.append({s.request.adapter for s in engine.slots if s.request})
        return found

    engine.step = watched
    body = {'prompt': 'a', 'max_tokens': 12, 'temperature': 0}
    replies = [in_background(client.post, PATH, json={**body, 'model': name}) for name in names]
    for name, reply in zip(names, replies, strict=True):
        assert reply().json['choices'][0]['text'] == expected(models[name])
    wait_until(lambda: not engine.running)
    assert max(map(len, seen)) == 1


def test_a_reload_reads_the_adapters_again(client, models, tmp_path):
    newer = with_adapter(models['base'], 3)
    for path in (tmp_path / 'one').iterdir():
        path.unlink()
    (tmp_path / 'one').rmdir()
    write(tmp_path / 'one', newer, tmp_path / 'base')
    assert client.post('/reload').status_code == 200
    assert ask(client, model='one')['choices'][0]['text'] == expected(newer)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('targets', ['all', 'c_proj,v_proj'])
@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
def test_an_adapter_beside_its_base_has_the_logits_of_the_merged_model(shape, targets, kind):
    base = random_model(257, 32, **shape)
    targets = {'c_proj,v_proj': 'c_proj' if not shape else 'v_proj'}.get(targets, targets)
    adapted, idx = with_adapter(base, 1, targets), torch.tensor([[1, 2, 3]])
    layers, want = lora_layers(adapted), adapted(idx)[0]
    if kind != 'float32':
        base.bfloat16()
    prepared = prepare_for_inference(base, 'int8' if kind == 'int8' else None)
    plain = prepared(idx)[0]
    got = adapted_model(prepared, layers)(idx)[0].float()
    scale = want.abs().max()
    assert (got - want).abs().max() / scale < {'float32': 1e-4}.get(kind, 0.15)
    assert (plain.float() - want).abs().max() / scale > 0.2  # the adapter matters
    assert torch.equal(prepared(idx)[0], plain)


def test_adapters_share_the_weights_of_the_base():
    base = prepare_for_inference(random_model(257, 32))
    adapted = adapted_model(base, lora_layers(with_adapter(random_model(257, 32), 1)))
    assert adapted.embedding.weight is base.embedding.weight
    assert {*map(id, base.parameters())} >= {*map(id, adapted.parameters())}


def test_each_adapter_has_graphs_of_its_own(models, monkeypatch):
    steps = []
    monkeypatch.setattr(model_runner, 'can_capture', lambda tensor: True)
    monkeypatch.setattr(
        decode_graph, 'capture', lambda compute, *_: (lambda: steps.append(1) or compute(), None)
    )
    base = prepare_for_inference(random_model(257, 32))
    layers = lora_layers(models['one'])
    engine = Engine(base, byte_tokenizer(), 2, adapters={'one': adapted_model(base, layers)})
    texts = {}
    for name in (None, 'one', None):
        texts[name] = out = []
        engine.submit(Request([97], GREEDY, lambda o, out=out: out.append(o.text), adapter=name))
        while engine.step():
            pass
    assert steps
    assert ''.join(texts[None]) == expected(models['base'])
    assert ''.join(texts['one']) == expected(models['one'])


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('must be name:path', 'one', 'one:{0}/one'),
        case('must be name:path', 'one:{0}/one,one:{0}/two', 'one:{0}/one,other:{0}/two'),
        case('is the base; choose another name', 'b:{0}/one', 'a:{0}/one'),
        case('there is no LoRA adapter in', 'one:{0}/base', 'one:{0}/two'),
    ],
)
def test_the_advice_for_adapters_is_right(models, tmp_path, bad, good):
    with pytest.raises(UserError) as error:
        app_of(tmp_path, bad, name='b')
    assert '\n' not in str(error.value)
    app_of(tmp_path, good, name='b').extensions['flatgpt'].close()


def test_an_adapter_of_another_model_is_refused(models, tmp_path):
    other = with_adapter(random_model(257, 32, seed=5), 1)
    write(tmp_path / 'other', other, tmp_path / 'base')
    with pytest.raises(UserError, match='is not its base: the weights differ'):
        app_of(tmp_path, 'other:{0}/other')


def test_a_model_that_is_loaded_already_has_no_adapters(models):
    with pytest.raises(UserError, match='the model is already loaded'):
        api.create_app((models['base'], byte_tokenizer()), adapters='a:b')


def test_reading_adapters_does_not_change_the_base(models, tmp_path):
    base = models['base']
    before = {name: value.clone() for name, value in base.state_dict().items()}
    load.read_adapters({'one': str(tmp_path / 'one')}, base, 'base')
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
