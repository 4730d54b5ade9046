"""--check: the preflight checks of a run."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset

from configurator import settings_of
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime
from flatgpt.training import preflight, resume
from model import GPT, GPTConfig


@pytest.fixture
def checked(run_here, capsys):
    """Run train.py --check on the tiny settings -> its exit status and its lines."""

    def checked(*args):
        capsys.readouterr()
        status = run_here('--check', *args)
        return status, capsys.readouterr().out

    return checked


def tree(folder):
    paths = [path for path in Path(folder).rglob('*') if path.name != '.lock']
    return sorted((path, path.stat().st_mtime_ns) for path in paths if path.is_file())


def test_a_run_that_can_start_is_a_go_and_nothing_is_written(checked, tmp_path):
    before = tree(ROOT / 'data'), tree(tmp_path)
    status, out = checked(f'--out_dir={tmp_path}/run')
    assert (status, out.splitlines()[-1]) == (0, 'go')
    assert not re.search(r'^(no|warning) ', out, re.M)
    assert 'every token id is in the vocabulary, and every file matches its hash' in out
    assert (tree(ROOT / 'data'), tree(tmp_path)) == before


def test_the_batch_that_two_processes_cannot_share_is_a_no(dataset):
    config = {'gradient_accumulation_steps': 3, 'batch_size': 1}
    looked = preflight.Preflight(
        {**config, 'out_dir': None, 'init_from': 'scratch', 'auto_resume': False},
        Runtime('cpu', torch.float32, 0, 2),
    ).run_check('batch')
    assert looked[0][0] == 'no'
    assert 'use --gradient_accumulation_steps=4 or 2' in looked[0][1]


def broken(tmp_path, value):
    folder = make_dataset(tmp_path / 'broken', byte_tokenizer())
    ids = np.fromfile(folder / 'train.bin', '<u2')
    ids[1000] = value
    ids.tofile(folder / 'train.bin')
    return folder


def test_an_id_outside_the_vocabulary_is_found_where_it_lies(checked, tmp_path):
    status, out = checked(f'--dataset={broken(tmp_path, 60_000)}')
    assert (status, out.splitlines()[-1][:5]) == (2, 'no-go')
    assert 'train.bin: token id 60000 at byte 2000 is outside the vocabulary' in out


def test_a_changed_shard_is_found_by_its_hash(checked, tmp_path):
    status, out = checked(f'--dataset={broken(tmp_path, 65)}')
    assert status == 2
    assert 'train.bin: was changed or damaged' in out


def test_of_a_large_dataset_pieces_are_read_and_that_is_said(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, 'READ_ALL_BYTES', 100)
    status, out = checked()
    assert (status, 'no hash computed' in out) == (0, True)
    # its first ids are always among them
    monkeypatch.setattr(preflight, 'PIECE_BYTES', 4096)
    assert checked(f'--dataset={broken(tmp_path, 60_000)}')[0] == 2


def test_a_missing_dataset_is_a_no_and_is_planned_all_the_same(checked, run_here, capsys):
    status, out = checked('--dataset=nowhere')
    assert status == 2
    assert 'unknown dataset nowhere' in out
    capsys.readouterr()
    assert run_here('--plan', '--dataset=nowhere') == 0
    out = capsys.readouterr().out
    assert 'assuming' in out
    assert 'total at the peak of an eager step' in out


def test_a_folder_with_a_run_is_a_no_until_it_is_to_be_resumed(run_here, checked, tmp_path):
    where = f'--out_dir={tmp_path / "run"}'
    run_here(where)
    assert checked(where)[0] == 2
    before = tree(tmp_path)
    status, out = checked(where, '--init_from=resume', '--max_iters=8')
    assert (status, 'step-00000004, whose hashes match' in out) == (0, True)
    status, out = checked(where, '--init_from=resume', '--max_iters=8', '--n_embd=32')
    assert (status, 'a resumed run keeps it' in out) == (2, True)
    assert tree(tmp_path) == before


def test_what_the_real_run_refuses_or_warns_of_the_check_does_too(checked):
    status, out = checked('--mask_documents')
    assert status == 2
    assert 'no       schedule: mask_documents=True: nothing separates the documents' in out
    status, out = checked('--max_iters=4', '--warmup_iters=9')
    assert status == 0
    assert (
        'warning  schedule: warmup_iters=9 is not less than the length of the run, 4 steps' in out
    )


def test_the_copy_that_will_be_read_is_looked_at(checked, run_here, dataset, tmp_path):
    cache = f'--data_cache={tmp_path}/cache'
    status, out = checked(cache)
    assert (status, 'GB free' in out) == (0, True)
    run_here(f'--out_dir={tmp_path}/run', cache, '--max_iters=1')
    assert checked(cache)[0] == 0
    (copy,) = (tmp_path / 'cache').glob('*/*/train.bin')
    content = copy.read_bytes()
    copy.write_bytes(content[::-1])
    status, out = checked(cache)
    assert (status, f'{copy}: ' in out, 'delete this copy' in out) == (2, True, True)


def test_a_mistake_that_is_in_the_way_of_much_is_told_once(checked):
    status, out = checked('--init_from=resume', '--out_dir=nowhere_yet')
    assert status == 2
    assert out.count('nowhere_yet has no checkpoint to resume from') == 1


def test_a_disk_that_the_checkpoints_would_fill_is_a_no(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, 'free_bytes', lambda path: 10_000_000)
    status, out = checked(f'--out_dir={tmp_path}/run')
    assert status == 2
    assert re.search(r'^no +disk: .*free disk space', out, re.M)


def test_the_real_run_warns_of_memory_and_disk(run_here, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, 'free_bytes', lambda path: 10_000)
    monkeypatch.setattr(preflight, 'available_memory', lambda runtime: 1e3)
    assert run_here(f'--out_dir={tmp_path}/run') == 0
    out = capsys.readouterr().out
    assert 'warning: this needs at least 0.0 GB' in out
    assert 'warning: two checkpoints take' in out


def test_wandb_without_a_key_is_a_no(checked, monkeypatch, tmp_path):
    pytest.importorskip('wandb')
    for name in ('WANDB_MODE', 'WANDB_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('NETRC', str(tmp_path / 'none'))
    assert 'wandb login' in checked('--wandb_log')[1]
    (tmp_path / '.netrc').write_text('machine api.wandb.ai login user password x\n')
    (tmp_path / '.netrc').chmod(0o600)
    assert checked('--wandb_log')[0] == 0


def test_compile_is_tried_where_it_is_on(checked, monkeypatch):
    def fails(model, **options):
        raise RuntimeError('no compiler')

    monkeypatch.setattr(torch, 'compile', fails)
    status, out = checked('--compile=True')
    assert (status, 'no compiler' in out) == (0, True)  # training continues without it


def test_of_two_processes_each_looks_at_its_device_and_one_prints(two_ranks, tmp_path):
    printed = two_ranks('--check', '--shard', f'--out_dir={tmp_path}/run')
    assert printed.count('device: cpu, float32, 2 processes') == 1
    assert printed.splitlines()[-1] == 'go'
    assert not (tmp_path / 'run').exists()


def test_the_shape_of_a_released_model_is_known_without_it():
    shape = GPTConfig(**preflight.external_shape('gpt2'))
    with torch.device('meta'):
        model = GPT(shape)
    # Radford et al. say 117M; OpenAI's files have this many
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    with pytest.raises(UserError, match='is not downloaded yet'):
        preflight.external_shape('somebody/something')


@pytest.mark.parametrize(
    ('runtime', 'arch', 'expected'),
    [
        (Runtime('cuda:0', torch.bfloat16), 'gpt2', True),
        (Runtime('cuda:0', torch.bfloat16), 'modern', False),  # always bfloat16, not a choice
        (Runtime('cuda:0', torch.float16), 'gpt2', False),
        (Runtime('cpu', torch.bfloat16), 'gpt2', False),
    ],
)
def test_a_new_gpt2_has_a_bfloat16_residual_stream_on_a_gpu(runtime, arch, expected):
    config = settings_of(str(ROOT / 'train.py'), [f'--arch={arch}'])
    shape = preflight.Preflight(config, runtime).model_shape()
    assert shape.bf16_residual == expected
    data = SimpleNamespace(vocab_size=shape.vocab_size)
    assert resume.new_model_config(data, config, runtime) == shape


def test_a_run_that_began_with_a_float32_residual_stream_keeps_it(run_here, tmp_path):
    where = f'--out_dir={tmp_path}'
    assert run_here(where, '--max_iters=1') == 0
    config = settings_of(str(ROOT / 'train.py'), [where, '--init_from=resume'])
    resumed = preflight.Preflight(config, Runtime('cuda:0', torch.bfloat16))
    assert resumed.model_shape().bf16_residual is False


def test_what_the_run_will_fetch_is_a_warning(checked, monkeypatch, tmp_path):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    _, out = checked('--init_from=gpt2', '--block_size=32')
    assert re.search(
        '^warning  settings: gpt2 is not downloaded yet: the run does that first', out, re.M
    )
