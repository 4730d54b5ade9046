"""Checkpoints: complete or absent, checked for damage, never lost to a full disk."""

import ast
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import ROOT
from error_lines import error_line
from safetensors.torch import load_file, save_file

from flatgpt import files
from flatgpt.checkpoint import __main__
from flatgpt.checkpoint import save as save_module
from flatgpt.checkpoint.load import (
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TOKENIZER_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_optimizer,
    newest_run,
    verify_checkpoint,
)
from flatgpt.checkpoint.save import save_checkpoint, set_aside
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import CheckpointError
from model import GPT, GPTConfig

FILES = (MODEL_FILE, OPTIMIZER_FILE, TOKENIZER_FILE, STATE_FILE, MANIFEST_FILE)


def trained(seed=0, **shape):
    """A tiny model after two steps of AdamW."""
    torch.manual_seed(seed)
    shape = {'block_size': 8, 'vocab_size': 11, 'n_layer': 1, 'n_head': 2, 'n_embd': 16} | shape
    model = GPT(GPTConfig(**shape))
    optimizer = torch.optim.AdamW(model.param_groups(0.1), lr=1e-3)
    for _ in range(2):
        ids = torch.randint(11, (2, 9))
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [optimizer]


@pytest.fixture(scope='module')
def pair():
    return trained()


@pytest.fixture
def put(pair, tmp_path):
    """Save a checkpoint of a step, with a validation loss if it was evaluated -> its path."""

    def put(step, val_loss=None, out_dir=tmp_path, keep_evaluated=False):
        state = {'step': step, 'train_loss': 1.0, 'val_loss': val_loss}
        state['evaluated'] = val_loss is not None
        return save_checkpoint(out_dir, *pair, char_tokenizer('abcdefghijk'), state, keep_evaluated)

    return put


def names(out_dir):
    return [int(path.name[5:]) for path in list_checkpoints(out_dir)]


def hidden(out_dir):
    """The temporary folders that a save or a removal has left."""
    return [path.name for path in (Path(out_dir) / 'checkpoints').iterdir() if path.name[0] == '.']


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * place), len(data) - 1)] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


refused = partial(conftest.refused, error=CheckpointError)


# -----------------------------------------------------------------------------
# round trip


@pytest.mark.parametrize('bf16', [True, False])
def test_the_precision_of_the_residual_stream_is_recorded_where_it_is_not_float32(bf16, tmp_path):
    model, optimizers = trained(bf16_residual=bf16)
    path = save_checkpoint(tmp_path, model, optimizers, None, {'step': 1}, keep_evaluated=False)
    # an earlier version rejects the name, and can load a checkpoint without it
    assert json.loads((path / STATE_FILE).read_text())['model'].get('bf16_residual', 0) == bf16
    assert load_checkpoint(path)[0].config.bf16_residual == bf16


def test_a_checkpoint_loads_as_it_was_saved(pair, put):
    model, (optimizer,) = pair
    path = put(7, 2.5)
    loaded, tokenizer, state = load_checkpoint(path, dropout=0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.config.dropout == 0.1
    assert tokenizer == char_tokenizer('abcdefghijk')
    assert (state['step'], state['val_loss'], state['evaluated']) == (7, 2.5, True)
    fresh = torch.optim.AdamW(loaded.param_groups(0.1), lr=1e-3)
    load_optimizer(path, loaded, [fresh])
    assert len(fresh.state) == len(optimizer.state)
    pairs = zip(model.parameters(), loaded.parameters(), strict=True)
    for old, new in pairs:
        for key, value in optimizer.state[old].items():
            assert torch.equal(value, fresh.state[new][key])


def test_the_files_are_exactly_those_documented(put):
    assert {file.name for file in put(1).iterdir()} == set(FILES)
    assert 'lm_head.weight' not in load_file(put(1) / MODEL_FILE)  # it is the embedding's matrix


def test_equal_states_give_equal_bytes(put, tmp_path):
    one, two = put(3, 1.5, tmp_path / 'one'), put(3, 1.5, tmp_path / 'two')
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_checkpoint_needs_no_tokenizer(pair, tmp_path):
    path = save_checkpoint(tmp_path, *pair, None, {'step': 1})
    assert not (path / TOKENIZER_FILE).exists()
    assert load_model(path)[1] is None


def test_a_checkpoint_is_never_overwritten(put):
    path = put(5, 2.0)
    before = {name: (path / name).stat().st_mtime_ns for name in FILES}
    assert put(5, 1.0) == path
    assert {name: (path / name).stat().st_mtime_ns for name in FILES} == before
    assert json.loads((path / STATE_FILE).read_text())['val_loss'] == 2.0


def test_a_loaded_model_is_ready_to_evaluate(put, tmp_path):
    put(1)
    model, _, state = load_model(tmp_path)
    assert not model.training
    assert state['step'] == 1
    assert load_model(put(1))[2]['step'] == 1


# -----------------------------------------------------------------------------
# pruning and choice


def test_the_last_two_and_the_best_are_kept(put, tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.6], 1):
        put(step, loss)
    assert names(tmp_path) == [2, 4, 5]
    assert hidden(tmp_path) == []


