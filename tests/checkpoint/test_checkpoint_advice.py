"""The advice of each error line of flatgpt/checkpoint/ works: the mistake, the fix, the result."""

import json
import os
import shutil
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch
from conftest import random_model, refused
from error_lines import case, error_line
from safetensors.torch import load_file, save_file

from flatgpt import files
from flatgpt.checkpoint import load as load_module
from flatgpt.checkpoint import mirror as mirror_module
from flatgpt.checkpoint import peft, weights
from flatgpt.checkpoint.__main__ import main
from flatgpt.checkpoint.convert import GENERATION, export_transformers
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.checkpoint.load import (
    ADAPTER_FOLDER,
    find_checkpoint,
    load_checkpoint,
    load_model,
    verify_checkpoint,
)
from flatgpt.checkpoint.mirror import (
    check_mirror,
    copy_if_missing,
    fetch_checkpoint,
    probe_mirror,
    send_checkpoint,
)
from flatgpt.checkpoint.save import save_checkpoint
from flatgpt.checkpoint.weights import INDEX, WEIGHTS
from flatgpt.data.bpe import train_bpe
from flatgpt.data.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer
from flatgpt.lora import add_lora, lora_layers
from model import GPTConfig

BYTES = byte_tokenizer()
STATE = {'step': 1, 'evaluated': False, 'config': {}}


def logits(where, **options):
    with torch.no_grad():
        return load_model(where, **options)[0](torch.arange(16)[None])[0]


def rewrite(path, **changes):
    """Other values in a JSON file; None removes a field."""
    content = json.loads(path.read_text(encoding='utf-8')) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding='utf-8')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A transformers folder; no test changes it."""
    folder = tmp_path_factory.mktemp('exported') / 'model'
    export_transformers(random_model(257), None, {}, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / 'model')


@pytest.fixture
def run(tmp_path):
    """Write a run directory with one checkpoint -> its path."""

    def run(name='run', model=None, tokenizer=None, **state):
        save_checkpoint(tmp_path / name, model or random_model(257), [], tokenizer, STATE | state)
        return tmp_path / name

    return run


def adapter_run(base):
    """The model of a base with LoRA adapters, and the config of its run."""
    model = load_model(base)[0]
    add_lora(model, 2, 4, 0.0, 'all')
    for module in lora_layers(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.3)
    return {'model': model, 'config': {'init_from': str(base)}}


@pytest.fixture(scope='module')
def adapter_files(exported):
    """{name: content} of an adapter's folder, of `exported`."""
    return peft.adapter_files(adapter_run(exported)['model'], str(exported))


@pytest.fixture
def adapter(adapter_files, tmp_path):
    """A peft folder, of `exported`."""
    (tmp_path / 'adapter').mkdir()
    for name, content in adapter_files.items():
        (tmp_path / 'adapter' / name).write_bytes(content)
    return tmp_path / 'adapter'


# -----------------------------------------------------------------------------
# models of others


@pytest.mark.parametrize(
    ('file', 'bad', 'good'),
    [
        case(
            'give a GPT-2 or NanoChat', 'config.json', {'model_type': 'x'}, {'model_type': 'gpt2'}
        ),
        case('needs an integer', 'config.json', {'n_layer': 2.0}, {'n_layer': 2}),
        case('give a model with', 'config.json', {'n_ctx': 8}, {'n_ctx': 16}),
        case('remove it if the logits', 'config.json', {'new_field': 'on'}, {'new_field': None}),
        case('to generate without it', GENERATION, {'bad_words': [[1]]}, {'bad_words': None}),
        case('but the config needs', 'config.json', {'n_embd': 64}, {'n_embd': 32}),
        case('lacks the tensor', 'config.json', {'n_layer': 3}, {'n_layer': 2}),
        case('has an unknown tensor', 'config.json', {'n_layer': 1}, {'n_layer': 2}),
    ],
)
def test_a_config_works_once_it_is_corrected(exported, folder, file, bad, good):
    rewrite(folder / file, **bad)
    assert str(folder) in refused(load_model, folder)
    rewrite(folder / file, **good)
    assert torch.equal(logits(folder), logits(exported))


