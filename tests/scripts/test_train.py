"""train.py from end to end: what a run does, writes and rejects, and how it resumes."""

import errno
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODERN, ROOT, hashes, make_dataset, metrics, refused, steps
from error_lines import error_line
from filelock import FileLock

import model as model_module
import sample
from configurator import configure
from flatgpt import files, runtime
from flatgpt.checkpoint import load, save
from flatgpt.checkpoint.__main__ import print_table
from flatgpt.checkpoint.load import find_checkpoint, list_checkpoints, load_model
from flatgpt.data.dataset import Dataset, Writer
from flatgpt.data.tokenizer import EOT, byte_tokenizer
from flatgpt.errors import UserError
from flatgpt.inference import engine
from flatgpt.training import metrics as metrics_module
from flatgpt.training import optim, run_directory
from flatgpt.training import run as run_module
from model import GPT, GPTConfig

SHORT = ('--short_block_size=4', '--short_iters=4')
FIXED = ('--lr_decay_iters=100', '--dropout=0.2')  # what does not depend on when a run stops


def contents(path):
    """Every file below a folder and when it was last changed."""
    paths = (p for p in Path(path).rglob('*') if p.name != '.lock')
    return {str(p): p.stat().st_mtime_ns for p in paths}


@pytest.fixture(scope='module')
def source(run_here, tmp_path_factory):
    """A finished run, which tests must not change."""
    out_dir = tmp_path_factory.mktemp('source') / 'run'
    assert run_here(f'--out_dir={out_dir}', '--max_iters=20', '--eval_interval=10') == 0
    return out_dir


@pytest.fixture
def copied(source, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(source, tmp_path / 'copied')


def signalled(monkeypatch, number, at_step):
    """Send a signal while a step is logged."""
    log = metrics_module.Tracker.log

    def log_and_signal(self, step, **values):
        log(self, step, **values)
        if step == at_step and 'loss' in values:
            signal.raise_signal(number)

    monkeypatch.setattr(metrics_module.Tracker, 'log', log_and_signal)


# -----------------------------------------------------------------------------
# a whole run


@pytest.fixture(scope='module')
def first(script, tiny, tmp_path_factory):
    """A run as a user starts it, in a process of its own, with no out_dir given."""
    cwd = tmp_path_factory.mktemp('first')
    return script('train.py', tiny, '--sample_tokens=20', cwd=cwd), cwd


def test_a_run_writes_settings_metrics_plot_and_checkpoints(first):
    done, cwd = first
    assert done.returncode == 0, done.stderr
    (out_dir,) = (cwd / 'out').iterdir()
    assert re.fullmatch(r'[a-z]+_[a-z]+-\d{6}-\d{4}', out_dir.name)
    for name in ('config.py', 'metrics.jsonl', 'loss.png', 'DONE'):
        assert (out_dir / name).is_file(), name
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert steps(out_dir) == [2, 4]
    assert [path.name for path in cwd.iterdir()] == ['out']


def test_the_end_of_a_run_prints_its_result_and_its_files(first):
    done, cwd = first
    (out_dir,) = (cwd / 'out').iterdir()
    out_dir = out_dir.relative_to(cwd)
    loss = metrics(cwd / out_dir, 'val_loss')[4]
    assert f'validation loss {loss:.4f}' in done.stdout
    assert f'{out_dir}/checkpoints/step-00000004' in done.stdout
    assert f'{out_dir}/loss.png' in done.stdout
    assert f'python sample.py --out_dir={out_dir}' in done.stdout
    text = done.stdout.split('-' * 64)[1]
    assert len(text.strip('\n')) >= 15
    assert 'tokens/s' in done.stdout
    assert 'mfu' not in done.stdout.lower()
    assert 'Warning' not in done.stderr


def test_samples_of_short_documents_fill_a_page(run_here, tmp_path, monkeypatch, capsys):
    asked = []

    def three_tokens(model, tokenizer, prompts, sampling):
        asked.append((sampling.max_new_tokens, sampling.seed))
        return [SimpleNamespace(text=text) for text in ('one ', 'page', '\n')]

    monkeypatch.setattr(engine, 'generate', three_tokens)
    run_here(f'--out_dir={tmp_path}', '--sample_tokens=7', '--max_iters=0', '--seed=5')
    assert asked == [(7, 5), (4, 6), (1, 7)]
    text = capsys.readouterr().out.split('-' * 64)[1]
    assert text == '\none page\n\none page\n\none page\n'


def test_a_sample_at_each_evaluation_is_printed_and_logged_and_changes_nothing(
    run_here, tmp_path, capsys
):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ('--max_iters=6', '--dropout=0.2')
    run_here(f'--out_dir={tmp_path}/without', *flags)
    assert 'sample:' not in capsys.readouterr().out
    samples = ('--eval_sample_tokens=20', '--sample_tokens=30', '--tensorboard_log')
    run_here(f'--out_dir={tmp_path}/with', *flags, *samples, '--peak_tflops=1')
    texts = capsys.readouterr().out.split('-' * 64 + '\n')[1::2]
    assert [len(text.strip('\n')) for text in texts] == [20, 20, 20, 30]
    assert len(set(texts)) == 4

    assert metrics(tmp_path / 'with') == metrics(tmp_path / 'without')
    assert metrics(tmp_path / 'with', 'val_loss') == metrics(tmp_path / 'without', 'val_loss')
    assert hashes(find_checkpoint(tmp_path / 'with', 'last')) == hashes(
        find_checkpoint(tmp_path / 'without', 'last')
    )

    events = EventAccumulator(str(tmp_path / 'with' / 'tb')).Reload()
    logged = events.Tensors('sample/text_summary')
    assert [event.step for event in logged] == [0, 2, 4, 6]
    for event, text in zip(logged, texts, strict=True):
        assert event.tensor_proto.string_val[0].decode().strip() == text.strip()
    for key in ('loss', 'lr', 'grad_norm', 'tokens_per_s', 'mfu'):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3, 4, 5, 6], key
    assert [event.step for event in events.Scalars('val_loss')] == [0, 2, 4, 6]


def test_the_newest_run_is_resumed_and_sampled(first, run_here, monkeypatch, capsys):
    _, cwd = first
    monkeypatch.chdir(cwd)
    assert run_here('--init_from=resume', config=cwd / next(cwd.glob('out/*/config.py'))) == 0
    assert 'finished' in capsys.readouterr().out
    settings = {name: getattr(sample, name) for name in sample_settings()}
    model, _, state = load_model(None)
    assert state['step'] == 4
    loaded, tokenizer = sample.load({**settings, 'device': 'cpu', 'dtype': 'float32'})
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)
    assert tokenizer.kind == 'char'


def sample_settings(*args):
    return configure({'__file__': sample.__file__, **vars(sample)}, list(map(str, args)), 'start')


