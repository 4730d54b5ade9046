"""The perplexity that bench.py measures, and on which data."""

import numpy as np
import pytest
import torch
from benches import refused, settings

from flatgpt.benchmarks import decoding
from flatgpt.benchmarks.report import Report
from flatgpt.checkpoint import save
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime
from model import GPT, GPTConfig


def test_perplexity_in_eight_bits_is_near_that_in_32(tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    with Writer(tmp_path / 'data', tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(400) % 97)
    model = GPT(GPTConfig(16, tokenizer.vocab_size, 2, 2, 32))
    state = {'step': 1, 'val_loss': 5.0, 'config': {'dataset': str(tmp_path / 'data')}}
    save.save_checkpoint(tmp_path / 'run', model, [], tokenizer, state, keep_evaluated=False)
    report = Report({'json': 'bench.json'}, {})
    config = settings('--only=quality', f'--out_dir={tmp_path / "run"}')
    decoding.bench_quality(config, Runtime('cpu', torch.float32), report)
    found = {entry['side']: entry['perplexity'] for entry in report.entries}
    assert [*found] == ['float32', 'bfloat16', 'int8']
    assert abs(found['int8'] / found['float32'] - 1) < 0.01
    assert '399 tokens of data' in capsys.readouterr().out

    export_transformers(model, tokenizer, {}, tmp_path / 'theirs')
    assert '--dataset=' in refused('--only=quality', f'--out_dir={tmp_path / "theirs"}')
    flags = [f'--out_dir={tmp_path / "theirs"}', f'--dataset={tmp_path / "data"}']
    again = Report({'json': 'bench.json'}, {})
    decoding.bench_quality(settings(*flags), Runtime('cpu', torch.float32), again)
    assert again.entries[0]['perplexity'] == found['float32']
    with Writer(tmp_path / 'other', char_tokenizer('ab')) as writer:
        for split in ('train', 'val'):
            writer.write(split, np.arange(400) % 2)
    flags[1] = f'--dataset={tmp_path / "other"}'
    with pytest.raises(UserError, match='was not prepared with the tokenizer'):
        decoding.bench_quality(settings(*flags), Runtime('cpu', torch.float32), again)


def test_a_run_whose_data_is_gone_is_refused(tmp_path):
    with pytest.raises(UserError, match='no prepared dataset'):
        decoding.dataset_of({'config': {'dataset': str(tmp_path)}}, None)