def save_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: change(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS)


def save_head(folder, added):
    tensors = load_file(folder / WEIGHTS)
    tensors['lm_head.weight'] = tensors['transformer.wte.weight'] + added
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ('damage', 'fix'),
    [
        case(
            'save it in float32',
            lambda folder: save_tensors(folder, lambda t: t.to(torch.int8)),
            lambda folder, exported: save_tensors(folder, lambda t: t.bfloat16()),
        ),
        case(
            'give a model that ties them',
            lambda folder: save_head(folder, 0.5),
            lambda folder, exported: save_head(folder, 0),
        ),
        case(
            'download or copy it',
            lambda f: os.truncate(f / WEIGHTS, 100),
            lambda f, exported: shutil.copy(exported / WEIGHTS, f),
        ),
    ],
)
def test_weights_work_once_they_are_saved_or_copied_again(exported, folder, damage, fix):
    damage(folder)
    assert str(folder) in refused(load_model, folder)
    fix(folder, exported)
    load_model(folder)


@error_line('download it again')
def test_a_missing_weight_file_works_once_it_is_there_again(exported, folder):
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / 'model-1.safetensors')
    (folder / INDEX).write_text(
        json.dumps({'weight_map': dict.fromkeys(names, 'part.safetensors')})
    )
    assert 'part.safetensors is missing' in refused(load_model, folder)
    shutil.copy(exported / WEIGHTS, folder / 'part.safetensors')
    assert torch.equal(logits(folder), logits(exported))


@error_line('the path is not valid UTF-8')
def test_a_folder_whose_name_is_no_text_works_once_it_is_renamed(exported, folder, tmp_path):
    bad = os.fsdecode(os.fsencode(tmp_path) + b'/m\xff')
    os.rename(folder, bad)
    refused(load_model, bad)
    os.rename(bad, folder)
    assert torch.equal(logits(folder), logits(exported))


@error_line('no such model', 'nor available from the Hub')
def test_a_model_of_the_hub_is_found_by_its_name_or_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_transformers(random_model(257), BYTES, {}, tmp_path / 'source')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    refused(load_model, 'gpt2-xxl')
    assert 'tokenizer.json of openai-community/gpt2-xl' in refused(load_model, 'gpt2-xl')
    (tmp_path / 'mine').mkdir()
    for name in ('config.json', WEIGHTS, 'tokenizer.json'):
        shutil.copy(tmp_path / 'source' / name, 'mine')
    expected = logits('source')
    assert torch.equal(logits('mine'), expected)
    cached = tmp_path / 'hub/models--openai-community--gpt2-xl'
    (cached / 'refs').mkdir(parents=True)
    (cached / 'refs/main').write_text('0123')
    shutil.copytree('mine', cached / 'snapshots/0123')
    assert torch.equal(logits('gpt2-xl'), expected)


# --- nanoGPT


class MakesFolder:
    def __reduce__(self):
        return os.mkdir, ('folder',)


def nanogpt(path, **changes):
    """Save what nanoGPT's train.py saves, with changes."""
    model = random_model(257)
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
    args = {name: getattr(model.config, name) for name in names}
    saved = {'model': model.state_dict(), 'model_args': args, 'iter_num': 1, 'config': {}}
    torch.save(saved | changes, path)


ARGS = {'block_size': 16, 'vocab_size': 257, 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'bias': True}


@pytest.mark.parametrize(
    'changes',
    [
        case('model_args has an unknown', {'model_args': ARGS | {'rope': True}}),
        case('is not a nanoGPT checkpoint: {}; give one', {'model': {'transformer.wte.weight': 3}}),
        case('save only tensors and plain', {'extra': MakesFolder()}),
    ],
)
def test_a_nanogpt_checkpoint_works_once_it_is_one_of_tensors(exported, tmp_path, changes):
    nanogpt(tmp_path / 'ckpt.pt', **changes)
    refused(load_model, tmp_path)
    nanogpt(tmp_path / 'ckpt.pt')
    assert torch.equal(logits(tmp_path), logits(exported))