def test_sample_accepts_the_config_of_a_run(source, monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    settings = sample_settings(source / 'config.py')
    model, _ = sample.load(settings)
    assert Path(settings['out_dir']) == source
    assert model.config.n_embd == 16


def test_the_config_written_by_a_run_can_be_used_as_a_config(source, run_here, tmp_path, capsys):
    assert run_here(f'--out_dir={tmp_path}/again', config=source / 'config.py') == 0
    assert hashes(find_checkpoint(source, 'last')) == hashes(
        find_checkpoint(tmp_path / 'again', 'last')
    )


def test_a_run_makes_exactly_max_iters_updates_then_evaluates_and_saves(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', '--max_iters=5', '--eval_interval=5')
    assert list(metrics(tmp_path)) == [1, 2, 3, 4, 5]
    assert list(metrics(tmp_path, 'val_loss')) == [0, 5]
    assert steps(tmp_path) == [5]
    state = json.loads((list_checkpoints(tmp_path)[0] / 'state.json').read_text())
    assert state['val_loss'] == metrics(tmp_path, 'val_loss')[5]
    optimizer = find_checkpoint(tmp_path) / load.OPTIMIZER_FILE
    from safetensors.torch import load_file

    assert {v.item() for k, v in load_file(optimizer).items() if k.endswith('.step')} == {5.0}


def test_every_line_of_the_metrics_has_its_documented_fields(source):
    lines = metrics_module.read_metrics(source)
    assert all('step' in line for line in lines)
    for line in lines:
        if 'loss' in line:
            assert {'lr', 'grad_norm', 'tokens_per_s'} <= line.keys()
        else:
            assert {'train_loss', 'val_loss', 'val_bpb'} <= line.keys()
    assert list(metrics(source, 'val_loss')) == [0, 10, 20]


def test_a_run_of_zero_updates_is_valid(run_here, tmp_path):
    assert run_here(f'--out_dir={tmp_path}', '--max_iters=0') == 0
    assert metrics(tmp_path) == {}


def test_epochs_determine_the_number_of_updates(run_here, tmp_path, dataset):
    run_here(f'--out_dir={tmp_path}', '--epochs=0.25', '--eval_interval=100')
    updates = math.ceil(0.25 * Dataset(dataset, 16).n_windows / 8)
    assert list(metrics(tmp_path))[-1] == updates > 4
    lr = metrics(tmp_path, 'lr')
    assert lr[updates] < 2e-3  # the schedule ends with the run


def test_log_interval_sets_how_often_a_line_is_logged(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', '--max_iters=7', '--log_interval=3')
    assert list(metrics(tmp_path)) == [3, 6]


def test_the_seed_determines_a_run(run_here, tmp_path):
    losses = []
    for number, seed in enumerate((1, 1, 2)):
        out_dir = tmp_path / str(number)
        run_here(f'--out_dir={out_dir}', f'--seed={seed}', '--dropout=0.1')
        losses.append(metrics(out_dir))
    assert losses[0] == losses[1] != losses[2]


def test_training_in_bfloat16_saves_float32(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', '--dtype=bfloat16')
    model, _, _ = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert metrics(tmp_path)[4] < metrics(tmp_path)[1]


def test_a_config_and_a_dataset_of_nanogpt_run_unchanged(run_here, tmp_path, shared, dataset):
    tokenizer = Dataset(dataset, 16).tokenizer
    theirs = tmp_path / 'theirs'
    theirs.mkdir()
    for name in ('train.bin', 'val.bin'):
        shutil.copy(dataset / name, theirs / name)
    characters = [token.decode() for token in tokenizer.token_bytes]
    meta = {'vocab_size': len(characters), 'itos': dict(enumerate(characters))}
    meta['stoi'] = {character: i for i, character in enumerate(characters)}
    (theirs / 'meta.pkl').write_bytes(pickle.dumps(meta))
    config = tmp_path / 'train_theirs.py'
    config.write_text(
        'import time\n'
        f'out_dir = {str(tmp_path / "out")!r}\n'
        'eval_interval = 2 # keep frequent\neval_iters = 2\nlog_interval = 1\n'
        'always_save_checkpoint = False\n'
        "wandb_log = False\nwandb_project = 'x'\nwandb_run_name = 'mini-' + str(time.time())\n"
        f'dataset = {str(theirs)!r}\n'
        'gradient_accumulation_steps = 1\nbatch_size = 4\nblock_size = 16\n'
        'n_layer = 1\nn_head = 2\nn_embd = 16\ndropout = 0.0\n'
        'learning_rate = 1e-3\nmax_iters = 4\nlr_decay_iters = 4\nmin_lr = 1e-4\n'
        'beta2 = 0.99\nwarmup_iters = 1\n'
        "device = 'cpu'  # run on cpu only\ncompile = False # do not torch compile the model\n"
    )
    assert run_here('--sample_tokens=0', config=config) == 0
    assert load_model(tmp_path / 'out')[1] == tokenizer
    ours = metrics(tmp_path / 'out', 'val_loss')  # a byte a character, so bits are nats / ln 2
    bits = metrics(tmp_path / 'out', 'val_bpb')
    assert bits == pytest.approx({step: loss / math.log(2) for step, loss in ours.items()})


# -----------------------------------------------------------------------------
# the loss


def test_an_evaluation_covers_every_token_of_the_validation_split(run_here, tmp_path, dataset):
    run_here(f'--out_dir={tmp_path}', '--eval_iters=None')
    model, _, _ = load_model(tmp_path, 'last')
    ids = torch.from_numpy(np.fromfile(dataset / 'val.bin', '<u2').astype(np.int64))
    total, targets = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        with torch.no_grad():
            loss = model(window[None, :-1], window[None, 1:])[1]
        total, targets = total + loss.item() * (len(window) - 1), targets + len(window) - 1
    assert targets == len(ids) - 1
    measured = metrics(tmp_path, 'val_loss')[4]
    assert measured == pytest.approx(total / targets, rel=1e-6)
    bits = measured / math.log(2)  # one byte a character
    assert metrics(tmp_path, 'val_bpb')[4] == pytest.approx(bits, rel=1e-9)


def test_without_an_evaluation_interval_only_the_end_is_evaluated(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', '--eval_interval=None', '--eval_train=False')
    assert list(metrics(tmp_path, 'val_loss')) == [4]
    assert metrics(tmp_path, 'train_loss') == {}
    assert (tmp_path / 'loss.png').exists()
    assert print_table(list_checkpoints(tmp_path))


def test_evaluation_does_not_change_the_training(run_here, tmp_path):
    for interval in (1, 100):
        run_here(f'--out_dir={tmp_path}/{interval}', f'--eval_interval={interval}', *FIXED)
    assert metrics(tmp_path / '1') == metrics(tmp_path / '100')
    assert hashes(find_checkpoint(tmp_path / '1', 'last')) == hashes(
        find_checkpoint(tmp_path / '100', 'last')
    )


@pytest.mark.parametrize('settings', [(), MODERN], ids=['gpt2', 'modern'])
def test_accumulated_gradients_equal_those_of_one_batch(run_here, tmp_path, settings):
    for parts in (1, 2, 4, 8):
        run_here(
            *settings,
            f'--out_dir={tmp_path}/{parts}',
            f'--gradient_accumulation_steps={parts}',
            f'--batch_size={8 // parts}',
            '--max_iters=6',
        )
    norms = metrics(tmp_path / '1', 'grad_norm')  # of the first step, before rounding adds up
    whole = list(metrics(tmp_path / '1').values())
    for parts in (2, 4, 8):
        losses = list(metrics(tmp_path / str(parts)).values())
        norm = metrics(tmp_path / str(parts), 'grad_norm')
        assert norm[1] == pytest.approx(norms[1], rel=1e-5)
        # Muon iterates in bfloat16, where a last digit of the gradient can turn a rounding
        assert losses == pytest.approx(whole, rel=1e-3 if settings else 1e-5)


def test_the_logged_loss_is_the_mean_over_all_micro_batches(run_here, tmp_path, dataset):
    run_here(f'--out_dir={tmp_path}', '--gradient_accumulation_steps=3', '--learning_rate=0.0')
    torch.manual_seed(1337)
    shape = {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'bias': False}
    data = Dataset(dataset, 16)
    model = GPT(GPTConfig(block_size=16, vocab_size=data.vocab_size, **shape))
    x, y = map(torch.from_numpy, data.batch(0, 12))
    assert metrics(tmp_path)[1] == pytest.approx(model(x, y)[1].item(), rel=1e-5)


def test_training_starts_with_short_sequences(run_here, tmp_path, dataset):
    args = ('--short_block_size=4', '--short_iters=2', '--max_iters=3')
    still = ('--learning_rate=0', '--decay_lr=False', '--gradient_accumulation_steps=1')
    run_here(f'--out_dir={tmp_path}', *args, *still)
    torch.manual_seed(1337)
    data = Dataset(dataset, 16, seed=1337)
    model = GPT(GPTConfig(16, data.vocab_size, n_layer=1, n_head=2, n_embd=16))
    losses = []
    for step in range(3):
        x, y = map(torch.from_numpy, data.batch(4 * step, 4))
        width = 4 if step < 2 else 16
        losses.append(model(x.view(-1, width), y.view(-1, width))[1].item())
    assert list(metrics(tmp_path).values()) == pytest.approx(losses, rel=1e-5)


@pytest.fixture(scope='session')
def stories(shared):
    """A dataset of documents of a few words each."""
    folder, tokenizer = shared / 'stories', byte_tokenizer()
    text = f'{EOT}the cat sat{EOT}a dog ran as rain fell at noon{EOT}that mat' * 20
    with Writer(folder, tokenizer) as writer:
        for split in ('train', 'val'):
            writer.write(split, tokenizer.encode(text, allow_eot=True))
    return folder


@torch.no_grad()
def masked_loss(model, x, y, documents):
    x, y, documents = map(torch.from_numpy, (x, y, documents))
    loss = model(x, y, documents=documents)[1].item()
    assert abs(loss - model(x, y)[1].item()) > 1e-5  # it does make a difference
    return loss


@pytest.mark.parametrize('settings', [(), ('--gradient_checkpointing',)])
def test_a_step_masks_documents_in_short_sequences_too(run_here, tmp_path, stories, settings):
    still = ('--learning_rate=0', '--decay_lr=False', '--gradient_accumulation_steps=1')
    cut = ('--short_block_size=8', '--short_iters=2', '--max_iters=3', '--mask_documents')
    run_here(f'--out_dir={tmp_path}', f'--dataset={stories}', *still, *cut, *settings)
    model, data, losses = load_model(tmp_path, 'last')[0], Dataset(stories, 16), []
    for step in range(3):
        batch = data.batch(4 * step, 4, documents=True)
        losses.append(
            masked_loss(model, *(part.reshape(-1, 8 if step < 2 else 16) for part in batch))
        )
    assert list(metrics(tmp_path).values()) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize('settings', [(), MODERN], ids=['gpt2', 'modern'])
def test_an_evaluation_masks_documents_as_training_does(run_here, tmp_path, stories, settings):
    args = (f'--dataset={stories}', '--mask_documents', '--eval_iters=None', '--eval_train=False')
    run_here(f'--out_dir={tmp_path}', *args, *settings)
    data = Dataset(stories, 16)
    batch = data.eval_batch('val', data.eval_starts('val'), documents=True)
    loss = masked_loss(load_model(tmp_path, 'last')[0], *batch)
    assert metrics(tmp_path, 'val_loss')[4] == pytest.approx(loss, rel=1e-5)


def test_the_norm_of_the_gradient_is_logged_before_it_is_clipped(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}/a', '--grad_clip=1e-3')
    run_here(f'--out_dir={tmp_path}/b', '--grad_clip=0.0')
    norms = [metrics(tmp_path / name, 'grad_norm')[1] for name in 'ab']
    assert norms[0] == norms[1] > 1e-2


# -----------------------------------------------------------------------------
# learning rate


def rates(run_here, out_dir, *args):
    run_here(f'--out_dir={out_dir}', '--eval_interval=100', *args)
    return list(metrics(out_dir, 'lr').values())


def test_the_cosine_schedule_warms_up_linearly_and_then_decays(run_here, tmp_path):
    args = ('--max_iters=12', '--warmup_iters=4', '--lr_decay_iters=10')
    lr = rates(run_here, tmp_path, *args)
    assert lr[:4] == pytest.approx([1e-2 * n / 5 for n in (1, 2, 3, 4)])
    cosine = [0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert lr[4:10] == pytest.approx([1e-3 + c * 9e-3 for c in cosine])
    assert lr[10:] == [1e-3, 1e-3]


def test_the_linear_schedule_is_constant_and_then_decays_linearly(run_here, tmp_path):
    args = ('--max_iters=11', '--lr_schedule=linear', '--cooldown=0.4', '--lr_decay_iters=10')
    lr = rates(run_here, tmp_path, *args)
    assert lr[:7] == pytest.approx([1e-2] * 7)
    assert lr[7:] == pytest.approx([1e-3 + part * 9e-3 for part in (0.75, 0.5, 0.25, 0)])


def test_the_constant_schedule_warms_up_and_stays_constant(run_here, tmp_path):
    lr = rates(run_here, tmp_path, '--lr_schedule=constant', '--warmup_iters=3', '--max_iters=6')
    assert lr == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2])


def test_the_learning_rate_of_muon_follows_the_schedule_of_adamw(run_here, tmp_path, monkeypatch):
    seen = []
    step = optim.Muon.step

    def remember(self):
        seen.append(self.param_groups[0]['lr'])
        return step(self)

    monkeypatch.setattr(optim.Muon, 'step', remember)
    lr = rates(run_here, tmp_path, *MODERN, '--lr_schedule=linear', '--warmup_iters=2')
    assert seen == pytest.approx([5 * rate for rate in lr])  # muon_lr is five times learning_rate
    assert len(set(seen)) > 2


def test_the_learning_rate_is_constant_without_decay(run_here, tmp_path):
    assert rates(run_here, tmp_path, '--decay_lr=False', '--warmup_iters=3') == [1e-2] * 4


# -----------------------------------------------------------------------------
# checkpoints kept, and when a run ends


def test_all_evaluated_checkpoints_are_kept_or_only_the_last_two_and_the_best(run_here, tmp_path):
    args = ('--max_iters=6', '--eval_interval=1')
    run_here(f'--out_dir={tmp_path}/all', *args)
    assert steps(tmp_path / 'all') == [1, 2, 3, 4, 5, 6]
    falling = (*args, '--always_save_checkpoint=False')
    run_here(f'--out_dir={tmp_path}/some', *falling)
    losses = metrics(tmp_path / 'some', 'val_loss')
    best = min(range(1, 7), key=losses.get)
    assert steps(tmp_path / 'some') == sorted({5, 6, best})
    assert find_checkpoint(tmp_path / 'some', 'best').name.endswith(str(best))


def test_save_interval_saves_between_evaluations(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', '--max_iters=7', '--eval_interval=100', '--save_interval=3')
    assert steps(tmp_path) == [6, 7]


def test_the_best_loss_is_not_replaced_by_a_worse_one(run_here, tmp_path):
    run_here(f'--out_dir={tmp_path}', '--max_iters=6', '--learning_rate=0.5', '--eval_interval=1')
    losses = metrics(tmp_path, 'val_loss')
    state = json.loads((find_checkpoint(tmp_path, 'last') / 'state.json').read_text())
    assert state['best_val_loss'] == min(losses.values()) < max(losses.values())


def test_patience_stops_a_run_that_no_longer_improves(run_here, tmp_path, capsys):
    still = ('--learning_rate=0.0', '--decay_lr=False', '--max_iters=50', '--patience=2')
    assert run_here(f'--out_dir={tmp_path}', *still) == 0
    assert steps(tmp_path) == [2, 4]
    assert (tmp_path / 'DONE').exists()
    capsys.readouterr()
    assert run_here(f'--out_dir={tmp_path}', *still, '--init_from=resume') == 0
    assert 'finished' in capsys.readouterr().out
    assert steps(tmp_path) == [2, 4]


# -----------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize('settings', [(), (*MODERN, *SHORT)], ids=['gpt2', 'modern'])
def test_a_resumed_run_equals_an_uninterrupted_one(run_here, tmp_path, monkeypatch, settings):
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    args = (*FIXED, *settings, '--max_iters=8', '--eval_interval=3')
    run_here(f'--out_dir={whole}', *args)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 5)
        assert run_here(f'--out_dir={halves}', *args) == 128 + signal.SIGTERM
    assert steps(halves)[-1] in (5, 6)
    assert not (halves / 'DONE').exists()
    assert run_here('--init_from=resume', config=halves / 'config.py') == 0
    assert hashes(find_checkpoint(whole, 'last')) == hashes(find_checkpoint(halves, 'last'))
    for key in ('loss', 'val_loss', 'lr', 'grad_norm'):
        assert metrics(whole, key) == metrics(halves, key)


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'])
def test_each_signal_saves_prints_how_to_resume_and_sets_the_exit_status(
    run_here, tmp_path, monkeypatch, capsys, name
):
    if not hasattr(signal, name):
        pytest.skip(f'this platform has no {name}')
    number = getattr(signal, name)
    signalled(monkeypatch, number, 1)
    assert run_here(f'--out_dir={tmp_path}/run', '--max_iters=100', *FIXED) == 128 + number
    step = steps(tmp_path / 'run')[-1]
    assert step in (1, 2)
    assert (
        f'stopped at step {step}; step-{step:08d} is saved, resume with: '
        f'python train.py {tmp_path}/run/config.py --init_from=resume'
    ) in capsys.readouterr().out


def test_the_first_evaluation_of_a_resumed_run_is_saved_with_its_checkpoint(
    run_here, tmp_path, monkeypatch
):
    calls, eval_batch = [], Dataset.eval_batch

    def interrupt(self, *args):
        calls.append(args)
        if len(calls) == 6:  # in the evaluation of step 2
            signal.raise_signal(signal.SIGTERM)
        return eval_batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, 'eval_batch', interrupt)
        run_here(f'--out_dir={tmp_path}')
    last = load.list_checkpoints(tmp_path)[-1]
    assert not load.read_state(last)['evaluated']
    # the step it stopped at stays the best: what follows makes the model worse
    run_here(f'--out_dir={tmp_path}', '--init_from=resume', '--learning_rate=5.0')
    again = last.with_name(f'{last.name}.again')
    assert load.read_state(again)['evaluated']
    assert not last.exists()
    assert find_checkpoint(tmp_path, 'best') == again


def test_a_read_error_is_not_reported_as_a_damaged_checkpoint(copied, run_here, monkeypatch):
    def stale(path):
        raise OSError(116, 'Stale file handle')

    monkeypatch.setattr(save, 'sha256', stale)
    text = refused(run_here, f'--out_dir={copied}', '--auto_resume', '--max_iters=30')
    assert 'Stale file handle' in text
    assert steps(copied) == [10, 20]


def test_auto_resume_resumes_a_fine_tuned_model_of_another_shape(
    source, run_here, tmp_path, monkeypatch
):
    args = (f'--out_dir={tmp_path}', f'--init_from={source}', '--auto_resume', '--n_layer=3')
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 1)
        run_here(*args)
    assert run_here(*args) == 0
    assert load_model(tmp_path)[0].config.n_layer == 1


def test_a_moved_run_resumes_in_its_new_directory(copied, run_here, tmp_path):
    moved = copied.rename(tmp_path / 'moved')
    assert run_here('--init_from=resume', '--max_iters=21', config=moved / 'config.py') == 0
    assert steps(moved)[-1] == 21
    assert not copied.exists()


def test_a_dataset_that_was_prepared_again_is_reported(copied, run_here, monkeypatch, capsys):
    monkeypatch.setattr(Dataset, 'fingerprint', 'another')
    run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=21')
    assert 'has changed since' in capsys.readouterr().out


def test_an_initial_model_reports_the_settings_that_it_replaces(source, run_here, tmp_path, capsys):
    run_here(f'--out_dir={tmp_path}', f'--init_from={source}', '--n_layer=3', '--max_iters=1')
    assert f'using the n_layer of {source}; the' in capsys.readouterr().out


def test_a_run_that_ends_in_nan_fails(run_here, tmp_path):
    text = refused(
        run_here,
        f'--out_dir={tmp_path}',
        '--learning_rate=1e30',
        '--max_iters=2',
        '--grad_clip=0.0',
    )
    assert 'nan' in text
    assert '--learning_rate' in text
    assert not (tmp_path / 'DONE').exists()


def test_a_closed_terminal_or_pipe_does_not_stop_training(run_here, tmp_path, monkeypatch):
    def closed(*args):
        raise BrokenPipeError

    monkeypatch.setattr('tqdm.tqdm.write', closed)
    assert run_here(f'--out_dir={tmp_path}') == 0
    assert (tmp_path / 'DONE').exists()


@pytest.mark.parametrize('broken', ['no matplotlib', 'full disk', 'sample'])
def test_a_failed_plot_or_sample_is_a_warning(run_here, tmp_path, monkeypatch, capsys, broken):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, 'No space left on device', 'loss.png')

    def no_text(*args):
        raise KeyError('no such token')

    warnings = {
        'no matplotlib': ['no loss curve: this needs the package matplotlib: pip install matplot'],
        'full disk': ['no loss curve: loss.png: No space left on device'],
        'sample': ["no sample: 'no such token' is missing"] * 4,
    }
    if broken == 'no matplotlib':
        for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
    elif broken == 'full disk':
        monkeypatch.setattr('matplotlib.figure.Figure.savefig', fail)
    else:
        monkeypatch.setattr(run_module, 'training_sample', no_text)
    samples = ('--sample_tokens=5', '--eval_sample_tokens=5', '--max_iters=6')
    assert run_here(f'--out_dir={tmp_path}/run', *samples) == 0
    out = capsys.readouterr().out
    found = [line for line in out.splitlines() if line.startswith('warning')]
    assert len(found) == len(warnings[broken])
    assert all(w in line for w, line in zip(warnings[broken], found, strict=True)), found
    assert 'validation loss' in out
    assert 'checkpoint: ' in out
    assert (tmp_path / 'run' / 'DONE').exists()
    assert (tmp_path / 'run' / 'loss.png').exists() == (broken == 'sample')
    assert not list(tmp_path.rglob('*.part'))


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
@pytest.mark.skipif(os.name == 'nt', reason='Windows ends at SIGTERM')
def test_a_signal_after_the_last_step_does_not_make_the_run_fail(
    run_here, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(
        'matplotlib.figure.Figure.savefig',
        lambda *args, **options: signal.raise_signal(getattr(signal, name)),
    )
    assert run_here(f'--out_dir={tmp_path}', '--sample_tokens=5') == 0
    assert (tmp_path / 'DONE').exists()
    assert 'sample:' not in capsys.readouterr().out


def test_a_failing_tracker_is_one_warning(run_here, tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, **settings):
            assert settings['project'] == 'p'

        def __getattr__(self, name):  # log and finish
            raise ConnectionError('no\nnetwork')

    def no_key(**settings):
        raise RuntimeError('no API key')

    for init in (Broken, no_key):
        monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, Html=str))
        out_dir = tmp_path / init.__name__
        flags = ('--wandb_log', '--wandb_project=p', '--eval_sample_tokens=3')
        assert run_here(f'--out_dir={out_dir}', *flags) == 0
        out = capsys.readouterr().out
        assert out.count('warning') == 1, out
        said = 'no network' if init is Broken else 'no API key'
        assert f'warning: wandb: {said}; metrics.jsonl has all' in out
        assert sorted(metrics(out_dir)) == [1, 2, 3, 4]