def test_keep_evaluated_keeps_every_evaluated_checkpoint(put, tmp_path):
    for step in range(1, 8):
        put(step, 3.0 if step % 2 else None, keep_evaluated=True)
    assert names(tmp_path) == [1, 3, 5, 6, 7]


def test_a_loss_that_is_not_finite_is_never_the_best(put, tmp_path):
    for step, loss in enumerate([2.0, math.nan, 1.0, math.inf, math.nan, math.nan], 1):
        put(step, loss)
        assert find_checkpoint(tmp_path).name == f'step-{1 if step < 3 else 3:08d}'
    assert names(tmp_path) == [3, 5, 6]


def test_best_and_last_are_different_checkpoints(put, tmp_path):
    put(1, 2.0)
    put(2, 1.0)
    put(3, 1.5)
    put(4)  # not evaluated
    assert find_checkpoint(tmp_path).name == 'step-00000002'
    assert find_checkpoint(tmp_path, 'best').name == 'step-00000002'
    assert find_checkpoint(tmp_path, 'last').name == 'step-00000004'
    for path in (tmp_path / 'checkpoints' / 'step-00000003', find_checkpoint(tmp_path, 'last')):
        assert find_checkpoint(path) == path
        assert find_checkpoint(tmp_path, str(path)) == path


def test_of_two_equal_losses_the_later_is_the_best(put, tmp_path):
    put(1, 2.0)
    put(2, 2.0)
    assert find_checkpoint(tmp_path).name == 'step-00000002'


def test_without_any_evaluation_the_best_is_the_last(put, tmp_path):
    put(1)
    put(2)
    assert find_checkpoint(tmp_path).name == 'step-00000002'


def test_steps_are_ordered_as_numbers(put, tmp_path):
    put(99_999_999)
    put(100_000_000)
    assert names(tmp_path) == [99_999_999, 100_000_000]
    assert find_checkpoint(tmp_path, 'last').name == 'step-100000000'