@error_line('incomplete: {}; copy it again', 'no such checkpoint; check the path')
def test_a_nanogpt_checkpoint_works_once_it_is_copied_again_to_that_path(exported, tmp_path):
    nanogpt(tmp_path / 'source.pt')
    with zipfile.ZipFile(tmp_path / 'source.pt') as archive:
        assert archive.testzip() is None
    shutil.copy(tmp_path / 'source.pt', tmp_path / 'ckpt.pt')
    os.truncate(tmp_path / 'ckpt.pt', 5000)
    refused(load_model, tmp_path)
    shutil.copy(tmp_path / 'source.pt', tmp_path / 'ckpt.pt')
    refused(load_model, tmp_path / 'other.pt')
    assert torch.equal(logits(tmp_path / 'ckpt.pt'), logits(exported))


# -----------------------------------------------------------------------------
# adapters


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('; set it to the base', {'base_model_name_or_path': None}, {}),
        case('to its base model', {'base_model_name_or_path': 'nowhere'}, {}),
        case('has {}={}; give a number', {'lora_alpha': 'much'}, {'lora_alpha': 4}),
        case('correct r or rank_pattern', {'r': 3}, {'r': 2}),
        case(
            'exclude_modules or layers',
            {'layers_to_transform': [1]},
            {'layers_to_transform': [0, 1]},
        ),
        case('invalid rank or pattern', {'rank_pattern': {'(': 2}}, {'rank_pattern': {'c_fc': 2}}),
    ],
)
def test_an_adapter_works_once_its_config_is_corrected(exported, adapter, bad, good):
    rewrite(adapter / peft.ADAPTER_CONFIG, **bad)
    refused(load_model, adapter)
    rewrite(adapter / peft.ADAPTER_CONFIG, base_model_name_or_path=str(exported), **good)
    load_model(adapter)


@error_line('check that it exists and is readable')
def test_an_adapter_works_once_its_weights_are_there(adapter, tmp_path):
    expected = logits(adapter)
    (adapter / peft.ADAPTER_WEIGHTS).rename(tmp_path / peft.ADAPTER_WEIGHTS)
    refused(load_model, adapter)
    (tmp_path / peft.ADAPTER_WEIGHTS).rename(adapter / peft.ADAPTER_WEIGHTS)
    assert torch.equal(logits(adapter), expected)


@error_line('is not its base: the weights', 'the adapter needs')
def test_an_adapter_works_once_it_names_its_own_base(exported, adapter, run):
    expected = logits(adapter)
    wider = run('wider', random_model(257, n_embd=64))
    for other in (wider, run('other', random_model(257, seed=1))):
        rewrite(adapter / peft.ADAPTER_CONFIG, base_model_name_or_path=str(other))
        assert f'{other} is not its base' in refused(load_model, adapter)
    rewrite(adapter / peft.ADAPTER_CONFIG, base_model_name_or_path=str(exported))
    assert torch.equal(logits(adapter), expected)


@error_line('gives the adapter itself as its base')
def test_an_adapter_is_not_its_own_base(adapter, exported):
    expected = logits(adapter)
    rewrite(adapter / peft.ADAPTER_CONFIG, base_model_name_or_path=str(adapter))
    refused(load_model, adapter)
    rewrite(adapter / peft.ADAPTER_CONFIG, base_model_name_or_path=str(exported))
    assert torch.equal(logits(adapter), expected)


