"""Import and export: transformers, nanoGPT and GGUF, with the same logits."""

import io
import itertools
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model, refused
from error_lines import error_line
from safetensors.torch import load_file, save_file

from flatgpt.checkpoint import __main__, convert, load, save
from flatgpt.checkpoint.convert import export_transformers, is_external, read_tokenizer
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.checkpoint.load import load_model
from flatgpt.checkpoint.weights import INDEX, WEIGHTS
from flatgpt.data.bpe import train_bpe
from flatgpt.data.dataset import Writer
from flatgpt.data.hf_options import GPT2_PATTERN
from flatgpt.data.hf_tokenizer import tokenizer_json, vocabulary_and_merges
from flatgpt.data.tokenizer import (
    EOT,
    byte_alphabet,
    byte_tokenizer,
    char_tokenizer,
    get_tokenizer,
    self_check_text,
)
from flatgpt.errors import CheckpointError
from flatgpt.inference.engine import generate
from flatgpt.inference.sampling import SamplingParams
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers', reason='transformers is not installed')
needs_gpt2 = pytest.mark.skipif(
    'TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR has the gpt2 vocabulary'
)
TEXT = 'It was the best of times, it was the worst of times; 1859, and counting.\n' * 50
RELEASED_SHAPES = {  # layers, heads, width; as OpenAI released them
    'gpt2': (12, 12, 768),
    'gpt2-medium': (24, 16, 1024),
    'gpt2-large': (36, 20, 1280),
    'gpt2-xl': (48, 25, 1600),
}


def shaken(model):
    """Random weights, large enough for clear preferences, and no zeros to hide a mistake."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def gpt2(folder, **changes):
    shape = {'vocab_size': 300, 'n_positions': 16, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
    shape |= {'bos_token_id': None, 'eos_token_id': None}
    model = shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})))
    model.save_pretrained(folder)
    return model


def rewrite(path, **changes):
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nanochat(folder, **changes):
    shape = {'vocab_size': 300, 'max_position_embeddings': 16, 'hidden_size': 32}
    shape |= {'intermediate_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    shape |= {'num_key_value_heads': 2}
    config = transformers.NanoChatConfig(**{**shape, **changes})
    model = shaken(transformers.NanoChatForCausalLM(config))
    model.save_pretrained(folder)
    return model


def own(arch='gpt2', vocab_size=300, **changes):
    shape = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'arch': arch}
    return shaken(GPT(GPTConfig(16, vocab_size, **{**shape, **changes})))


@torch.no_grad()
def assert_same_logits(ours, theirs, tolerance=1e-4):
    ids = torch.randint(ours.config.vocab_size, (3, ours.config.block_size))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids)[0], expected, rtol=tolerance, atol=tolerance)


# -----------------------------------------------------------------------------
# read


@pytest.mark.parametrize('write', [gpt2, nanochat])
def test_a_transformers_folder_gives_the_same_logits(tmp_path, write):
    theirs = write(tmp_path / 'model')
    ours, tokenizer, state = load_model(tmp_path / 'model')
    assert_same_logits(ours, theirs)
    assert (tokenizer, state) == (None, {})


@pytest.mark.parametrize('name', RELEASED_SHAPES)
def test_each_released_size_gives_the_same_logits(tmp_path, name):
    """Its layers, heads and proportions; an eighth of the width, and few tokens."""
    layers, heads, width = RELEASED_SHAPES[name]
    narrow = width // 8 // heads * heads
    config = transformers.GPT2Config(
        vocab_size=500, n_positions=32, n_layer=layers, n_head=heads, n_embd=narrow
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_model(tmp_path)[0], theirs)


def test_config_fields_without_effect_are_ignored(tmp_path):
    """Fields of OpenAI's config.json and of others."""
    theirs = gpt2(tmp_path, reorder_and_upcast_attn=True, resid_pdrop=0.3)
    more = {'n_ctx': 16, 'task_specific_params': {'text-generation': {'max_length': 50}}}
    more |= {'torch_dtype': 'float16', 'gradient_checkpointing': False, 'of_next_year': None}
    rewrite(tmp_path / 'config.json', **more)
    assert_same_logits(load_model(tmp_path)[0], theirs)