@error_line('no trained model in out/')
def test_the_newest_run_is_the_one_that_saved_last(put, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'no trained model' in refused(newest_run)
    put(9, out_dir='out/one')
    put(1, out_dir='out/two')
    assert newest_run() == Path('out/two')
    put(10, out_dir='out/one')
    assert newest_run() == Path('out/one')
    assert load_model(None)[2]['step'] == 10
    assert load_model('out/two')[2]['step'] == 1


@error_line(
    'train until the first', 'no such run directory; {}give the path', 'no such checkpoint; check'
)
def test_a_folder_without_checkpoints_is_an_error_until_one_is_saved(put, tmp_path):
    for folder, need in ((tmp_path, '--eval_interval'), (tmp_path / 'nowhere', 'path of a run')):
        text = refused(find_checkpoint, folder)
        assert text.startswith(str(folder))
        assert need in text
    assert 'no such checkpoint' in refused(find_checkpoint, tmp_path / 'step-00000001')
    path = put(1)
    assert find_checkpoint(tmp_path) == find_checkpoint(path) == path


@error_line("give 'last', 'best' or the path")
def test_a_checkpoint_that_does_not_exist_is_an_error_with_the_alternatives(put, tmp_path):
    path = put(1)
    text = refused(find_checkpoint, tmp_path, 'lst')
    assert text.startswith('lst')
    for which in ('last', 'best', str(path)):
        assert find_checkpoint(tmp_path, which) == path


def test_a_checkpoint_set_aside_is_not_listed_and_its_step_can_be_saved_again(put, tmp_path):
    put(1)
    for _ in range(2):
        set_aside(put(2))
        assert names(tmp_path) == [1]
    assert put(2).is_dir()


# -----------------------------------------------------------------------------
# damage


@error_line('give another checkpoint')
@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', [flip, cut, Path.unlink], ids=['flip', 'cut', 'remove'])
def test_a_damaged_file_is_reported_and_the_checkpoint_before_is_used(
    put, tmp_path, capsys, name, damage
):
    whole, broken = put(1, 2.0), put(2, 1.0)
    damage(broken / name) if name != MANIFEST_FILE or damage is not flip else flip(broken / name, 0)
    text = refused(verify_checkpoint, broken)
    assert str(broken) in text
    assert name in text
    for which in ('best', 'last'):
        assert find_checkpoint(tmp_path, which) == whole
        warning = capsys.readouterr().err
        assert warning.startswith(f'warning: {broken} is damaged: {name}')
        assert warning.count('\n') == 1
    assert name in refused(find_checkpoint, broken)  # given by its path, no other is tried
    assert find_checkpoint(whole) == whole


@pytest.mark.parametrize('place', [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize('name', [MODEL_FILE, OPTIMIZER_FILE])
def test_a_flipped_bit_is_detected_anywhere(put, name, place):
    path = put(1)
    flip(path / name, place)
    assert name in refused(verify_checkpoint, path)


@pytest.mark.parametrize('text', ['', '{}', '[]', 'null', '3', '{"model.safetensors": 3}', '\0'])
def test_a_manifest_without_hashes_is_damage(put, text):
    path = put(1)
    (path / MANIFEST_FILE).write_text(text)
    assert str(path) in refused(verify_checkpoint, path)


@error_line('start a new run in another --out_dir')
def test_if_all_checkpoints_are_damaged_the_error_is_one_line(put, tmp_path, capsys):
    for step in (1, 2):
        flip(put(step, 1.0) / MODEL_FILE)
    assert 'every checkpoint is damaged' in refused(find_checkpoint, tmp_path)
    assert capsys.readouterr().err.count('warning') == 2
    path = put(1, out_dir=tmp_path / 'new')
    assert find_checkpoint(tmp_path / 'new') == path


def test_a_damaged_state_file_does_not_stop_pruning(put, tmp_path):
    put(1, 1.0)
    (put(2, 2.0) / STATE_FILE).write_text('{')
    put(3, 3.0)
    put(4, 4.0)
    assert names(tmp_path) == [1, 3, 4]


# -----------------------------------------------------------------------------
# a save that fails


def test_a_full_disk_is_an_error_before_anything_is_written(put, tmp_path, monkeypatch):
    put(1)
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(OSError, match='MB are free'):
        put(2)
    assert names(tmp_path) == [1]
    assert hidden(tmp_path) == []
    verify_checkpoint(list_checkpoints(tmp_path)[0])


@pytest.mark.parametrize('call', ['save_file', 'sha256', 'fsync'])
def test_a_disk_error_during_a_save_keeps_the_old_checkpoint_and_leaves_no_files(
    put, tmp_path, monkeypatch, call
):
    put(1)
    owner = files if call == 'fsync' else save_module
    real, calls = getattr(owner, call), []

    def fail_the_second_time(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, 'No space left on device')
        return real(*args, **options)

    monkeypatch.setattr(owner, call, fail_the_second_time)
    with pytest.raises(OSError, match='No space left'):
        put(2)
    assert names(tmp_path) == [1]
    assert hidden(tmp_path) == []
    assert find_checkpoint(tmp_path).name == 'step-00000001'
    assert put(2).is_dir()  # and the next save finds its way free


def test_an_error_of_safetensors_is_an_oserror(put, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args, **options):
        raise SafetensorError('Error while serializing: I/O error: No space left on device')

    monkeypatch.setattr(save_module, 'save_file', fail)
    with pytest.raises(OSError, match='No space left'):
        put(1)
    assert hidden(tmp_path) == []


def test_the_next_save_removes_the_files_of_a_killed_one(put, tmp_path):
    put(1)
    folder = tmp_path / 'checkpoints'
    for name in ('.step-00000002', '.step-00000001'):
        (folder / name).mkdir()
        (folder / name / MODEL_FILE).write_bytes(b'half')
    assert names(tmp_path) == [1]
    put(2)
    assert hidden(tmp_path) == []
    verify_checkpoint(folder / 'step-00000002')


# -----------------------------------------------------------------------------
# another architecture


def rewrite(path, change_tensors=None, change_shape=None):
    """Change a checkpoint and its manifest, as another version would write it."""
    if change_tensors:
        tensors = load_file(path / MODEL_FILE)
        change_tensors(tensors)
        save_file(tensors, path / MODEL_FILE)
    if change_shape:
        state = json.loads((path / STATE_FILE).read_text())
        change_shape(state['model'])
        (path / STATE_FILE).write_text(json.dumps(state))
    manifest = {name: files.sha256(path / name) for name in FILES if name != MANIFEST_FILE}
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    verify_checkpoint(path)


def drop(tensors):
    del tensors['transformer.h.0.mlp.c_fc.weight']


def add(tensors):
    tensors['transformer.h.0.attn.extra.weight'] = torch.zeros(2)


def reshape(tensors):
    tensors['transformer.wpe.weight'] = torch.zeros(9, 16)


@pytest.mark.parametrize(
    ('change', 'name'),
    [(drop, 'mlp.c_fc.weight'), (add, 'attn.extra.weight'), (reshape, 'wpe.weight')],
)
def test_tensors_of_another_architecture_are_errors_with_their_names(put, change, name):
    path = put(1)
    rewrite(path, change)
    text = refused(load_checkpoint, path)
    assert str(path) in text
    assert name in text
    assert 'of one model' in text


def test_an_unknown_model_setting_is_an_error(put):
    path = put(1)
    rewrite(path, change_shape=lambda shape: shape.update(n_experts=4))
    text = refused(load_checkpoint, path)
    assert str(path) in text
    assert 'n_experts' in text


# -----------------------------------------------------------------------------
# command line, pickle


def test_inspect_and_verify_on_the_command_line(put, tmp_path, capsys):
    put(1, 2.0)
    put(2)
    for command in ('inspect', 'verify'):
        __main__.main([command, str(tmp_path)])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert 'parameters' in lines[3]
        assert lines[1].startswith('step-00000001')
        assert '2.0000' in lines[1]
        assert all(line.endswith('ok') for line in lines[1:3])
    flip(tmp_path / 'checkpoints' / 'step-00000001' / OPTIMIZER_FILE)
    __main__.main(['inspect', str(tmp_path)])
    assert f'damaged: {OPTIMIZER_FILE}' in capsys.readouterr().out
    assert 'damaged' in refused(__main__.main, ['verify', str(tmp_path)])
    assert 'no checkpoint' in refused(__main__.main, ['inspect', str(tmp_path / 'checkpoints')])


def test_verify_of_a_damaged_run_prints_one_line_and_exits_with_status_2(put, tmp_path, script):
    flip(put(1) / MODEL_FILE)
    done = script('flatgpt.checkpoint', 'verify', tmp_path)
    assert done.returncode == 2
    assert done.stderr == f'error: {tmp_path} has damaged checkpoints; delete their folders\n'


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ''


def test_pickle_is_imported_only_where_it_is_restricted():
    places = ('*.py', 'flatgpt/**/*.py', 'data/*/prepare.py', 'config/*.py')
    paths = [path for place in places for path in ROOT.glob(place)]
    bad = ('pickle', 'cPickle', 'dill', 'joblib', 'shelve', 'marshal', 'cloudpickle')
    found = {path.name for path in paths if any(name in bad for name in imports(path))}
    assert found == {'tokenizer.py'}
    for path in paths:
        for call in re.findall(r'torch\.load\(.*\)', path.read_text(encoding='utf-8')):
            assert 'weights_only=True' in call, path