@error_line('is an adapter, too; merge it', 'is an adapter, too; export it without')
def test_an_adapter_of_an_adapter_is_merged(adapter, run, tmp_path):
    top = run('top', **adapter_run(adapter))
    out = tmp_path / 'out'
    refused(main, ['export', str(top), str(out), '--format=peft'])
    main(['export', str(top), str(out)])
    expected = logits(top)
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
    alone = shutil.copytree(find_checkpoint(top) / ADAPTER_FOLDER, tmp_path / 'alone')
    refused(load_model, alone)
    main(['export', str(adapter), str(tmp_path / 'DIR')])
    rewrite(alone / peft.ADAPTER_CONFIG, base_model_name_or_path=str(tmp_path / 'DIR'))
    torch.testing.assert_close(logits(alone), expected, rtol=1e-4, atol=1e-4)


@error_line('is already an adapter', 'has no LoRA adapter')
def test_without_the_format_of_peft_a_model_is_exported(exported, adapter, run, tmp_path):
    for number, where in enumerate((adapter, run())):
        out = str(tmp_path / f'out{number}')
        refused(main, ['export', str(where), out, '--format=peft'])
        main(['export', str(where), out])
        torch.testing.assert_close(logits(out), logits(where), rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------
# runs


@error_line('export needs a folder')
def test_an_export_works_with_a_folder(run, tmp_path):
    where = run()
    line = refused(main, ['export', str(where)])
    command = line.partition('flatgpt.checkpoint ')[2].replace('DIR', str(tmp_path / 'out'))
    main(command.split())
    assert torch.equal(logits(tmp_path / 'out'), logits(where))


@error_line('delete their folders')
def test_a_run_verifies_once_its_damaged_checkpoints_are_deleted(run, capsys):
    where = run()
    damaged = find_checkpoint(run(step=2), 'last')
    (damaged / load_module.MODEL_FILE).write_bytes(b'')
    refused(main, ['verify', str(where)])
    assert 'damaged: model.safetensors does not match' in capsys.readouterr().out
    shutil.rmtree(damaged)
    main(['verify', str(where)])


@error_line('is not a run directory', 'the tokenizer has', 'cannot be read: {}; try again')
def test_a_model_is_loaded_with_what_belongs_to_it(folder, run, tmp_path, monkeypatch):
    refused(load_model, folder, 'last')
    load_model(folder)
    small = run('small', random_model(2))
    char_tokenizer('ab').save(tmp_path / 'ab.json')
    assert '257 ids and the model 2' in refused(load_model, small, tokenizer='byte')
    assert load_model(small, tokenizer=str(tmp_path / 'ab.json'))[1].vocab_size == 2

    def fail(path):
        raise OSError(5, 'Input/output error')

    with monkeypatch.context() as patch:
        patch.setattr(load_module, 'sha256', fail)
        refused(find_checkpoint, small)
    assert find_checkpoint(small)


@error_line('has unknown model settings')
def test_a_later_version_s_checkpoint_loads_in_that_version(run, monkeypatch):
    path = find_checkpoint(run())
    state = json.loads((path / load_module.STATE_FILE).read_text())
    state['model']['n_experts'] = 4
    (path / load_module.STATE_FILE).write_text(json.dumps(state))
    digest = files.sha256(path / load_module.STATE_FILE)
    rewrite(path / load_module.MANIFEST_FILE, **{load_module.STATE_FILE: digest})
    verify_checkpoint(path)
    refused(load_checkpoint, path)

    @dataclass
    class LaterConfig(GPTConfig):
        n_experts: int = 0

    for module in (load_module, weights):
        monkeypatch.setattr(module, 'GPTConfig', LaterConfig)
    assert load_checkpoint(path)[0].config.n_experts == 4


# --- the mirror


@error_line('is a URL', 'is the out_dir; give another', 'give another folder, or remove it')
def test_a_mirror_is_another_folder(tmp_path):
    out_dir, good = str(tmp_path / 'run'), str(tmp_path / 'mounted')
    (tmp_path / 'file').touch()
    for bad in ('s3://bucket/run', out_dir):
        refused(check_mirror, bad, out_dir)
    refused(probe_mirror, str(tmp_path / 'file' / 'mirror'))
    check_mirror(good, out_dir)
    probe_mirror(good)


@error_line(
    'give each run its own',
    'room or give another --checkpoint_mirror',
    'room or give another --out_dir',
)
def test_a_run_has_a_mirror_of_its_own_with_room(run, tmp_path, monkeypatch):
    one, other = (
        find_checkpoint(run('one', run='one')),
        find_checkpoint(run('other', run='other', step=2)),
    )
    shared, own = tmp_path / 'shared', tmp_path / 'own'
    send_checkpoint(one, shared, False, 'one')
    refused(copy_if_missing, other, shared)
    (tmp_path / 'file').touch()
    refused(copy_if_missing, other, tmp_path / 'file')
    copy_if_missing(other, own)
    verify_checkpoint(own / 'checkpoints' / other.name)

    def no_room(folder, need):
        raise OSError('needs 5 MB, and 1 MB are free')

    with monkeypatch.context() as patch:
        patch.setattr(mirror_module, 'make_temp_folder', no_room)
        refused(fetch_checkpoint, own / 'checkpoints' / other.name, tmp_path / 'new')
    assert fetch_checkpoint(own / 'checkpoints' / other.name, tmp_path / 'new')
    verify_checkpoint(tmp_path / 'new' / 'checkpoints' / other.name)


# -----------------------------------------------------------------------------
# GGUF


@error_line('pip install gguf')
def test_gguf_is_written_once_its_package_is_there(tmp_path, monkeypatch):
    pytest.importorskip('gguf', reason='gguf is not installed')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'gguf', None)
        refused(export_gguf, random_model(257), BYTES, {}, tmp_path / 'm.gguf')
    export_gguf(random_model(257), BYTES, {}, tmp_path / 'm.gguf')
    assert (tmp_path / 'm.gguf').read_bytes()[:4] == b'GGUF'