def test_an_untied_head_is_an_error(tmp_path):
    gpt2(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for change, line in ((0.0, None), (0.5, 'lm_head.weight differs')):
        head = tensors['transformer.wte.weight'] + change
        save_file({'lm_head.weight': head, **tensors}, tmp_path / WEIGHTS)
        if line:
            assert line in refused(load_model, tmp_path)
        else:
            load_model(tmp_path)


def test_weights_in_several_files_are_read_and_a_missing_one_is_reported(tmp_path):
    theirs = gpt2(tmp_path / 'model')
    theirs.save_pretrained(tmp_path / 'parts', max_shard_size='30KB')
    files = sorted(set(json.loads((tmp_path / 'parts' / INDEX).read_text())['weight_map'].values()))
    assert len(files) > 2
    assert_same_logits(load_model(tmp_path / 'parts')[0], theirs)
    (tmp_path / 'parts' / files[1]).unlink()
    assert files[1] in refused(load_model, tmp_path / 'parts')


def test_the_older_names_without_a_prefix_are_read(tmp_path):
    theirs = gpt2(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors = {name.removeprefix('transformer.'): t for name, t in tensors.items()}
    tensors['h.0.attn.bias'] = torch.ones(1, 1, 16, 16)  # the masks that were once saved, too
    save_file(tensors, tmp_path / WEIGHTS)
    assert_same_logits(load_model(tmp_path)[0], theirs)


def test_a_model_without_a_head_and_other_versions_configs_are_read(tmp_path):
    theirs = gpt2(tmp_path / 'a', n_inner=128)
    theirs.transformer.save_pretrained(tmp_path / 'b')  # a GPT2Model: names without a prefix
    assert_same_logits(load_model(tmp_path / 'b')[0], theirs)
    theirs = nanochat(tmp_path / 'c')
    config = json.loads((tmp_path / 'c' / 'config.json').read_text())
    config |= {'rope_theta': config.pop('rope_parameters')['rope_theta'], 'rope_scaling': None}
    (tmp_path / 'c' / 'config.json').write_text(json.dumps(config))
    assert_same_logits(load_model(tmp_path / 'c')[0], theirs)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_become_float32(tmp_path, kind):
    theirs = gpt2(tmp_path).to(kind)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load_model(tmp_path)[0], theirs.float())


@pytest.mark.parametrize(
    ('write', 'change', 'line'),
    [
        (gpt2, {'model_type': 'llama'}, 'is a llama model'),
        (gpt2, {'activation_function': 'relu'}, "activation_function='relu'"),
        (gpt2, {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
        (gpt2, {'n_inner': 100}, 'n_inner=100'),
        (gpt2, {'n_embd': 64}, 'has shape'),
        (gpt2, {'n_embd': 10**6}, 'has shape'),  # before memory is taken for it
        (gpt2, {'n_layer': 3}, 'lacks the tensor transformer.h.2'),
        (gpt2, {'n_layer': 1}, 'unknown tensor transformer.h.1'),
        (gpt2, {'n_layer': 2.0}, "needs an integer 'n_layer'"),
        (gpt2, {'n_embd': None}, "needs an integer 'n_embd'"),
        (gpt2, {'n_positions': -1}, 'block_size=-1'),
        (gpt2, {'tie_word_embeddings': False}, 'tie_word_embeddings=False'),
        (gpt2, {'quantization_config': {'bits': 4}}, 'quantization_config='),
        (gpt2, {'flatgpt_bias': False}, 'c_attn.bias'),  # which were trained since
        (gpt2, {'scale_attn_weights': False}, 'scale_attn_weights=False'),
        (gpt2, {'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06'),
        (gpt2, {'add_cross_attention': True}, 'add_cross_attention=True'),
        (gpt2, {'is_encoder_decoder': True}, 'is_encoder_decoder=True; remove it'),
        (gpt2, {'auto_map': {'AutoModelForCausalLM': 'x.Y'}}, 'auto_map='),
        (gpt2, {'pruned_heads': {'0': [1]}}, 'pruned_heads='),
        (gpt2, {'n_ctx': 8}, 'n_ctx=8; give a model with 16'),
        (gpt2, {'hidden_size': 64}, 'hidden_size=64'),
        (
            gpt2,
            {'of_next_year': 'on'},
            "config.json has an unknown field of_next_year='on'; remove it",
        ),
        (nanochat, {'head_dim': 4}, 'head_dim=4; give a model with 8'),
        (nanochat, {'sliding_window': 8}, 'sliding_window=8'),
        (nanochat, {'attention_bias': True}, 'attention_bias=True'),
        (nanochat, {'rms_norm_eps': 1e-5}, 'rms_norm_eps=1e-05'),
        (
            nanochat,
            {'rope_parameters': {'partial_rotary_factor': 0.5}},
            'partial_rotary_factor=0.5',
        ),
        (nanochat, {'hidden_act': 'silu'}, "hidden_act='silu'"),
        (nanochat, {'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0'),
        (nanochat, {'num_key_value_heads': 3}, 'n_kv_head=3'),
        (nanochat, {'rope_parameters': {'rope_theta': 5e5}}, 'rope_theta=500000.0'),
        (nanochat, {'rope_parameters': {'rope_type': 'yarn', 'factor': 4}}, "rope_type='yarn'"),
        (nanochat, {'rope_parameters': 'yarn'}, "rope_type='yarn'"),
        (nanochat, {'rope_scaling': {'factor': 2}}, 'rope_scaling='),
        (nanochat, {'num_key_value_heads': '2'}, "n_kv_head='2'"),
    ],
)
def test_an_unsupported_config_is_an_error(tmp_path, write, change, line):
    write(tmp_path)
    rewrite(tmp_path / 'config.json', **change)
    text = refused(load_model, tmp_path)
    assert text.startswith(str(tmp_path))
    assert line in text


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        (
            lambda t: t.update({'score.weight': torch.ones(2, 32)}),
            'an unknown tensor score.weight',
        ),
        (lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), 'quantized'),
        (lambda t: t.pop('transformer.ln_f.weight'), 'lacks the tensor transformer.ln_f.weight'),
    ],
)
def test_unknown_quantized_and_missing_weights_are_errors(tmp_path, change, line):
    gpt2(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    assert line in refused(load_model, tmp_path)


@error_line('has no map from tensors to files')
@pytest.mark.parametrize('files', [[], {'a': 1}, 'x', None])
def test_an_invalid_index_is_an_error_until_the_model_is_saved_again(tmp_path, files):
    theirs = gpt2(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps({'weight_map': files}))
    assert INDEX in refused(load_model, tmp_path)
    theirs.save_pretrained(tmp_path)
    load_model(tmp_path)


@pytest.mark.parametrize('keep', [0, 4, 100, -8])
def test_an_incomplete_file_is_an_error(tmp_path, keep):
    gpt2(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:keep])
    assert 'damaged or incomplete' in refused(load_model, tmp_path)


@pytest.mark.parametrize(
    ('settings', 'named'),
    [
        ({'suppress_tokens': [5, 6]}, 'suppress_tokens=[5, 6]'),
        ({'forced_bos_token_id': 3}, 'forced_bos_token_id=3'),
        ({'bad_words_ids': [[1]], 'temperature': 0.5}, 'bad_words_ids=[[1]]'),
        ({'temperature': 0.5, 'max_length': 50, 'eos_token_id': 1, 'suppress_tokens': None}, None),
    ],
)
def test_forced_and_suppressed_tokens_are_errors(tmp_path, settings, named):
    config = GPTConfig(16, 257, 1, 2, 8, bias=True)
    export_transformers(GPT(config), byte_tokenizer(), {}, tmp_path / 'm')
    (tmp_path / 'm' / 'generation_config.json').write_text(json.dumps(settings), encoding='utf-8')
    if named is None:
        load_model(tmp_path / 'm')
        return
    with pytest.raises(
        CheckpointError, match=re.escape(f'generation_config.json has an unsupported field {named}')
    ):
        load_model(tmp_path / 'm')


@error_line('save the model with save_pretrained()')
def test_a_missing_weight_file_and_a_broken_config_are_errors(tmp_path):
    theirs = gpt2(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert 'save_pretrained' in refused(load_model, tmp_path)
    theirs.save_pretrained(tmp_path)
    load_model(tmp_path)
    for text in ('', '{"model_type": ', '[]', '[' * 100_000, '\udcff'):
        (tmp_path / 'config.json').write_bytes(text.encode(errors='surrogateescape'))
        assert 'config.json' in refused(load_model, tmp_path)


@pytest.mark.parametrize(
    ('name', 'near'),
    [('gpt2-lrage', 'gpt2-large'), ('gtp2', 'gpt2'), ('GPT2-XL', 'gpt2-xl'), ('gpt-2', 'gpt2')],
)
def test_an_unknown_model_name_suggests_the_nearest(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    assert f'did you mean {near}?' in refused(load_model, name)


@needs_gpt2
def test_a_folder_without_a_tokenizer_still_has_its_eos_ids(tmp_path):
    gpt2(tmp_path, vocab_size=50257, n_embd=8, eos_token_id=[198, 50256])
    assert load_model(tmp_path)[1].stop_ids == {198, 50256}


def test_a_transformers_model_does_not_take_a_checkpoint(tmp_path):
    gpt2(tmp_path)
    assert 'remove --checkpoint' in refused(load_model, tmp_path, 'last')
    assert 'remove --checkpoint' in refused(load.find_checkpoint, 'gpt2', 'last')


@pytest.mark.parametrize('name', ['gpt2-xl', 'distilgpt2', 'someone/model'])
def test_offline_an_error_explains_which_files_to_download(tmp_path, monkeypatch, name):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    text = refused(load_model, name)
    assert name in text
    assert WEIGHTS in text


def test_the_hub_s_cache_is_read_and_an_incomplete_model_in_it_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    theirs = gpt2(tmp_path / 'model')
    cached = tmp_path / 'hub/models--openai-community--gpt2'
    snapshot = cached / 'snapshots/0123'
    (cached / 'refs').mkdir(parents=True)
    (cached / 'refs/main').write_text('0123')
    snapshot.mkdir(parents=True)
    (tmp_path / 'model/config.json').rename(snapshot / 'config.json')
    assert 'complete in the local cache' in refused(load_model, 'gpt2')
    (tmp_path / 'model' / WEIGHTS).rename(snapshot / WEIGHTS)
    assert_same_logits(load_model('gpt2')[0], theirs)


@pytest.mark.parametrize(
    ('where', 'foreign'),
    [
        ('gpt2', True),
        ('gpt2-xl', True),
        ('distilgpt2', True),
        ('karpathy/nanochat-d32', True),
        ('x/ckpt.pt', True),
        ('out/mine', False),
        ('mine', False),
    ],
)
def test_names_on_the_hub_are_distinguished_from_folders(tmp_path, monkeypatch, where, foreign):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    assert is_external(where) is foreign


MEASURE = """
import sys
from pathlib import Path
from flatgpt.checkpoint.load import load_model
def kilobytes(of):
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(of))
Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
before = kilobytes('VmRSS')
model = load_model(sys.argv[1])[0]
weights = sum(p.nbytes for p in model.parameters()) / 1024
print((kilobytes('VmHWM') - before) / weights)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='Linux measures it so')
@pytest.mark.parametrize('kind', ['a folder', 'ours'])
def test_memory_holds_the_weights_about_once(tmp_path, script, kind):
    """It is loaded one tensor at a time, without random initialization."""
    model = own(n_embd=384, n_layer=16)
    if kind == 'a folder':
        export_transformers(model, None, {}, tmp_path / 'model')
    else:
        save.save_checkpoint(tmp_path / 'model', model, [], None, {'step': 1, 'evaluated': False})
    (tmp_path / 'measure.py').write_text(MEASURE)
    done = script(tmp_path / 'measure.py', tmp_path / 'model')
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3


# -----------------------------------------------------------------------------
# tokenizers


@pytest.fixture(scope='module')
def bpe():
    return train_bpe([TEXT, self_check_text()], 600)


def tokenizers(bpe):
    letters = sorted(set(TEXT))
    plain, ended = char_tokenizer(letters), char_tokenizer(letters, eot=True)
    return {'bpe': bpe, 'byte': byte_tokenizer(), 'char': plain, 'char with end': ended}


@pytest.mark.parametrize('kind', ['bpe', 'byte', 'char', 'char with end'])
def test_autotokenizer_encodes_an_export_the_same_and_it_can_be_read_back(tmp_path, bpe, kind):
    tokenizer = tokenizers(bpe)[kind]
    model = own(vocab_size=tokenizer.vocab_size)
    export_transformers(model, tokenizer, {}, tmp_path / 'out')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    texts = [TEXT, ' two  spaces\n\n\tand it', '']
    texts = [''.join(c for c in text if c in TEXT) for text in texts]
    texts += [] if 'char' in kind else [self_check_text(7).replace(EOT, '')]
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)['input_ids'] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.eot
    back = read_tokenizer(tmp_path / 'out', 'out', tokenizer.vocab_size)
    assert back == tokenizer
    assert all(np.array_equal(back.encode(text), tokenizer.encode(text)) for text in texts)


@needs_gpt2
def test_gpt2s_tokenizer_is_exported_and_read_back(tmp_path):
    tokenizer = get_tokenizer('gpt2')
    export_transformers(own(vocab_size=50304), tokenizer, {}, tmp_path / 'out')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    text = self_check_text().replace(EOT, '') + TEXT
    assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist()
    back = read_tokenizer(tmp_path / 'out', 'out', 50304)
    assert back == tokenizer
    assert back.name == 'gpt2'
    assert np.array_equal(back.encode(text), tokenizer.encode(text))


def test_vocab_json_and_merges_txt_are_read(tmp_path, bpe):
    vocabulary, merges = vocabulary_and_merges(bpe)
    (tmp_path / 'vocab.json').write_text(json.dumps(vocabulary | bpe.special))
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
    (tmp_path / 'merges.txt').write_text('\n'.join(lines) + '\n')
    back = read_tokenizer(tmp_path, 'x', 600)
    assert back.token_bytes == bpe.token_bytes
    assert back.eot == bpe.eot
    assert back.pattern == GPT2_PATTERN


@needs_gpt2
def test_without_tokenizer_files_50257_ids_mean_gpt2s_tokenizer_with_a_note(tmp_path, capsys):
    assert read_tokenizer(tmp_path, 'x', 50257) == get_tokenizer('gpt2')
    said = capsys.readouterr()
    assert "GPT-2's is used" in said.err
    assert said.out == ''  # which may be a file, for the text that is written


def first_split(content):
    return content['pre_tokenizer']['pretokenizers'][0]


UNIGRAM = {'type': 'Unigram', 'unk_id': 0, 'vocab': [['a', 0.0]], 'byte_fallback': False}


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        (lambda c: c.update(model=UNIGRAM), 'Unigram'),
        (lambda c: c['model']['merges'].reverse(), 'order'),
        (
            lambda c: c.update(pre_tokenizer={'type': 'Whitespace'}),
            'is not supported; use ByteLevel',
        ),
        (lambda c: first_split(c).update(behavior='Removed'), 'is not supported; use ByteLevel'),
        (
            lambda c: c['pre_tokenizer']['pretokenizers'].reverse(),
            'is not supported; use ByteLevel',
        ),
        (lambda c: first_split(c).update(pattern={'Regex': r'\S+|\s+'}), None),
        (lambda c: c.update(normalizer={'type': 'Lowercase'}), 'is not supported; for a new model'),
        (lambda c: c.update(normalizer={'type': 'NFC'}), 'is not supported; for a new model'),
        (lambda c: c['model'].update(end_of_word_suffix='</w>'), 'tokenizer.json'),
        (lambda c: c['model']['vocab'].pop('\u0120'), 'tokenizer.json'),
        (lambda c: c['model']['vocab'].update(zz=10**9), 'its ids'),
        (lambda c: c['added_tokens'][0].update(id=-1), 'tokenizer.json'),
        (lambda c: c.pop('model'), 'tokenizer.json'),
    ],
)
def test_a_tokenizer_that_would_encode_differently_is_an_error(tmp_path, bpe, change, line):
    content = tokenizer_json(bpe)
    change(content)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    if line is None:  # another way to split is followed
        assert read_tokenizer(tmp_path, 'x', 600).pattern == r'\S+|\s+'
    else:
        assert line in refused(read_tokenizer, tmp_path, 'x', 600)


def test_characters_and_bytes_with_other_ids_are_errors(tmp_path):
    letters = char_tokenizer('abcd')
    for tokenizer, change in (
        (letters, {'a': 3, 'd': 0}),
        (letters, {'d': 9}),
        (byte_tokenizer(), {'a': 98, 'b': 97}),
    ):
        content = tokenizer_json(tokenizer)
        content['model']['vocab'].update(change)
        (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
        if change == {'a': 3, 'd': 0}:
            assert read_tokenizer(tmp_path, 'x', 600).encode('abcd').tolist() == [3, 1, 2, 0]
        else:
            assert 'tokenizer.json' in refused(read_tokenizer, tmp_path, 'x', 600)


def test_a_given_tokenizer_replaces_the_model_s_own(tmp_path):
    gpt2(tmp_path / 'folder')
    (tmp_path / 'folder' / 'tokenizer.json').write_text('damaged')
    state = {'step': 1, 'evaluated': False}
    save.save_checkpoint(tmp_path / 'run', own(), [], char_tokenizer('ab'), state)
    for where in ('folder', 'run'):
        assert load_model(tmp_path / where, tokenizer='byte')[1] == byte_tokenizer()
    save.save_checkpoint(tmp_path / 'small', own(vocab_size=100), [], None, state)
    text = refused(load_model, tmp_path / 'small', tokenizer='byte')
    assert '257 ids and the model 100' in text
    damaged = {**byte_tokenizer().to_dict(), 'special_tokens': {EOT: 999}}
    (tmp_path / 'own.json').write_text(json.dumps(damaged))
    assert 'own.json' in refused(load_model, tmp_path / 'run', tokenizer=str(tmp_path / 'own.json'))


# -----------------------------------------------------------------------------
# write


@pytest.mark.parametrize(
    'changes',
    [{'bias': True}, {'bias': False}, {'arch': 'modern', 'n_kv_head': 2}, {'arch': 'modern'}],
    ids=['gpt2', 'without biases', 'grouped', 'modern'],
)
def test_an_export_has_the_same_logits_text_and_weights(tmp_path, changes):
    tokenizer = byte_tokenizer()
    model = own(vocab_size=tokenizer.vocab_size, **changes)
    state = {'step': 7, 'val_loss': 1.25, 'config': {'dataset': 'poems', 'learning_rate': 0.001}}
    export_transformers(model, tokenizer, state, tmp_path / 'out')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
    assert_same_logits(model, theirs, 1e-5)

    prompt = [72, 105]
    greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    ours = generate(model, tokenizer, [prompt], SamplingParams(max_new_tokens=12, temperature=0))
    assert greedy[0, 2:].tolist() == [piece.token for piece in ours]

    back, read, _ = load_model(tmp_path / 'out')
    assert replace(back.config, n_kv_head=None) == replace(model.config, n_kv_head=None)
    assert back.config.kv_heads == model.config.kv_heads
    assert read == tokenizer
    again = back.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert re.search(r'steps \| 7', card)
    assert 'poems' in card


def test_an_export_never_overwrites_and_is_never_incomplete(tmp_path, monkeypatch):
    model, folder = own(), tmp_path / 'out'
    (tmp_path / 'link').symlink_to('nowhere')
    folder.mkdir()
    monkeypatch.chdir(folder)
    for there in (folder, Path('.'), tmp_path / 'link'):
        assert 'already exists' in refused(export_transformers, model, None, {}, there)
    (tmp_path / 'link').unlink()
    assert [path.name for path in tmp_path.rglob('*')] == ['out']

    def full(*args, **options):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(convert, 'save_file', full)
    assert 'No space' in refused(export_transformers, model, None, {}, tmp_path / 'new')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_the_command_exports_a_run(tmp_path, capsys, monkeypatch):
    model, tokenizer = own(vocab_size=257), byte_tokenizer()
    state = {'step': 3, 'evaluated': False, 'config': {}}
    save.save_checkpoint(tmp_path / 'run', model, [], tokenizer, state)
    __main__.main(['export', str(tmp_path / 'run'), str(tmp_path / 'out')])
    assert 'step 3: written to' in capsys.readouterr().out
    assert transformers.AutoConfig.from_pretrained(tmp_path / 'out').n_embd == 32
    assert 'export needs a folder' in refused(__main__.main, ['export', str(tmp_path / 'run')])
    for where in ('run', 'run/checkpoints/step-00000003'):
        __main__.main(['inspect', str(tmp_path / where)])
        said = capsys.readouterr().out
        assert 'step-00000003' in said
        assert 'gpt2, 0.03M parameters, 2 layers of 32' in said
    __main__.main(['inspect', str(tmp_path / 'out')])
    assert 'context 16; tokenizer byte' in capsys.readouterr().out
    save.save_checkpoint(tmp_path / 'mute', model, [], None, state)
    __main__.main(['export', str(tmp_path / 'mute'), str(tmp_path / 'out2')])
    assert 'without a tokenizer' in capsys.readouterr().out


@pytest.mark.parametrize('bias', [True, False])
def test_a_gguf_file_has_llama_cpps_names(tmp_path, bias):
    gguf = pytest.importorskip('gguf', reason='gguf is not installed')
    tokenizer = byte_tokenizer()
    model = own(vocab_size=320, bias=bias)
    export_gguf(model, tokenizer, {}, tmp_path / 'm.gguf')
    reader = gguf.GGUFReader(tmp_path / 'm.gguf')
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields['general.architecture'] == 'gpt2'
    assert fields['gpt2.block_count'] == 2
    assert fields['gpt2.context_length'] == 16
    assert fields['tokenizer.ggml.eos_token_id'] == 256
    assert len(fields['tokenizer.ggml.merges']) == 1  # without one llama.cpp does not load it
    assert len(fields['tokenizer.ggml.tokens']) == 320
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    needed = {'token_embd.weight', 'position_embd.weight', 'output_norm.weight', 'output_norm.bias'}
    for layer in (0, 1):
        for part in ('attn_norm', 'attn_qkv', 'attn_output', 'ffn_norm', 'ffn_up', 'ffn_down'):
            needed |= {f'blk.{layer}.{part}.weight', f'blk.{layer}.{part}.bias'}
    assert set(tensors) == needed
    up = np.array(tensors['blk.1.ffn_up.weight'].data, np.float32)
    np.testing.assert_allclose(up, model.transformer.h[1].mlp.c_fc.weight.detach(), atol=1e-3)


def test_a_gguf_file_merges_bytes_into_the_characters_of_a_char_tokenizer(tmp_path):
    gguf = pytest.importorskip('gguf', reason='gguf is not installed')
    tokenizer = char_tokenizer('ab é→😀', eot=True)
    export_gguf(own(vocab_size=8), tokenizer, {}, tmp_path / 'm.gguf')
    fields = gguf.GGUFReader(tmp_path / 'm.gguf').fields
    words = fields['tokenizer.ggml.tokens'].contents()
    merges = fields['tokenizer.ggml.merges'].contents()
    rank = {tuple(pair.split(' ')): i for i, pair in enumerate(merges)}
    for word in words[: tokenizer.vocab_size - 1]:
        parts = [*word]
        while len(parts) > 1:  # as llama.cpp does
            pairs = [rank.get(pair, len(rank)) for pair in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert parts == [word]
    letters = byte_alphabet()
    texts = [bytes(letters[letter] for letter in word) for word in words[:6]]
    assert texts == tokenizer.token_bytes[:6]


LLAMA = 'llama-cpp-python is not installed'


@pytest.mark.parametrize('make', [byte_tokenizer, lambda: char_tokenizer('ab é→😀', eot=True)])
def test_llama_cpp_reads_and_writes_the_same_ids(tmp_path, make):
    llama_cpp = pytest.importorskip('llama_cpp', reason=LLAMA)
    tokenizer, path = make(), tmp_path / 'm.gguf'
    model = random_model(tokenizer.vocab_size, 256)
    export_gguf(model, tokenizer, {}, path)
    llama = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False)
    ids = tokenizer.encode('ab é→ a😀→é').tolist()
    assert llama.tokenize('ab é→ a😀→é'.encode(), add_bos=False) == ids
    llama.eval(ids)
    ours = model(torch.tensor([ids]))[0][0].argmax(-1)
    assert llama.scores[: len(ids)].argmax(-1).tolist() == ours.tolist()


def test_what_llama_cpp_does_not_support_is_an_error(tmp_path, bpe):
    pytest.importorskip('gguf', reason='gguf is not installed')
    modern = own('modern')
    assert 'modern' in refused(export_gguf, modern, byte_tokenizer(), {}, tmp_path / 'a.gguf')
    assert 'bpe' in refused(export_gguf, own(), bpe, {}, tmp_path / 'a.gguf')
    assert '--tokenizer' in refused(export_gguf, own(), None, {}, tmp_path / 'a.gguf')
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# nanoGPT


def nanogpt_checkpoint(path, model, prefix='', dataset='letters', **extra):
    """Save what nanoGPT's train.py saves. prefix: of a compiled model."""
    c = model.config
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
    saved = {
        'model': {prefix + name: tensor for name, tensor in model.state_dict().items()},
        'optimizer': {'state': {}, 'param_groups': [{'lr': 0.001, 'params': [0]}]},
        'model_args': {name: getattr(c, name) for name in names},
        'iter_num': 2000,
        'best_val_loss': torch.tensor(1.5),
        'config': {'dataset': dataset, 'learning_rate': 0.001},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved | extra, path)


@pytest.mark.parametrize(
    'prefix', ['', '_orig_mod.', 'module._orig_mod.'], ids=['plain', 'compiled', 'wrapped']
)
@pytest.mark.parametrize('bias', [True, False])
def test_nanogpts_checkpoint_gives_its_weights_vocabulary_and_loss(tmp_path, prefix, bias):
    model = own(vocab_size=10, bias=bias)
    nanogpt_checkpoint(tmp_path / 'project/out-letters/ckpt.pt', model, prefix)
    (tmp_path / 'project/data/letters').mkdir(parents=True)
    meta = {'vocab_size': 10, 'itos': dict(enumerate('abcdefghij')), 'stoi': {}}
    (tmp_path / 'project/data/letters/meta.pkl').write_bytes(pickle.dumps(meta))
    for where in ('project/out-letters', 'project/out-letters/ckpt.pt'):
        loaded, tokenizer, state = load_model(tmp_path / where)
        assert loaded.config == model.config
        assert tokenizer == char_tokenizer('abcdefghij')
        assert state['step'] == 2000
        x, y = torch.randint(10, (2, 3, 16))
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, y)[1], model(x, y)[1], rtol=1e-5, atol=1e-5)


def test_data_of_the_same_name_and_another_vocabulary_size_is_not_used(tmp_path):
    model = own(vocab_size=10)
    nanogpt_checkpoint(tmp_path / 'a/b/ckpt.pt', model)
    for root, letters in (('a', 'abc'), ('.', 'abcdefghij')):
        folder = tmp_path / root / 'data/letters'
        folder.mkdir(parents=True)
        meta = {'itos': dict(enumerate(letters))}
        (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    assert load_model(tmp_path / 'a/b')[1] == char_tokenizer('abcdefghij')


def test_without_its_data_the_tokenizer_can_be_given(tmp_path):
    model = own(vocab_size=10)
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', model, dataset='gone')
    assert load_model(tmp_path)[1] is None
    char_tokenizer('abcdefghij').save(tmp_path / 'letters.json')
    named = load_model(tmp_path, tokenizer=str(tmp_path / 'letters.json'))[1]
    assert named == char_tokenizer('abcdefghij')


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('owned',)


def test_a_malicious_pickle_is_an_error_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', own(), extra=Malicious())
    assert 'could run code' in refused(load_model, tmp_path / 'ckpt.pt')
    (tmp_path / 'ckpt.pt').write_bytes(pickle.dumps(Malicious()))
    refused(load_model, tmp_path / 'ckpt.pt')
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', own())
    content = (tmp_path / 'ckpt.pt').read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile('ckpt.pt', 'w') as new:
        for name in old.namelist():
            evil = pickle.dumps(Malicious(), 2) if name.endswith('data.pkl') else old.read(name)
            new.writestr(name, evil)
    assert 'could run code' in refused(load_model, tmp_path / 'ckpt.pt')
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize('content', [b'', b'text', pickle.dumps({'a': 1})])
def test_a_file_that_is_not_a_checkpoint_is_an_error(tmp_path, content):
    (tmp_path / 'ckpt.pt').write_bytes(content)
    assert 'ckpt.pt' in refused(load_model, tmp_path / 'ckpt.pt')
    assert 'no such checkpoint' in refused(load_model, tmp_path / 'gone.pt')


@pytest.mark.parametrize('place', [0.3, 0.7, -20])
@pytest.mark.parametrize('damage', ['cut', 'flipped'])
def test_a_damaged_or_incomplete_checkpoint_is_an_error(tmp_path, place, damage):
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', own())
    content = bytearray((tmp_path / 'ckpt.pt').read_bytes())
    at = int(place * len(content)) if isinstance(place, float) else place
    content[at] ^= 255
    (tmp_path / 'ckpt.pt').write_bytes(content[:at] if damage == 'cut' else content)
    assert str(tmp_path / 'ckpt.pt') in refused(load_model, tmp_path)


@pytest.mark.parametrize(
    'change',
    [
        {'model': [1]},
        {'model': {'transformer.wte.weight': 3}},
        {'model': {1: torch.ones(2)}},
        {'model_args': None},
        {'config': None},
        {'iter_num': 'many'},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_with_wrong_types_is_an_error(tmp_path, change):
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', own())
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    torch.save(saved | change, tmp_path / 'ckpt.pt')
    assert 'is not a nanoGPT checkpoint' in refused(load_model, tmp_path)


def test_a_checkpoint_from_before_biases_were_a_setting_has_them(tmp_path):
    model = own(bias=True)
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', model)
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    saved['model_args'].pop('bias')
    torch.save(saved, tmp_path / 'ckpt.pt')
    assert_same_logits(load_model(tmp_path)[0], lambda ids: SimpleNamespace(logits=model(ids)[0]))
    saved['model_args'] |= {'dropout': 0.1, 'rope': None}
    torch.save(saved, tmp_path / 'ckpt.pt')
    load_model(tmp_path)
    saved['model_args']['rope'] = True
    torch.save(saved, tmp_path / 'ckpt.pt')
    assert 'unknown setting rope=True' in refused(load_model, tmp_path)


def test_a_checkpoint_of_other_shapes_is_an_error(tmp_path):
    model = own(vocab_size=10)
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', model)
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    saved['model_args']['n_embd'] = 64
    torch.save(saved, tmp_path / 'ckpt.pt')
    assert 'has shape' in refused(load_model, tmp_path)
    saved['model_args']['n_embd'] = '32'
    torch.save(saved, tmp_path / 'ckpt.pt')
    assert "n_embd='32'" in refused(load_model, tmp_path)
    saved['model_args'].pop('n_head')
    torch.save(saved, tmp_path / 'ckpt.pt')
    assert 'n_head' in refused(load_model, tmp_path)


# -----------------------------------------------------------------------------
# baselines


@needs_gpt2
@pytest.mark.parametrize('config', ['eval_gpt2', 'eval_gpt2_xl'])
def test_a_baseline_prints_its_losses(tmp_path, script, config):
    gpt2(tmp_path / 'model', vocab_size=50257, n_embd=8)
    tokenizer = get_tokenizer('gpt2')
    with Writer(tmp_path / 'data', tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, tokenizer.encode(TEXT))
    flags = [f'--init_from={tmp_path / "model"}', f'--dataset={tmp_path / "data"}']
    flags += ['--eval_iters=2', '--device=cpu', '--block_size=16']
    cached = {'TIKTOKEN_CACHE_DIR': os.environ['TIKTOKEN_CACHE_DIR']}
    done = script('train.py', config, *flags, env=cached)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith('train_loss'))
    assert re.match(r'train_loss \d+\.\d+, val_loss \d+\.\d+', line)
    assert 'no tokenizer files' in done.stderr