def test_metrics_on_a_full_disk_give_one_warning_and_no_partial_lines(
    run_here, tmp_path, monkeypatch, capsys
):
    log = metrics_module.MetricsFile.log

    class Full:
        """What takes a part of a line."""

        def __init__(self, file):
            self.file = file

        def write(self, line):
            return self.file.write(line[:7])

    def full_for_a_while(self, step, values):
        file = self.file
        if step == 2:
            self.file = Full(file)
        try:
            log(self, step, values)
        finally:
            self.file = file

    monkeypatch.setattr(metrics_module.MetricsFile, 'log', full_for_a_while)
    assert run_here(f'--out_dir={tmp_path}') == 0
    assert capsys.readouterr().out.count('warning: metrics.jsonl: ') == 1
    assert [line['step'] for line in metrics_module.read_metrics(tmp_path)] == [0, 1, 3, 4, 4]


def test_a_done_file_that_cannot_be_written_is_a_warning(run_here, tmp_path, monkeypatch, capsys):
    touch = Path.touch

    def full(self, *args, **options):
        if self.name == 'DONE':
            raise OSError(errno.ENOSPC, 'No space left on device', str(self))
        touch(self, *args, **options)

    monkeypatch.setattr(Path, 'touch', full)
    assert run_here(f'--out_dir={tmp_path}') == 0
    assert 'has no DONE file' in capsys.readouterr().out