@error_line(
    '{} already exists; choose another file', 'choose another path', 'a GGUF file needs a tokenizer'
)
def test_gguf_is_written_to_another_path_and_with_a_tokenizer(run, tmp_path):
    pytest.importorskip('gguf', reason='gguf is not installed')
    where, good = str(run()), str(tmp_path / 'm.gguf')
    flags = ['--format=gguf', '--tokenizer=byte']
    refused(main, ['export', where, good, *flags[:1]])
    (tmp_path / 'file').touch()
    for bad in ('file', 'file/m.gguf'):
        refused(main, ['export', where, str(tmp_path / bad), *flags])
    main(['export', where, *flags, good])  # flags may stand between the arguments
    assert (tmp_path / 'm.gguf').read_bytes()[:4] == b'GGUF'


END = {'text': '<|endoftext|>', 'id': 256, 'special': True}


def bytes_with(**fields):
    """The tokenizer of bytes, of which a GGUF file cannot have the fields."""
    return Tokenizer.from_dict(BYTES.to_dict() | fields)


@pytest.mark.parametrize(
    ('arch', 'tokenizer'),
    [
        case('llama.cpp does not support it', 'modern', lambda: BYTES),
        case('llama.cpp splits text', 'gpt2', lambda: train_bpe(['to be or not to be'], 260)),
        case(
            'has no single_word',
            'gpt2',
            lambda: bytes_with(added_tokens=[END, {'text': 'A', 'id': 65, 'lstrip': True}]),
        ),
        case('has three at most', 'gpt2', lambda: bytes_with(end_ids=[256, 10, 11, 12])),
    ],
)
def test_what_is_not_for_gguf_is_exported_without_it(run, tmp_path, arch, tokenizer):
    pytest.importorskip('gguf', reason='gguf is not installed')
    tokenizer = tokenizer()
    where = run(model=random_model(tokenizer.vocab_size, arch=arch), tokenizer=tokenizer)
    export = ['export', str(where), str(tmp_path / 'out')]
    refused(main, [*export, '--format=gguf'])
    main(export)
    assert load_model(tmp_path / 'out')[1].stop_ids == tokenizer.stop_ids
