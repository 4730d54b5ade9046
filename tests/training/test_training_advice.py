"""What train.py and its checks reject, and that the advice of each line works."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, random_model, saved, steps
from error_lines import case, error_line
from filelock import FileLock

from configurator import settings_of
from flatgpt.checkpoint.load import MANIFEST_FILE, find_checkpoint
from flatgpt.data import text
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError
from flatgpt.files import sha256
from flatgpt.runtime import Runtime
from flatgpt.training import loss, metrics, preflight, resume, run_directory
from flatgpt.training.optim import build_optimizers
from flatgpt.training.run import Run
from model import GPTConfig

CPU = Runtime('cpu', torch.float32)


def rejected(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope='module')
def finished(run_here, tmp_path_factory):
    """A run of two steps and its mirror, in one directory."""
    folder = tmp_path_factory.mktemp('finished')
    run_here(f'--out_dir={folder}/run', f'--checkpoint_mirror={folder}/mirror', '--max_iters=2')
    return folder


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case(
            'has checkpoints already: resume with',
            '--out_dir=run --max_iters=3',
            ['--init_from=resume', '--out_dir=other', '--overwrite'],
        ),
        pytest.param(
            '--out_dir=new --checkpoint_mirror=mirror --max_iters=3',
            ['--init_from=resume', '--checkpoint_mirror=other', '--overwrite'],
            id='a used mirror',
        ),
        case(
            'to evaluate it, use',
            '--eval_only --out_dir=run',
            ['--init_from=resume', '--init_from=run --out_dir=other'],
        ),
        case(
            'and --overwrite would delete it',
            '--init_from=run --overwrite --out_dir=run --max_iters=1',
            ['--out_dir=other'],
        ),
        case(
            'is not of {}, the run to resume',
            '--init_from=resume --out_dir=run --checkpoint=second --max_iters=3',
            ['--out_dir=second', '--init_from=second/checkpoints/step-00000002 --out_dir=other'],
        ),
        case(
            'in three steps in a row',
            '--out_dir=nan --learning_rate=1e30 --grad_clip=0 --eval_interval=99 --max_iters=6',
            ['--learning_rate=1e-3'],
        ),
        case(
            'weights are not saved; lower',
            '--out_dir=nan --learning_rate=1e30 --grad_clip=0 --max_iters=2',
            ['--learning_rate=1e-3'],
        ),
        case(
            'cannot be written: {}; choose another --out_dir',
            '--out_dir=/dev/null/x --max_iters=1',
            ['--out_dir=other'],
        ),
    ],
)
def test_a_rejected_run_starts_once_the_advice_is_followed(
    run_here, finished, tmp_path, monkeypatch, bad, good
):
    for number, flags in enumerate(good):
        folder = shutil.copytree(finished, tmp_path / str(number))
        shutil.copytree(folder / 'run', folder / 'second')
        monkeypatch.chdir(folder)
        line = rejected(run_here, *bad.split())
        for flag in flags.split():
            assert flag.partition('=')[0] in line
        assert run_here(*bad.split(), *flags.split()) == 0


@error_line('another run is writing here; wait for its end')
def test_a_locked_run_directory_can_be_used_once_the_other_run_ends(tmp_path):
    with FileLock(tmp_path / '.lock'):
        rejected(run_directory.lock, tmp_path)
        run_directory.lock(tmp_path / 'another').release()
    run_directory.lock(tmp_path).release()


@error_line('cannot be renamed: {}; move or delete it')
@pytest.mark.parametrize('fix', [shutil.rmtree, lambda path: path.rename(path.with_name('moved'))])
def test_a_checkpoint_that_cannot_be_renamed_is_moved_or_deleted(tmp_path, monkeypatch, fix):
    def fails(path):
        raise PermissionError(1, 'Operation not permitted')

    path = find_checkpoint(saved(tmp_path, byte_tokenizer()), 'last')
    monkeypatch.setattr(run_directory, 'set_aside', fails)
    rejected(run_directory.remove_later_steps, tmp_path, 1, False)
    fix(path)
    run_directory.remove_later_steps(tmp_path, 1, False)
    assert steps(tmp_path) == []


@error_line('tokenizer, and {} another one ({}): prepare the dataset with {}, for')
def test_text_of_another_tokenizer_is_prepared_again_as_the_line_says(
    run_here, finished, byte_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tuning = (f'--init_from={finished / "run"}', '--out_dir=tuned', '--max_iters=1')
    line = rejected(run_here, *tuning, f'--dataset={byte_dataset}')
    command = re.search('python (data/text/prepare.py .*?), and train with (.*)', line)
    (tmp_path / 'FILES').write_text('the cat sat on a mat and saw that the dog ran ' * 40)
    text.main(shlex.split(command[1])[1:])
    assert run_here(*tuning, command[2]) == 0


@error_line('has a vocabulary of {} tokens, and the model of {} only')
def test_a_vocabulary_that_is_too_large_fits_with_the_model_s_tokenizer(tmp_path, byte_dataset):
    config = {'dataset': 'd', 'init_from': 'out/a'}
    model = random_model(64)
    rejected(resume.build_model, model, None, Dataset(byte_dataset, 16), config, CPU)
    letters = char_tokenizer(list(' abcdefghijklmnopqrstuvwxyz'))
    data = Dataset(make_dataset(tmp_path / 'd', letters), 16)
    assert resume.build_model(model, None, data, config, CPU)[0] is model


# -----------------------------------------------------------------------------
# several ranks


class Second(Runtime):
    """Rank 1 of two: `first` is the value that rank 0 has."""

    first = None

    def broadcast_from_rank0(self, decide):
        return self.first

    def all_reduce(self, values, op='SUM'):
        return values

    def first_mismatch(self, value):
        return int(value != (self.first[0] if isinstance(self.first, tuple) else self.first))

    def wait_for_all(self, function, keep_alive):
        return function()


def second(first):
    runtime = Second('cpu', torch.float32, 1, 2)
    object.__setattr__(runtime, 'first', first)
    return runtime


@error_line('differs from that of rank 0: copy it')
def test_a_dataset_that_differs_is_copied_from_the_other_machine(tmp_path, dataset):
    other = make_dataset(tmp_path / 'other', Dataset(dataset, 16).tokenizer, seed=1)
    config = {'block_size': 16, 'seed': 1, 'objective': 'lm', 'data_cache': None}
    config['dataset'] = str(other)
    watchdog = SimpleNamespace(keep_alive=lambda *args: None, enter_phase=lambda *args: None)
    runtime = second(Dataset(dataset, 16, 1).fingerprint)
    rejected(resume.open_dataset, config, runtime, watchdog)
    shutil.rmtree(other)
    shutil.copytree(dataset, other)
    resume.open_dataset(config, runtime, watchdog)


@error_line('is missing on its machine or differs')
def test_a_checkpoint_that_one_machine_lacks_comes_from_a_shared_disk_or_mirror(tmp_path):
    path = find_checkpoint(saved(tmp_path / 'first', byte_tokenizer()), 'last')
    mirror = shutil.copytree(tmp_path / 'first', tmp_path / 'mirror')
    here = tmp_path / 'second' / Path(*path.parts[-2:])
    config = {'checkpoint_mirror': None, 'eval_only': True}
    runtime = second((sha256(path / MANIFEST_FILE), resume.file_identity(path)))
    rejected(resume.copy_to_this_machine, here, config, runtime)
    resume.copy_to_this_machine(path, config, runtime)  # one disk
    config['checkpoint_mirror'] = str(mirror)
    resume.copy_to_this_machine(here, config, runtime)
    assert steps(tmp_path / 'second') == steps(mirror)


@error_line('does not exist for rank {}: shard=True')
def test_a_sharded_run_opens_on_a_disk_that_all_ranks_share(tmp_path):
    run = Run.__new__(Run)
    run.config = {'shard': True, 'always_save_checkpoint': True, 'checkpoint_mirror': None}
    run.runtime, run.out_dir = second(True), tmp_path / 'run'
    run.state = SimpleNamespace(step=0, run='r')
    rejected(run.open, 1, None)
    run.out_dir.mkdir()
    (run.out_dir / 'config.py').touch()  # which rank 0 wrote
    run.open(1, None)


# -----------------------------------------------------------------------------
# optimizer, loss, metrics


@pytest.mark.parametrize(
    ('changes', 'good'),
    [
        case('scales its schedule by it', {'learning_rate': 0.0}, {'learning_rate': 1e-3}),
        case('has no matrix to train', {}, {'name': 'adamw'}),
        pytest.param({'learning_rate': 0.0}, {'name': 'adamw'}, id='or adamw'),
    ],
)
def test_muon_or_adamw_is_built_as_advised(changes, good):
    model = random_model(32)
    for block in () if changes else model.blocks:
        block.requires_grad_(False)
    settings = {'name': 'muon', 'learning_rate': 1e-3, 'betas': (0.9, 0.95), 'weight_decay': 0.1}
    settings |= {'muon_lr': 0.02, 'muon_momentum': 0.95, **changes}
    rejected(lambda: build_optimizers(model=model, **settings))
    assert build_optimizers(model=model, **{**settings, **good})


@error_line('is missing or belongs to another run')
def test_a_run_that_lost_its_reference_is_the_start_of_a_new_one(tmp_path, monkeypatch):
    state = SimpleNamespace(reference_key='key')
    run = SimpleNamespace(out_dir=tmp_path, state=state, runtime=CPU, resume_from=tmp_path)
    batches = SimpleNamespace(data=None, to_device=None)
    find_reference = (loss.find_or_compute_reference, None, batches, run, {'batch_size': 1})
    line = rejected(*find_reference)
    assert f'--init_from={tmp_path}' in line
    monkeypatch.setattr(loss, 'reference_logps', lambda *args: {'train': 1})
    run.resume_from, run.out_dir = None, tmp_path / 'another'
    assert find_reference[0](*find_reference[1:]) == {'train': 1}


@pytest.mark.parametrize(
    'lines',
    [
        case('has no metrics.jsonl; give a run', None),
        case('has no evaluation; give a run', '{"step": 1, "loss": 2.0}\n'),
    ],
)
def test_runs_are_drawn_once_they_are_runs_with_an_evaluation(finished, tmp_path, lines):
    if lines:
        (tmp_path / 'metrics.jsonl').write_text(lines)
    rejected(metrics.draw_runs, [tmp_path], tmp_path / 'runs.png')
    assert metrics.draw_runs([finished / 'run'], tmp_path / 'runs.png').exists()


@error_line('_log=True needs: pip install')
def test_a_tracker_works_once_it_is_installed(tmp_path, monkeypatch):
    config = {'tensorboard_log': False, 'wandb_log': True, 'wandb_project': 'p'}
    config['wandb_run_name'] = 'n'
    monkeypatch.setitem(sys.modules, 'wandb', None)
    rejected(metrics.Tracker, tmp_path, config, -1)
    init = lambda **settings: SimpleNamespace(finish=lambda: None)  # noqa: E731
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, Html=str))
    metrics.Tracker(tmp_path, config, -1).close()
    assert (
        'wandb' in re.search(r'all = \[(.*?)\n\]', (ROOT / 'pyproject.toml').read_text(), re.S)[1]
    )


# -----------------------------------------------------------------------------
# preflight


@pytest.fixture
def checks(monkeypatch, dataset):
    """The preflight checks of these settings of train.py."""
    for name in ('excepthook', 'stdout', 'stderr'):
        monkeypatch.setattr(sys, name, getattr(sys, name))

    def checks(*flags):
        small = '--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --device=cpu'.split()
        argv = [*small, f'--dataset={dataset}', *flags]
        return preflight.Preflight(settings_of(str(ROOT / 'train.py'), argv), CPU)

    return checks


def failed(checks, name):
    return [text for level, text in checks.run_check(name) if level == 'no']


@pytest.mark.parametrize(
    ('check', 'bad', 'good'),
    [
        case(
            'has no checkpoint to resume from', 'settings', 'init_from=resume', 'init_from=scratch'
        ),
        case(
            '{}: is not writable; choose another --out_dir', 'folder', 'out_dir=locked', 'out_dir=a'
        ),
        case(
            'is not writable; choose another --data_cache',
            'dataset',
            'data_cache=locked',
            'data_cache=other',
        ),
    ],
)
def test_a_check_passes_with_the_setting_that_it_suggests(
    checks, tmp_path, monkeypatch, check, bad, good
):
    monkeypatch.chdir(tmp_path)
    Path('locked').mkdir()
    monkeypatch.setattr(preflight.os, 'access', lambda path, mode: path.name != 'locked')
    (line,) = failed(checks(f'--{bad}'), check)
    assert f'--{good.partition("=")[0]}' in line
    assert failed(checks(f'--{good}'), check) == []


@error_line('another run is writing here; wait for its end or choose another --out_dir')
def test_the_check_of_a_locked_directory_passes_once_the_other_run_ends(checks, tmp_path):
    with FileLock(tmp_path / '.lock'):
        assert failed(checks(f'--out_dir={tmp_path}'), 'folder')
        assert not failed(checks(f'--out_dir={tmp_path}/another'), 'folder')
    assert not failed(checks(f'--out_dir={tmp_path}'), 'folder')


@error_line('is not prepared: run {}, which downloads')
def test_a_large_dataset_passes_once_it_is_prepared(checks, dataset, monkeypatch):
    large = checks('--dataset=openwebtext')
    if preflight.is_prepared(ROOT / 'data' / 'openwebtext'):
        pytest.skip('it is prepared here')
    assert 'data/openwebtext/prepare.py' in failed(large, 'dataset')[0]
    monkeypatch.setattr(preflight, 'resolve_dataset', lambda name: (dataset, True))  # as if it were
    assert next(large.check_part('openwebtext'))[0] == 'ok'


@error_line('has a vocabulary of {} tokens, and the model only')
def test_the_check_of_a_vocabulary_passes_with_the_tokenizer_of_the_model(checks, byte_dataset):
    small = checks(f'--dataset={byte_dataset}')
    small.shape = GPTConfig(16, 64, n_layer=1, n_head=2, n_embd=16)
    assert 'prepare it with the tokenizer' in failed(small, 'dataset')[0]
    fits = checks()
    fits.shape = small.shape
    assert failed(fits, 'dataset') == []


@pytest.mark.parametrize(
    'value',
    [case('was changed or damaged', 65), case('outside the vocabulary of {} tokens', 60_000)],
)
def test_a_damaged_dataset_passes_once_it_is_prepared_again(checks, tmp_path, value):
    folder = make_dataset(tmp_path / 'd', byte_tokenizer())
    ids = np.fromfile(folder / 'train.bin', '<u2')
    ids[1000] = value
    ids.tofile(folder / 'train.bin')
    assert 'prepare the dataset again' in failed(checks(f'--dataset={folder}'), 'dataset')[0]
    shutil.rmtree(folder)
    make_dataset(folder, byte_tokenizer())
    assert failed(checks(f'--dataset={folder}'), 'dataset') == []


@error_line('is not a nanoGPT checkpoint; give a ckpt.pt', 'so its shape is unknown; first run')
def test_the_shape_of_an_external_model_is_known_once_it_is_there(tmp_path, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    path.write_bytes(b'x')
    rejected(preflight.external_shape, str(path))
    torch.save({'model_args': {'n_layer': 3}}, path)
    assert preflight.external_shape(str(path)) == {'n_layer': 3}
    assert 'hf download some/model' in rejected(preflight.external_shape, 'some/model')
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 2}')
    monkeypatch.setattr(
        'huggingface_hub.try_to_load_from_cache', lambda *args: str(tmp_path / 'config.json')
    )
    monkeypatch.setattr(preflight, 'parse_model_config', lambda settings, where: settings)
    assert preflight.external_shape('some/model')['n_layer'] == 2