@pytest.mark.skipif(os.name == 'nt', reason='a shell of POSIX')
@pytest.mark.parametrize(
    'streams',
    ['>&-', '2>&-', '<&- >&- 2>&-', '>/dev/full', '>/dev/full 2>&1', '| head -n 1'],
)
def test_a_closed_or_full_output_stream_does_not_stop_training(
    environment, tiny, tmp_path, streams
):
    train = shlex.join([sys.executable, str(ROOT / 'train.py'), str(tiny), '--sample_tokens=5'])
    command = f'{train} --out_dir=run {streams}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], env=environment, cwd=tmp_path, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert (tmp_path / 'run' / 'DONE').exists()
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [0, 1, 2, 2, 3, 4, 4]


def test_a_refused_resume_changes_nothing(copied, run_here):
    before = contents(copied)
    early = f'--checkpoint={load.list_checkpoints(copied)[0]}'
    refused(run_here, f'--out_dir={copied}', '--init_from=resume', early, '--n_layer=3')
    assert contents(copied) == before


def test_overwrite_deletes_nothing_before_the_trackers_are_open(copied, run_here, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    text = refused(run_here, f'--out_dir={copied}', '--overwrite', '--wandb_log')
    assert 'wandb_log' in text
    assert steps(copied) == [10, 20]


def test_a_checkpoint_that_was_set_aside_can_be_resumed(copied, run_here, monkeypatch):
    aside = save.set_aside(load.list_checkpoints(copied)[-1])
    run_here(f'--out_dir={copied}', '--init_from=resume', f'--checkpoint={aside}', '--max_iters=21')
    assert steps(copied) == [10, 21]


def test_a_run_can_be_resumed_in_another_number_format(copied, run_here):
    args = (f'--out_dir={copied}', '--init_from=resume', '--max_iters=21')
    assert run_here(*args, '--dtype=bfloat16') == 0
    assert steps(copied)[-1] == 21


def test_a_run_resumed_with_another_global_batch_continues_at_the_next_sample(
    copied, run_here, monkeypatch
):
    firsts, batch = [], Dataset.batch

    def noting(self, first, *args):
        firsts.append(first)
        return batch(self, first, *args)

    monkeypatch.setattr(Dataset, 'batch', noting)
    samples = load.read_state(find_checkpoint(copied, 'last'))['samples']
    run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=22', '--batch_size=2')
    assert firsts[0] == samples
    assert load.read_state(find_checkpoint(copied, 'last'))['samples'] > samples


def test_eval_only_does_not_change_the_directory_of_an_auto_resumed_run(copied, run_here):
    before = contents(copied)
    run_here(f'--out_dir={copied}', '--auto_resume', '--eval_only')
    assert contents(copied) == before


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(run_here, tmp_path, monkeypatch):
    calls, eval_batch = [], Dataset.eval_batch

    def interrupt(self, *args):
        calls.append(args)
        if len(calls) == 6:  # four belong to the evaluation before the first step
            signal.raise_signal(signal.SIGTERM)
        return eval_batch(self, *args)

    args = (f'--out_dir={tmp_path}/a', *FIXED)
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, 'eval_batch', interrupt)
        assert run_here(*args) == 128 + signal.SIGTERM
    assert len(calls) <= 7
    assert steps(tmp_path / 'a') == [2]
    assert list(metrics(tmp_path / 'a', 'val_loss')) == [0]
    assert run_here(*args, '--init_from=resume') == 0
    run_here(f'--out_dir={tmp_path}/b', *FIXED)
    assert metrics(tmp_path / 'a', 'val_loss') == metrics(tmp_path / 'b', 'val_loss')
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )


def test_a_stop_after_a_skipped_update_saves_the_state_before_it(
    run_here, tmp_path, monkeypatch, capsys
):
    log, forward, spoilt = metrics_module.Tracker.log, GPT.forward, []

    def log_and_stop(self, step, **values):
        log(self, step, **values)
        spoilt[:] = [True] * (step >= 2)
        if step == 3 and 'loss' in values:
            signal.raise_signal(signal.SIGTERM)

    def spoil(self, *args, **options):
        logits, loss = forward(self, *args, **options)
        return logits, loss * float('nan') if spoilt and self.training else loss

    monkeypatch.setattr(metrics_module.Tracker, 'log', log_and_stop)
    monkeypatch.setattr(GPT, 'forward', spoil)
    args = ('--eval_interval=100', '--max_iters=100')
    assert run_here(f'--out_dir={tmp_path}', *args) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert 'step 3: loss nan' in out
    assert 'stopped at step 3; step-00000003 is saved' in out
    model, _, _ = load.load_checkpoint(find_checkpoint(tmp_path, 'last'))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_spikes_and_skipped_updates_are_logged_even_if_the_run_is_stopped(
    run_here, tmp_path, monkeypatch
):
    forward, seed, steps_begun = GPT.forward, runtime.Runtime.seed, []

    def begin(self, number, step):
        steps_begun.append(step)
        seed(self, number, step)

    def spoil(self, *args, **options):
        logits, loss = forward(self, *args, **options)
        factor = {22: 10.0, 24: float('nan')}.get(steps_begun[-1] if steps_begun else -1, 1.0)
        return logits, loss * factor if self.training else loss

    monkeypatch.setattr(runtime.Runtime, 'seed', begin)
    monkeypatch.setattr(GPT, 'forward', spoil)
    args = ('--eval_interval=100', '--max_iters=28', '--log_interval=7', '--lr_decay_iters=1000')
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    assert run_here(f'--out_dir={whole}', *args) == 0
    assert metrics(whole, 'spikes') == {7: 0, 14: 0, 21: 0, 28: 1}
    assert metrics(whole, 'skipped') == {7: 0, 14: 0, 21: 0, 28: 1}
    run_here(f'--out_dir={halves}', *args, '--save_interval=26', '--max_iters=26')
    (halves / 'DONE').unlink()
    assert run_here(f'--out_dir={halves}', *args, '--init_from=resume') == 0
    for key in ('spikes', 'skipped'):
        assert metrics(halves, key)[28] == 1


def test_a_second_ctrl_c_exits_immediately(run_here, tmp_path, monkeypatch):
    log = metrics_module.Tracker.log

    def interrupt_twice(self, step, **values):
        log(self, step, **values)
        if step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(metrics_module.Tracker, 'log', interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        run_here(f'--out_dir={tmp_path}/run')
    assert steps(tmp_path / 'run') == []


@pytest.mark.skipif(os.name == 'nt', reason='Windows sends no SIGINT to one process')
def test_ctrl_c_in_a_real_process_loses_no_step(tiny, tmp_path, environment, run_here):
    args = ['--lr_decay_iters=1000', '--dropout=0.2', '--eval_interval=100000']
    command = [sys.executable, str(ROOT / 'train.py'), str(tiny), f'--out_dir={tmp_path}/a', *args]
    process = subprocess.Popen(
        [*command, '--max_iters=100000'],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('step 3/'):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate()
    assert process.returncode == 130, error
    assert error.strip() == 'stopping after this step ...'
    (step,) = steps(tmp_path / 'a')
    assert f'stopped at step {step};' in out
    more = f'--max_iters={step + 3}'
    assert run_here(f'--out_dir={tmp_path}/a', *args, '--init_from=resume', more) == 0
    run_here(f'--out_dir={tmp_path}/b', *args, more)
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )


def test_a_run_killed_after_its_last_step_is_finished_and_mirrored_at_the_next_start(
    run_here, source, tmp_path
):
    run, mirror = tmp_path / 'run', tmp_path / 'mirror'
    shutil.copytree(source, run)
    (run / 'DONE').unlink()
    again = (f'--out_dir={run}', '--auto_resume', '--max_iters=20', f'--checkpoint_mirror={mirror}')
    assert run_here(*again) == 0
    assert (run / 'DONE').exists()
    assert steps(mirror) == steps(run)[-1:]


def test_resuming_a_finished_run_reports_it_and_changes_nothing(run_here, source, capsys):
    before = contents(source)
    assert run_here(f'--out_dir={source}', '--init_from=resume', '--max_iters=20') == 0
    text = capsys.readouterr().out
    assert f'{source} is finished: 20 of 20 steps' in text
    assert '--max_iters' in text
    assert contents(source) == before


def test_a_finished_run_can_be_resumed_with_more_steps(run_here, copied):
    assert run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=22') == 0
    assert steps(copied)[-1] == 22
    assert list(metrics(copied)) == list(range(1, 23))
    assert (copied / 'DONE').exists()


def test_a_resumed_run_keeps_its_own_settings(run_here, copied, tiny, capsys):
    path = copied / 'config.py'
    path.write_text(path.read_text() + 'learning_rate = 3e-3\ndecay_lr = False\n')
    assert run_here('--init_from=resume', f'--out_dir={copied}', '--max_iters=21', config=path) == 0
    assert metrics(copied, 'lr')[21] == 3e-3


def test_resuming_does_not_change_init_from_in_the_config(run_here, copied):
    run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=21')
    assert "init_from = 'scratch'" in (copied / 'config.py').read_text()


@pytest.mark.parametrize('which', ['best', 'last', 'path'])
def test_the_checkpoint_to_resume_from_can_be_chosen(run_here, copied, which):
    ten, twenty = list_checkpoints(copied)
    state = json.loads((ten / 'state.json').read_text())
    (twenty / 'state.json').read_text()
    chosen = {'best': find_checkpoint(copied), 'last': twenty, 'path': ten}[which]
    where = str(ten) if which == 'path' else which
    args = ('--init_from=resume', f'--checkpoint={where}', '--max_iters=25', '--lr_decay_iters=20')
    assert run_here(f'--out_dir={copied}', *args) == 0
    assert chosen.exists()
    assert state['step'] == 10
    assert steps(copied)[-1] == 25
    aside = [path.name for path in (copied / 'checkpoints').glob('*.aside*')]
    assert bool(aside) == (chosen == ten)
    assert list(metrics(copied)) == list(range(1, 26))


def test_a_damaged_last_checkpoint_is_reported_and_the_previous_one_used(
    run_here, source, copied, capsys
):
    last = find_checkpoint(copied, 'last')
    (last / load.MODEL_FILE).write_bytes(b'damaged')
    assert run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=20') == 0
    assert f'{last} is damaged: {load.MODEL_FILE}' in capsys.readouterr().err
    load.verify_checkpoint(last)  # its steps were made again
    if (copied / 'config.py').exists():
        assert hashes(last) == hashes(find_checkpoint(source, 'last'))


def test_a_new_run_does_not_change_a_used_directory_without_overwrite(run_here, copied):
    before = contents(copied)
    text = refused(run_here, f'--out_dir={copied}')
    for fix in ('--init_from=resume', '--out_dir', '--overwrite'):
        assert fix in text
    (copied / '.lock').unlink(missing_ok=True)
    changed = {p for p, t in contents(copied).items() if before.get(p) != t}
    assert changed <= {str(copied), str(copied / '.lock')}


def test_overwrite_starts_a_new_run(run_here, copied):
    assert run_here(f'--out_dir={copied}', '--overwrite') == 0
    assert steps(copied) == [2, 4]
    assert list(metrics(copied)) == [1, 2, 3, 4]
    assert 'overwrite = False' in (copied / 'config.py').read_text()


def test_auto_resume_works_for_the_first_start_and_every_later_one(
    run_here, tmp_path, monkeypatch, capsys
):
    args = (f'--out_dir={tmp_path}/a', '--auto_resume', '--max_iters=6', *FIXED)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 3)
        assert run_here(*args) == 128 + signal.SIGTERM
    assert run_here(*args) == 0
    assert run_here(*args) == 0
    assert 'is finished' in capsys.readouterr().out
    run_here(f'--out_dir={tmp_path}/b', '--max_iters=6', *FIXED)
    assert hashes(find_checkpoint(tmp_path / 'a', 'last')) == hashes(
        find_checkpoint(tmp_path / 'b', 'last')
    )


def test_auto_resume_starts_a_new_run_if_no_checkpoint_can_be_loaded(run_here, copied, capsys):
    damaged = list_checkpoints(copied)
    for path in damaged:
        (path / load.MODEL_FILE).unlink()
    assert run_here(f'--out_dir={copied}', '--auto_resume', '--max_iters=4', *FIXED) == 0
    captured = capsys.readouterr()
    assert captured.err.count('is damaged') == len(damaged)
    assert steps(copied)[-1] == 4
    assert list(metrics(copied)) == [1, 2, 3, 4]
    assert len(list((copied / 'checkpoints').glob('*.aside1'))) == len(damaged)  # nothing deleted


