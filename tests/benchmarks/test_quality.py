"""The perplexity that bench.py measures, and on which data."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benches import refused, settings
from conftest import random_model

from flatgpt.benchmarks import decoding
from flatgpt.benchmarks.report import Report
from flatgpt.checkpoint import save
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data.dataset import Dataset, Writer
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime
from model import GPT, GPTConfig


def without_llama_cpp(name):
    return None if name == 'llama_cpp' else importlib.util.find_spec(name)


def test_perplexity_in_eight_bits_is_near_that_in_32(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decoding, 'find_spec', without_llama_cpp)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    with Writer(tmp_path / 'data', tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(400) % 97)
    model = GPT(GPTConfig(16, tokenizer.vocab_size, 2, 2, 32))
    state = {'step': 1, 'val_loss': 5.0, 'config': {'dataset': str(tmp_path / 'data')}}
    save.save_checkpoint(tmp_path / 'run', model, [], tokenizer, state, keep_evaluated=False)
    report = Report({'json': 'bench.json'}, {})
    formats = '--formats=float32,bfloat16,int8'
    config = settings('--only=quality', f'--out_dir={tmp_path / "run"}', formats)
    decoding.bench_quality(config, Runtime('cpu', torch.float32), report)
    found = {entry['side']: entry['perplexity'] for entry in report.entries}
    assert [*found] == ['float32', 'bfloat16', 'int8']
    assert abs(found['int8'] / found['float32'] - 1) < 0.01
    printed = capsys.readouterr().out
    assert '399 tokens of data' in printed
    assert 'pip install llama-cpp-python gguf' in printed

    export_transformers(model, tokenizer, {}, tmp_path / 'theirs')
    assert '--dataset=' in refused('--only=quality', f'--out_dir={tmp_path / "theirs"}')
    flags = [f'--out_dir={tmp_path / "theirs"}', f'--dataset={tmp_path / "data"}', formats]
    again = Report({'json': 'bench.json'}, {})
    decoding.bench_quality(settings(*flags), Runtime('cpu', torch.float32), again)
    assert again.entries[0]['perplexity'] == found['float32']
    with Writer(tmp_path / 'other', char_tokenizer('ab')) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(400) % 2)
    flags[1] = f'--dataset={tmp_path / "other"}'
    with pytest.raises(UserError, match='was not prepared with the tokenizer'):
        decoding.bench_quality(settings(*flags), Runtime('cpu', torch.float32), again)


def test_the_checkpoint_that_is_asked_for_is_measured(tmp_path):
    tokenizer, run = byte_tokenizer(), tmp_path / 'run'
    with Writer(tmp_path / 'data', tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(100) % 97)
    for step, loss in ((1, 5.0), (2, 6.0)):
        torch.manual_seed(step)
        model = GPT(GPTConfig(16, tokenizer.vocab_size, 1, 1, 8))
        config = {'dataset': str(tmp_path / 'data')}
        state = {'step': step, 'val_loss': loss, 'evaluated': True, 'config': config}
        save.save_checkpoint(run, model, [], tokenizer, state, keep_evaluated=True)
    found = {}
    for checkpoint in ('None', 'best', 'last'):
        report = Report({'json': 'bench.json'}, {})
        flags = ['--only=quality', f'--out_dir={run}', '--formats=float32']
        config = settings(*flags, f'--checkpoint={checkpoint}')
        decoding.bench_quality(config, Runtime('cpu', torch.float32), report)
        found[checkpoint] = report.entries[0]['perplexity']
    assert found['None'] == found['best'] != found['last']


def test_a_run_whose_data_is_gone_is_refused(tmp_path):
    with pytest.raises(UserError, match='no prepared dataset'):
        decoding.dataset_of({'config': {'dataset': str(tmp_path)}}, None)


class StandIn:
    """llama_cpp.Llama with a model of ours, in float16, as in the file."""

    def __init__(self, model, path, n_ctx, **options):
        assert Path(path).read_bytes()[:4] == b'GGUF'
        assert options['logits_all']
        self.model, self.ids = model.half().float(), []
        self.scores = np.zeros((n_ctx, model.config.vocab_size), np.float32)

    def reset(self):
        self.ids = []

    def eval(self, ids):
        self.ids += ids
        with torch.inference_mode():
            logits = self.model(torch.tensor([self.ids]))[0][0]
        self.scores[: len(logits)] = logits


@pytest.mark.parametrize('library', ['a stand-in', 'llama-cpp-python'])
def test_perplexity_of_a_gguf_file_is_that_of_16_bits(tmp_path, monkeypatch, library):
    pytest.importorskip('gguf', reason='gguf is not installed')
    model, tokenizer = random_model(257, 256), byte_tokenizer()
    if library == 'a stand-in':
        stand_in = SimpleNamespace(Llama=partial(StandIn, random_model(257, 256)))
        monkeypatch.setitem(sys.modules, 'llama_cpp', stand_in)
    else:
        pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed')
    with Writer(tmp_path / 'data', tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(700) % 97)
    data = Dataset(tmp_path / 'data', 256)
    monkeypatch.setattr(decoding, 'find_spec', lambda name: True)
    assert decoding.why_no_gguf(model, tokenizer) == ''
    assert decoding.why_no_gguf(random_model(257, arch='modern'), tokenizer).startswith('arch=')
    ours = decoding.perplexity(decoding.torch_loss(model, 'cpu'), data, None)
    theirs = decoding.perplexity(decoding.gguf_loss(model, tokenizer, {}), data, None)
    assert ours[1] == theirs[1] == 699
    assert theirs[0] == pytest.approx(ours[0], rel=0.01)
    assert theirs[0] != ours[0]
