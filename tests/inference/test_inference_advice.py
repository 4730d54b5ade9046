"""The advice of each error line of flatgpt/inference/ works: the mistake, the fix, the result."""

import copy
import json
from contextlib import suppress

import pytest
import torch
from conftest import random_model
from error_lines import case, error_line
from filelock import FileLock

from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import UserError
from flatgpt.inference import quantize
from flatgpt.inference.batch import Batch
from flatgpt.inference.engine import Engine, complete
from flatgpt.inference.quantize import prepare_for_inference
from flatgpt.inference.request import Request
from flatgpt.inference.sampling import SamplingParams

TOKENIZER = char_tokenizer('\n abcdefgh')
WHERE = dict.fromkeys(('out_dir', 'init_from', 'checkpoint', 'dtype', 'quantize', 'tokenizer'))


@pytest.fixture(scope='module')
def model():
    return random_model(TOKENIZER.vocab_size)


@pytest.fixture
def batch(model, tmp_path, monkeypatch):
    """Run a batch in an empty folder -> its completions."""
    monkeypatch.chdir(tmp_path)

    def run(path='prompts.txt', out='out.jsonl', seed=1):
        settings = {**WHERE, 'batch': path, 'out': out, 'rows': 2, 'seed': seed}
        sampling_for = lambda line: SamplingParams(2, **{'seed': seed, **line})  # noqa: E731
        with suppress(SystemExit):  # status 1: some completions are errors
            Batch(settings, sampling_for, ['seed']).run(model, TOKENIZER)
        with open(out, encoding='utf-8') as file:
            return [json.loads(line) for line in file]

    return run


@pytest.mark.parametrize(
    ('name', 'content', 'changes', 'good'),
    [
        case('give a file for the', 'prompts.txt', 'ab', {'out': None}, {}),
        case('files are not supported', 'prompts.csv', 'ab', {'path': 'prompts.csv'}, {}),
        case(
            'create the folder', 'prompts.txt', 'ab', {'out': 'new/a.jsonl'}, {'out': 'new/a.jsonl'}
        ),
        case('; give another file', 'prompts.txt', 'ab', {'path': 'prompt.txt'}, {}),
        case('write a prompt per line', 'prompts.txt', '', {}, {}),
    ],
)
def test_a_batch_runs_once_its_files_are_right(batch, tmp_path, name, content, changes, good):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError):
        batch(**changes)
    (tmp_path / 'new').mkdir()
    (tmp_path / 'prompts.txt').write_text('ab\n')
    assert [line['finish'] for line in batch(**good)] == ['length']


@error_line('--out={}: already exists', 'wait, or choose another', 'settings; delete it')
def test_a_batch_runs_with_a_file_of_its_own(batch, tmp_path):
    (tmp_path / 'prompts.txt').write_text('ab\ncd\n')
    (tmp_path / 'out.jsonl').touch()
    with pytest.raises(UserError, match='already exists'):
        batch()
    with FileLock('locked.jsonl.lock'), pytest.raises(UserError, match='is writing it'):
        batch(out='locked.jsonl')
    (tmp_path / 'part.jsonl.part').write_text('{"line": 1}\n')
    with pytest.raises(UserError, match='belongs to another batch'):
        batch(out='part.jsonl')
    (tmp_path / 'part.jsonl.part').unlink()
    expected = batch(out='other.jsonl')
    assert len(expected) == 2
    assert expected == batch(out='locked.jsonl') == batch(out='part.jsonl')


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('give it text', b'{"prompt": ""}', b'{"prompt": "ab"}'),
        case(
            'save the line as UTF-8',
            b'{"prompt": "ab", "id": "\xe9"}',
            '{"prompt": "ab", "id": "é"}'.encode(),
        ),
        case('invalid JSON, give an object', b'ab', b'{"prompt": "ab"}'),
        case('with a string "prompt"', b'{"text": "ab"}', b'{"prompt": "ab"}'),
        case(
            'unknown setting {}; {}', b'{"prompt": "ab", "sed": 2}', b'{"prompt": "ab", "seed": 2}'
        ),
    ],
)
def test_a_line_of_a_batch_is_completed_once_it_is_corrected(batch, tmp_path, bad, good):
    (tmp_path / 'prompts.jsonl').write_bytes(bad + b'\n' + good + b'\n')
    first, second = batch('prompts.jsonl')
    assert 'error' in first
    assert second['finish'] == 'length'


@error_line('int8 needs bfloat16, or', 'use --device=cpu, or remove', 'remove --quantize and use')
def test_a_model_is_quantized_where_it_can_be_and_runs_without(model, monkeypatch):
    plain = copy.deepcopy(model).half()
    with pytest.raises(UserError, match='--dtype=bfloat16'):
        prepare_for_inference(plain, 'int8')
    prepare_for_inference(plain.bfloat16(), 'int8')
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, '_dispatch_has_kernel_for_dispatch_key', lambda *args: False)
        with pytest.raises(UserError, match='on mps; use --device=cpu'):
            quantize.check_int8_device('mps')
    quantize.check_int8_device('cpu')
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, '_dispatch_has_kernel_for_dispatch_key', lambda *args: True)
        patch.setattr(torch.cuda, 'is_bf16_supported', lambda **options: False)
        patch.setattr(torch.cuda, 'get_device_name', lambda: 'Tesla T4')
        with pytest.raises(UserError, match='Tesla T4'):
            quantize.check_int8_device('cuda:0')
    for kind in (torch.float16, torch.float32):
        without = prepare_for_inference(copy.deepcopy(model).to(kind))
        assert len(complete(without, TOKENIZER, ['ab'], SamplingParams(3))) == 1


@error_line('the logits are not finite')
def test_logits_too_large_for_float16_are_finite_in_float32(model):
    large = copy.deepcopy(model)
    large.transformer.ln_f.weight.data.fill_(3e4)
    with pytest.raises(UserError, match='--dtype=float32'):
        complete(copy.deepcopy(large).half(), TOKENIZER, ['ab'], SamplingParams(3))
    assert complete(large.float(), TOKENIZER, ['ab'], SamplingParams(3)) != ['']


@error_line('the engine is closed')
def test_after_an_engine_is_closed_another_one_takes_requests(model):
    outputs = []
    closed, other = Engine(model, TOKENIZER, 1), Engine(model, TOKENIZER, 1)
    closed.close()
    with pytest.raises(UserError, match='closed'):
        closed.submit(Request([1], SamplingParams(1), outputs.append))
    other.submit(Request([1], SamplingParams(1), outputs.append))
    other.step()
    assert [output.finish_reason for output in outputs] == ['length']