def test_auto_resume_does_not_resume_the_checkpoint_that_fine_tuning_started_from(
    run_here, source, tmp_path
):
    first = list_checkpoints(source)[0]
    args = (f'--out_dir={tmp_path}', f'--init_from={source}', f'--checkpoint={first}')
    for updates in (4, 6):
        assert run_here(*args, '--auto_resume', f'--max_iters={updates}') == 0
        assert list(metrics(tmp_path))[-1] == updates
    assert steps(source) == [10, 20]


def test_auto_resume_needs_an_out_dir(run_here):
    assert '--out_dir' in refused(run_here, '--auto_resume')


# -----------------------------------------------------------------------------
# fine-tuning


def test_fine_tuning_starts_from_the_weights_of_the_other_run(run_here, source, tmp_path):
    args = (f'--init_from={source}', '--eval_iters=None', '--n_layer=2', '--n_embd=32')
    assert run_here(f'--out_dir={tmp_path}/tuned', *args) == 0
    run_here(f'--out_dir={tmp_path}/scratch', '--eval_iters=None')
    start = metrics(tmp_path / 'tuned', 'val_loss')[0]
    assert start < 0.9 * metrics(tmp_path / 'scratch', 'val_loss')[0]
    model, _, _ = load_model(source)
    tuned, _, state = load_model(tmp_path / 'tuned', 'last')
    assert state['step'] == 4
    assert (tuned.config.n_layer, tuned.config.n_embd) == (1, 16)  # the source's shape
    assert 'n_embd = 16' in (tmp_path / 'tuned' / 'config.py').read_text()
    assert not torch.equal(model.lm_head.weight, tuned.lm_head.weight)
    more = ('--init_from=resume', '--max_iters=5')
    assert run_here(*more, config=tmp_path / 'tuned' / 'config.py') == 0


def test_a_resumed_fine_tuning_run_reports_the_settings_it_keeps(
    run_here, source, tmp_path, capsys
):
    run_here(f'--out_dir={tmp_path}', f'--init_from={source}')
    capsys.readouterr()
    args = (f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=6')
    assert run_here(*args, '--n_layer=7', '--arch=modern') == 0
    assert 'using the arch, n_layer of ' in capsys.readouterr().out


def test_settings_that_conflict_are_reported(run_here, tmp_path, capsys):
    run_here(f'--out_dir={tmp_path}', '--learning_rate=1e-4', *SHORT)
    out = capsys.readouterr().out
    assert 'warning: min_lr=0.001 is above learning_rate=0.0001: the learning rate will rise' in out
    assert (
        'warning: short_iters=4 leaves no step for full-length sequences: the run has 4 steps'
        in out
    )


@pytest.mark.parametrize(
    ('flags', 'needed', 'unused'),
    [
        (['--muon_lr=0.05'], '--optimizer=muon', '--muon_lr'),
        (['--dpo_beta=1'], '--objective=dpo', '--dpo_beta'),
        (['--cooldown=0.1'], '--lr_schedule=linear', '--cooldown'),
        (['--short_block_size=8'], '--short_iters=400', '--short_block_size'),
        (['--ngram_decay=0'], '--ngram_order=5', '--ngram_decay'),
        (['--decay_lr=False', '--lr_schedule=constant'], '--decay_lr=True', '--lr_schedule'),
        (['--eval_interval=None', '--patience=3'], '--eval_interval=250', '--patience'),
        (
            ['--lora_alpha=3', '--lora_targets=c_attn'],
            '--lora_rank=8',
            '--lora_alpha, --lora_targets',
        ),
    ],
)
def test_a_setting_without_effect_is_reported_with_the_one_it_needs(
    run_here, tmp_path, capsys, flags, needed, unused
):
    assert run_here(f'--out_dir={tmp_path}/run', '--max_iters=0', *flags) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith('warning'))
    advice = f'{unused}; add that flag, or omit {unused}'
    assert line == f'warning: ignored without {needed}: {advice}'


@pytest.mark.parametrize(
    ('flags', 'text'),
    [
        (['--checkpoint=last'], "checkpoint='last': a new model has no checkpoint"),
        (['--init_from=resume', '--overwrite'], 'overwrite=True starts a new run'),
    ],
)
def test_mutually_exclusive_settings_are_refused(run_here, copied, flags, text):
    before = contents(copied)
    assert text in refused(run_here, f'--out_dir={copied}', *flags)
    assert contents(copied) == before


def test_fine_tuning_may_shorten_the_context(run_here, source, tmp_path):
    assert run_here(f'--out_dir={tmp_path}', f'--init_from={source}', '--block_size=8') == 0
    model, _, _ = load_model(tmp_path)
    assert model.config.block_size == 8
    assert model.transformer.wpe.weight.shape == (8, 16)


def test_fine_tuning_from_a_chosen_checkpoint_can_be_resumed(run_here, source, tmp_path):
    ten = list_checkpoints(source)[0]
    args = (f'--init_from={source}', f'--checkpoint={ten}', f'--out_dir={tmp_path}')
    assert run_here(*args) == 0
    assert run_here('--init_from=resume', '--max_iters=6', config=tmp_path / 'config.py') == 0
    assert steps(tmp_path)[-1] == 6
    assert list(metrics(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_fine_tuning_on_text_of_another_tokenizer_is_refused(
    run_here, source, byte_dataset, tmp_path
):
    text = refused(
        run_here, f'--init_from={source}', f'--dataset={byte_dataset}', f'--out_dir={tmp_path}/x'
    )
    assert 'byte' in text
    assert str(byte_dataset) in text
    assert not (tmp_path / 'x').exists()


# -----------------------------------------------------------------------------
# evaluation alone


def test_eval_only_evaluates_and_writes_nothing(run_here, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(source)
    loss = json.loads((find_checkpoint(source, 'last') / 'state.json').read_text())['val_loss']
    best = json.loads((find_checkpoint(source) / 'state.json').read_text())['val_loss']
    for args, expected in (
        (('--init_from=resume', f'--out_dir={source}'), loss),
        ((f'--init_from={source}',), best),
        ((), None),
    ):
        assert run_here('--eval_only', *args) == 0
        text = capsys.readouterr().out
        found = float(re.search(r'val_loss (\d+\.\d+)', text)[1])
        assert found > 2.7 if expected is None else found == pytest.approx(expected, abs=1e-4)
    assert list(tmp_path.iterdir()) == []
    assert contents(source) == before


# -----------------------------------------------------------------------------
# when something goes wrong


def broken_forward(monkeypatch, at_calls):
    """Make the training loss NaN in some calls, counted from 1."""
    forward, calls = GPT.forward, []

    def forward_or_nan(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            calls.append(1)
            if len(calls) in at_calls:
                loss = loss * math.nan
        return logits, loss

    monkeypatch.setattr(model_module.GPT, 'forward', forward_or_nan)


def test_an_overflowing_gradient_lowers_the_loss_scale_and_skips_the_update(
    run_here, tmp_path, monkeypatch
):
    """float16's loss scaling with two optimizers, which needs no GPU to be tried."""
    made, scaler_of = [], torch.amp.GradScaler

    def scaler(device, enabled):
        made.append(scaler_of(device, init_scale=2.0**8))
        return made[0]

    unscale = scaler_of.unscale_
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    seen = []

    def overflow(self, optimizer):
        seen.append(optimizer)
        if len(seen) == 3:  # of the second step's two optimizers, the first
            optimizer.param_groups[0]['params'][0].grad.fill_(math.inf)
        unscale(self, optimizer)

    monkeypatch.setattr(scaler_of, 'unscale_', overflow)
    assert run_here(f'--out_dir={tmp_path}', '--eval_interval=1', *MODERN) == 0
    one, two, three = (load_model(path)[0] for path in list_checkpoints(tmp_path)[:3])
    weights = [[p.detach() for p in model.parameters()] for model in (one, two, three)]
    assert all(map(torch.equal, weights[0], weights[1]))  # neither optimizer made its update
    assert not any(map(torch.equal, weights[1], weights[2]))
    assert made[0].get_scale() == 2.0**7


def test_a_nan_loss_skips_one_update(run_here, tmp_path, monkeypatch, capsys):
    broken_forward(monkeypatch, {3})  # the first micro-batch of the second step
    assert run_here(f'--out_dir={tmp_path}', '--eval_interval=1') == 0
    assert 'step 2: loss nan' in capsys.readouterr().out
    one, two = (load_model(list_checkpoints(tmp_path)[i])[0].lm_head.weight for i in (0, 1))
    assert torch.equal(one, two)  # nothing was learned in it, and nothing was spoilt
    assert math.isfinite(metrics(tmp_path)[4])
    assert steps(tmp_path)[-1] == 4


def test_three_nan_losses_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(
    run_here, tmp_path, monkeypatch
):
    broken_forward(monkeypatch, range(7, 100))  # from the fourth step on
    text = refused(run_here, f'--out_dir={tmp_path}', '--max_iters=50')
    assert 'three' in text
    assert '--learning_rate' in text
    assert str(tmp_path) in text
    model, _, _ = load_model(tmp_path, 'last')
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not (tmp_path / 'DONE').exists()


def test_a_run_that_diverges_keeps_a_checkpoint_to_resume_from(run_here, copied):
    args = (f'--out_dir={copied}', '--init_from=resume', '--max_iters=50')
    text = refused(run_here, *args, '--learning_rate=1e30', '--min_lr=1e30', '--eval_interval=1')
    assert '--learning_rate' in text
    run_here(*args, '--max_iters=24', '--learning_rate=1e-3', '--min_lr=1e-3')
    assert math.isfinite(metrics(copied, 'val_loss')[24])


@error_line('free disk space and {}')
def test_a_full_disk_does_not_stop_training_or_damage_the_previous_checkpoint(
    run_here, tmp_path, monkeypatch, capsys
):
    free = iter([2**40, 2**40, 0, 2**40, 0])  # the first is looked at before the run
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=next(free)))
        args = (f'--out_dir={tmp_path}', '--eval_interval=1', *FIXED)
        text = refused(run_here, *args)
    out = capsys.readouterr().out
    assert 'warning: checkpoint of step 2 not written' in out
    assert 'step 4 not written' in text  # a run whose end is not on disk has not ended well
    assert '--init_from=resume' in text
    assert steps(tmp_path) == [1, 3]
    assert list(metrics(tmp_path)) == [1, 2, 3, 4]
    assert not (tmp_path / 'DONE').exists()
    assert run_here(*args, '--init_from=resume') == 0
    assert steps(tmp_path)[-1] == 4


@pytest.mark.parametrize('settings', [(), (*MODERN, *SHORT)], ids=['gpt2', 'modern'])
def test_a_model_that_cannot_be_compiled_is_trained_uncompiled(
    run_here, tmp_path, monkeypatch, capsys, settings
):
    def compile(model, **options):
        def fail(*args, **options):
            raise RuntimeError('no C++ compiler\nfound here')

        return fail

    monkeypatch.setattr(torch, 'compile', compile)
    run_here(f'--out_dir={tmp_path}/a', '--compile=True', *FIXED, *settings)
    assert (
        'training without torch.compile, which failed: RuntimeError: no C++ compiler\n'
        in capsys.readouterr().out
    )
    run_here(f'--out_dir={tmp_path}/b', *FIXED, *settings)
    assert hashes(find_checkpoint(tmp_path / 'a')) == hashes(find_checkpoint(tmp_path / 'b'))


def test_a_compiled_model_is_saved_under_its_uncompiled_names(run_here, tmp_path, monkeypatch):
    class Wrapped(torch.nn.Module):
        def __init__(self, model, **options):
            super().__init__()
            self._orig_mod = model

        def forward(self, *args, **options):
            return self._orig_mod(*args, **options)

    monkeypatch.setattr(torch, 'compile', Wrapped)
    run_here(f'--out_dir={tmp_path}/a', '--compile', *FIXED)
    run_here(f'--out_dir={tmp_path}/b', *FIXED)
    assert hashes(find_checkpoint(tmp_path / 'a')) == hashes(find_checkpoint(tmp_path / 'b'))


CRASH = """
import runpy, sys, torch, model
def crash(*args, **options):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 3 GiB.\\nSee also')
model.GPT.forward = crash
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def one_line(done):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    return done.stderr


def test_an_out_of_memory_error_advises_what_to_lower_and_by_how_much(environment, tiny, tmp_path):
    command = [sys.executable, '-c', CRASH, str(ROOT / 'train.py'), str(tiny)]
    done = subprocess.run(
        [*command, f'--out_dir={tmp_path}/a'], env=environment, capture_output=True, text=True
    )
    text = one_line(done)
    assert 'out of memory on cpu' in text
    assert '--batch_size=2 --gradient_accumulation_steps=4' in text


def test_a_model_too_large_for_memory_is_one_line(script, tiny, tmp_path):
    text = one_line(script('train.py', tiny, '--n_embd=400000', f'--out_dir={tmp_path}/a'))
    assert 'memory' in text
    assert '--n_embd' in text


def test_two_runs_cannot_use_one_directory(run_here, copied):
    with FileLock(copied / '.lock'):
        for args in (('--init_from=resume', '--max_iters=30'), ('--overwrite',)):
            text = refused(run_here, f'--out_dir={copied}', *args)
            assert text.startswith(f'{copied}: another run is writing here')
    assert steps(copied) == [10, 20]


# -----------------------------------------------------------------------------
# mistakes in the settings: one line, and no files


@pytest.mark.parametrize(
    ('args', 'texts'),
    [
        (['--n_embd=30', '--n_head=4'], ['n_embd=30', 'n_head=4', 'n_embd=3']),
        (['--device=cuda:7'], ['cuda:7', '--device=auto']),
        (['--device=quantum'], ['quantum', 'cpu']),
        (['--dtype=float16'], ['float16', '--dtype=float32']),
        (['--dtype=int8'], ['int8', 'bfloat16']),
        (['--short_iters=5'], ['short_block_size=None', '--short_block_size=4']),
        (['--short_iters=5', '--short_block_size=5'], ['short_block_size=5', 'block_size=16']),
        (['--block_size=4096'], ['block_size 4096', '--block_size=599']),
        (['--dataset=./nowhere'], ['./nowhere', 'data/text/prepare.py']),
        (['--dataset=shakespere_char'], ['shakespere_char', 'did you mean shakespeare_char?']),
        (['--lr_schedule=step'], ['lr_schedule', 'cosine', 'linear', 'constant']),
        (['--optimizer=sgd'], ['optimizer', 'adamw', 'muon']),
        (['--optimizer=muon', '--learning_rate=0'], ['learning_rate=0', 'muon']),
        (['--muon_lr=-1'], ['muon_lr=-1']),
        (['--arch=modrn'], ['arch', 'gpt2', 'modern']),
        (['--arch=modern', '--bias'], ['bias=True', '--bias=False']),
        (['--arch=modern', '--n_embd=6'], ['n_embd=6', 'n_head=2', 'even']),
        (['--arch=modern', '--n_head=4', '--n_kv_head=3'], ['n_kv_head=3', '1, 2, 4']),
        (['--n_kv_head=1'], ['n_kv_head=1', 'arch=']),
        (['--compile=maybe'], ['compile', 'True']),
        (['--batch_size=0'], ['batch_size=0']),
        (['--eval_interval=0'], ['eval_interval=0']),
        (['--n_layer=0'], ['n_layer=0']),
        (['--out_dir=there/file/x'], ['there/file/x', 'is a file; choose another --out_dir']),
        (['--dropout=1.0'], ['dropout=1.0']),
        (['--max_iters=-1'], ['max_iters=-1']),
        (['--learning_rate=1e999'], ['learning_rate=inf']),
        (['--max_iters', '60'], ['--max_iters: needs a whole number', '--max_iters=60']),
        (['--init_from=scrach'], ['scrach', 'no such run directory']),
        (['--init_from=out/none'], ['out/none']),
        (['--init_from=resume'], ['no checkpoint', '--eval_interval']),
        (['--mask_documents'], ['mask_documents', 'no end-of-text token']),
        (['--learning_rat=1'], ['did you mean learning_rate?']),
        (['nosuch.py'], ['nosuch.py', 'quickstart']),
    ],
    ids=lambda value: ' '.join(value) if value[0][:2] == '--' else '',
)
def test_a_mistake_is_one_line_and_creates_no_directory(
    run_here, tmp_path, monkeypatch, args, texts
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'file').touch()
    out_dir = tmp_path / ('there' if args == ['--init_from=resume'] else 'new')
    text = refused(run_here, f'--out_dir={out_dir}', *args)
    for part in texts:
        assert part in text
    assert list(tmp_path.rglob('*')) == [tmp_path / 'there', tmp_path / 'there' / 'file']


def test_resuming_without_a_run_advises_how_to_start_one(run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'python train.py' in refused(run_here, '--init_from=resume')
    assert 'no such run directory' in refused(run_here, '--init_from=resume', '--out_dir=nowhere')


def test_resuming_only_damaged_checkpoints_is_refused(run_here, copied, capsys):
    for path in list_checkpoints(copied):
        (path / load.MANIFEST_FILE).unlink()
    text = refused(run_here, f'--out_dir={copied}', '--init_from=resume')
    assert 'every checkpoint is damaged' in text
    assert 'manifest.json' in capsys.readouterr().err
    assert steps(copied) == [10, 20]


@pytest.mark.parametrize('settings', [(), MODERN], ids=['to muon', 'to adamw'])
def test_a_resumed_run_keeps_its_optimizer(run_here, tmp_path, settings):
    run_here(f'--out_dir={tmp_path}', *settings)
    before = contents(tmp_path)
    other = '--optimizer=adamw' if settings else '--optimizer=muon'
    text = refused(run_here, f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=9', other)
    assert f'--init_from={tmp_path}' in text
    assert contents(tmp_path) == before


def test_a_run_older_than_the_second_architecture_can_be_resumed(run_here, copied):
    for path in list_checkpoints(copied):
        state = json.loads((path / 'state.json').read_text())
        for name in ('arch', 'n_kv_head'):
            del state['model'][name]
        for name in ('arch', 'n_kv_head', 'optimizer', 'muon_lr', 'short_iters', 'eval_train'):
            del state['config'][name]
        del state['seconds']
        (path / 'state.json').write_bytes(files.as_json(state))
        manifest = json.loads((path / 'manifest.json').read_text())
        manifest['state.json'] = files.sha256(path / 'state.json')
        (path / 'manifest.json').write_bytes(files.as_json(manifest))
    assert run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=22') == 0
    assert steps(copied)[-1] == 22


def test_the_seconds_of_a_resumed_run_continue(run_here, copied):
    before = metrics(copied, 'seconds')
    assert sorted(before.values()) == list(before.values())
    run_here(f'--out_dir={copied}', '--init_from=resume', '--max_iters=22')
    assert metrics(copied, 'seconds')[21] > before[20] > 0


def test_a_resumed_run_keeps_its_shape(run_here, copied):
    text = refused(run_here, f'--out_dir={copied}', '--init_from=resume', '--n_layer=2')
    assert 'n_layer=2' in text
    assert 'n_layer=1' in text


def test_a_checkpoint_of_another_architecture_is_refused(run_here, copied):
    path = find_checkpoint(copied, 'last')
    state = json.loads((path / 'state.json').read_text())
    state['model']['n_experts'] = 4
    (path / 'state.json').write_text(json.dumps(state))
    manifest = json.loads((path / 'manifest.json').read_text())
    manifest['state.json'] = files.sha256(path / 'state.json')
    (path / 'manifest.json').write_text(json.dumps(manifest))
    text = refused(run_here, f'--out_dir={copied}', '--init_from=resume', '--max_iters=21')
    assert 'n_experts' in text


def test_a_token_outside_the_vocabulary_is_reported_with_file_and_offset(
    run_here, dataset, tmp_path
):
    bad = shutil.copytree(dataset, tmp_path / 'bad')
    ids = np.fromfile(bad / 'train.bin', '<u2')
    ids[2000] = 60000
    ids.tofile(bad / 'train.bin')
    args = ('--epochs=2', '--eval_interval=1000', f'--out_dir={tmp_path}/out')
    text = refused(run_here, f'--dataset={bad}', *args)
    assert f'{bad}/train.bin: token id 60000 at byte 4000' in text


def test_a_global_batch_that_cannot_be_divided_among_the_processes_is_refused(
    run_here, tmp_path, monkeypatch
):
    class Three(runtime.Runtime):
        def broadcast_from_rank0(self, decide):
            return decide()

        def all_reduce(self, values, op='SUM'):
            return values

    three = Three('cpu', torch.float32, 0, 3)
    monkeypatch.setattr(runtime, 'init_runtime', lambda *args: three)
    text = refused(run_here, f'--out_dir={tmp_path}/new')
    assert 'is 8 sequences, which cannot be split equally over 3 processes' in text
    assert 'use --gradient_accumulation_steps=3' in text
    assert not (tmp_path / 'new').exists()


def test_the_generated_name_of_a_run_is_new_and_readable():
    assert re.fullmatch(r'out/[a-z]+_[a-z]+-\d{6}-\d{4}', run_directory.new_name())


@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux alone')
def test_a_directory_name_that_is_not_utf_8_is_refused_before_anything_is_written(
    run_here, source, tmp_path
):
    bad = os.fsdecode(bytes(tmp_path) + b'/run\xff')
    for flag in ('out_dir', 'checkpoint_mirror'):
        text = refused(run_here, f'--out_dir={tmp_path}/run', f'--{flag}={bad}')
        assert text.startswith(f'{flag}=')
        assert 'is not valid UTF-8; choose another name' in text
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(source, bad)
    text = refused(run_here, f'--out_dir={tmp_path}/run', f'--init_from={bad}')
    assert 'the path is not valid UTF-8; rename the folder' in text


def test_all_mistakes_are_reported_at_once(run_here, tmp_path):
    flags = ('--learning_rate=-1', '--n_layer=0', '--optimizer=adam', '--eval_interval=0')
    with pytest.raises(UserError) as caught:
        run_here(f'--out_dir={tmp_path / "run"}', *flags)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert [line.removeprefix('error: ').partition('=')[0] for line in lines] == [
        'eval_interval',
        'learning_rate',
        'optimizer',
        'n_layer',
    ]
    with pytest.raises(UserError) as caught:
        run_here('--n_leyer=1', '--max_iters=x', '--published=1')
    assert [line.partition(': ')[2][:5] for line in str(caught.value).splitlines()] == [
        'unkno',
        '--max',
        '--pub',
    ]
    assert not (tmp_path / 'run').exists()


# -----------------------------------------------------------------------------
# another checkout: datasets that the run prepares


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the scripts, for the datasets that they prepare."""
    root = tmp_path_factory.mktemp('checkout')
    wanted = ('*.py', 'config/*.py', 'data/*/prepare.py', 'flatgpt/**/*.py')
    for path in (path for pattern in wanted for path in ROOT.glob(pattern)):
        target = root / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


@pytest.fixture
def in_checkout(checkout, environment):
    def run(*args):
        dead = 'http://127.0.0.1:9'  # no network
        env = {'PYTHONPATH': str(checkout), 'HTTPS_PROXY': dead, 'HTTP_PROXY': dead}
        return subprocess.run(
            [sys.executable, 'train.py', *args],
            cwd=checkout,
            env={**environment, **env, 'https_proxy': dead, 'http_proxy': dead},
            capture_output=True,
            text=True,
        )

    return run


def test_train_without_arguments_reports_the_download_and_how_to_start(in_checkout, checkout):
    text = one_line(in_checkout())
    for part in ('openwebtext', 'GB', 'data/openwebtext/prepare.py', 'config/quickstart.py'):
        assert part in text
    assert not (checkout / 'out').exists()


def test_a_missing_dataset_without_a_network_reports_where_to_put_the_file(in_checkout, checkout):
    text = one_line(in_checkout('train_shakespeare_char_cpu'))
    assert 'http' in text
    assert 'input.txt' in text
    assert not list((checkout / 'data' / 'shakespeare_char').glob('*.bin*'))


def test_the_quickstart_prepares_text_and_trains(in_checkout, checkout):
    small = ('--max_iters=2', '--eval_iters=1', '--n_layer=1', '--n_head=2', '--n_embd=16')
    more = ('--batch_size=2', '--gradient_accumulation_steps=1', '--block_size=32')
    done = in_checkout('config/quickstart.py', *small, *more, '--sample_tokens=5')
    assert done.returncode == 0, done.stderr
    assert (checkout / 'data' / 'pydocs' / 'meta.json').exists()
    assert 'validation loss' in done.stdout


# -----------------------------------------------------------------------------
# two processes


@pytest.fixture
def by_torchrun(script, tiny):
    """Run train.py as two processes of torchrun -> what they print."""
    pytest.importorskip('torch.distributed', reason='torch was built without it')

    def run(*args):
        torchrun = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
        done = script('train.py', tiny, *args, python=torchrun)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    ('start', 'settings'),
    [('by_torchrun', ()), ('two_ranks', MODERN)],
    ids=['gpt2-torchrun', 'modern'],
)
def test_two_processes_train_like_one(run_here, tmp_path, request, start, settings):
    args = (*settings, '--max_iters=6', '--eval_iters=None', '--eval_interval=3')
    run_here(f'--out_dir={tmp_path}/one', *args)
    printed = request.getfixturevalue(start)(f'--out_dir={tmp_path}/two', *args)
    assert printed.count('validation loss') == 1  # one of them prints
    for key in ('loss', 'train_loss', 'val_loss', 'val_bpb', 'grad_norm'):
        one, two = metrics(tmp_path / 'one', key), metrics(tmp_path / 'two', key)
        assert list(one) == list(two)
        # Muon iterates in bfloat16, where a last digit of the gradient can turn a rounding
        tolerance = 1e-3 if settings else 1e-5
        assert list(two.values()) == pytest.approx(list(one.values()), rel=tolerance), key
    assert steps(tmp_path / 'two') == [3, 6]
    assert (tmp_path / 'two' / 'DONE').exists()


def test_two_processes_with_a_sharded_model_mask_documents_like_one(
    two_ranks, run_here, tmp_path, stories
):
    args = (f'--dataset={stories}', '--mask_documents', '--arch=modern')
    run_here(f'--out_dir={tmp_path}/one', *args)
    two_ranks(f'--out_dir={tmp_path}/two', *args, '--shard')
    for key in ('loss', 'val_loss', 'grad_norm'):
        one, two = (list(metrics(tmp_path / run, key).values()) for run in ('one', 'two'))
        assert two == pytest.approx(one, rel=1e-5), key


def test_the_dataset_fixture_has_one_byte_per_character(tmp_path):
    data = Dataset(make_dataset(tmp_path / 'd', byte_tokenizer(), train=50, val=40), 8)
    assert data.bytes == data.tokens == {'train': 50, 'val': 40}
