"""Saver and mirror: checkpoints in the background, in parts by several ranks, and copied."""

import errno
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import hashes, metrics, random_model, refused, steps

import sample
from flatgpt import files
from flatgpt.checkpoint import __main__
from flatgpt.checkpoint import load as load_module
from flatgpt.checkpoint import mirror as mirror_module
from flatgpt.checkpoint import save as save_module
from flatgpt.checkpoint.load import (
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_tensors,
    verify_checkpoint,
)
from flatgpt.checkpoint.mirror import Mirror, fetch_checkpoint, restore_newest, send_checkpoint
from flatgpt.checkpoint.save import Saver
from flatgpt.errors import UserError
from flatgpt.runtime import Runtime

CPU = Runtime('cpu', torch.float32)
OFTEN = ('--max_iters=12', '--eval_interval=3', '--dropout=0.2')
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
root = pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='mounting needs root'
)


def state_of(step, **changes):
    return {'step': step, 'val_loss': None, 'evaluated': False, 'config': {}, **changes}


class Run:
    """A model that changes at each step, and its Saver."""

    def __init__(self, out_dir, mirror=None, run=None, **options):
        self.model = random_model(11, n_layer=1, n_embd=16)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.1)]
        options['mirror'] = Mirror(Path(mirror), run=run) if mirror else None
        self.run, self.saver = run, Saver(out_dir, CPU, **options)
        self.step = 0
        self.train()

    def train(self):
        """One update, of every tensor that a checkpoint holds."""
        self.step += 1
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * self.step)
        self.optimizers[0].step()

    def now(self):
        named = save_module.tensors_of(self.model, self.optimizers)
        return {f: {name: t.clone() for name, t in tensors.items()} for f, tensors in named.items()}

    def save(self, **changes):
        self.saver.save(self.model, self.optimizers, None, state_of(self.step, **changes))


def holds(path, expected):
    verify_checkpoint(path)
    for file, tensors in expected.items():
        found = dict(read_tensors(path, file))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), name


@pytest.fixture
def large(monkeypatch):
    """Every checkpoint is large enough to be written in the background."""
    monkeypatch.setattr(save_module, 'SYNC_SAVE_BYTES', 0)


@pytest.fixture
def slow(monkeypatch, large):
    """Writing waits until the test sets the event."""
    go, write = threading.Event(), save_module.write_checkpoint

    def wait_and_write(*args):
        assert go.wait(30)
        write(*args)

    monkeypatch.setattr(save_module, 'write_checkpoint', wait_and_write)
    yield go
    go.set()


# -----------------------------------------------------------------------------
# in the background


def test_a_checkpoint_has_the_weights_of_its_step_while_training_continues(slow, tmp_path):
    run = Run(tmp_path)
    expected = run.now()
    run.save()
    for _ in range(3):
        run.train()
    assert steps(tmp_path) == []  # it has not been written yet
    slow.set()
    run.saver.finish()
    holds(find_checkpoint(tmp_path, 'last'), expected)
    for file, tensors in run.now().items():
        for name, tensor in tensors.items():
            assert not torch.equal(tensor, expected[file][name]), name


def test_the_next_save_waits_for_the_one_before(slow, tmp_path):
    run, expected = Run(tmp_path), []
    for _ in range(2):
        expected.append(run.now())
        if run.step == 2:
            threading.Timer(0.2, slow.set).start()
        started = time.perf_counter()
        run.save()
        run.train()
    assert time.perf_counter() - started >= 0.15
    run.saver.finish()
    for path, tensors in zip(list_checkpoints(tmp_path), expected, strict=True):
        holds(path, tensors)


def test_a_small_checkpoint_is_written_at_once(tmp_path):
    run = Run(tmp_path)
    run.save()
    assert steps(tmp_path) == [1]
    run.saver.finish()


def test_the_pause_and_the_total_time_are_reported_once_each(slow, tmp_path):
    run = Run(tmp_path)
    run.save()
    assert 0 < run.saver.times()['save_pause'] < 1
    time.sleep(0.1)
    slow.set()
    run.saver.wait()
    times = run.saver.times()
    assert list(times) == ['save_seconds']
    assert times['save_seconds'] >= 0.1
    assert run.saver.times() == {}
    run.saver.finish()


def test_an_error_in_the_background_is_a_warning_and_the_checkpoint_before_stays(
    large, tmp_path, monkeypatch
):
    run = Run(tmp_path)
    run.save()
    run.saver.wait()
    before = hashes(find_checkpoint(tmp_path, 'last'))

    def full(*args, **options):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(save_module, 'save_file', full)
        run.train()
        run.save()
        run.saver.wait()
    (news,) = run.saver.pop_warnings()
    assert news.startswith('checkpoint of step 2 not written: ')
    assert 'No space left' in news
    assert news == run.saver.failure
    assert run.saver.pop_warnings() == []
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['step-00000001']
    assert hashes(find_checkpoint(tmp_path, 'last')) == before
    run.train()
    run.save()
    run.saver.finish()
    assert run.saver.failure is None
    assert steps(tmp_path) == [1, 3]


def test_an_error_that_is_not_an_oserror_is_raised(large, tmp_path, monkeypatch):
    run = Run(tmp_path)
    monkeypatch.setattr(save_module, 'write_checkpoint', lambda *args: 1 / 0)
    run.save()
    with pytest.raises(ZeroDivisionError):
        run.saver.wait()


def test_the_same_step_is_written_once_unless_it_has_been_evaluated_since(tmp_path):
    run = Run(tmp_path)
    run.save()
    there = find_checkpoint(tmp_path, 'last').stat().st_ino
    run.save()
    assert find_checkpoint(tmp_path, 'last').stat().st_ino == there
    run.save(evaluated=True, val_loss=1.0)
    assert find_checkpoint(tmp_path, 'last').stat().st_ino != there
    assert steps(tmp_path) == [1]
    run.saver.finish()


@pytest.fixture(scope='module')
def at_once(run_here, tmp_path_factory):
    """A run with small checkpoints, which are written at once."""
    out_dir = tmp_path_factory.mktemp('at_once') / 'run'
    assert run_here(f'--out_dir={out_dir}', *OFTEN) == 0
    return out_dir


def test_a_run_that_saves_in_the_background_writes_equal_checkpoints(
    run_here, large, at_once, tmp_path, monkeypatch
):
    write, meanwhile = save_module.write_checkpoint, []

    def write_late(final, *args):
        step, deadline = load_module.step_of(final), time.monotonic() + 20
        while (reached := max(metrics(tmp_path), default=0)) < min(step + 2, 12):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        meanwhile.append(reached - step)
        write(final, *args)

    monkeypatch.setattr(save_module, 'write_checkpoint', write_late)
    assert run_here(f'--out_dir={tmp_path}', *OFTEN) == 0
    assert min(meanwhile[:3]) >= 2  # steps that were made while it had not been written
    assert steps(tmp_path) == steps(at_once) == [3, 6, 9, 12]
    for here, there in zip(list_checkpoints(tmp_path), list_checkpoints(at_once), strict=True):
        assert hashes(here) == hashes(there)
    assert len(metrics(tmp_path, 'save_pause')) == 3  # of the last, no step follows
    seconds, pauses = (metrics(tmp_path, f'save_{key}') for key in ('seconds', 'pause'))
    assert max(pauses.values()) < 5
    assert all(seconds.values())


def test_after_a_background_error_only_that_checkpoint_is_missing(
    run_here, large, at_once, tmp_path, monkeypatch, capsys
):
    save_file = save_module.save_file

    def full(tensors, path, **options):
        if '00000006' in str(path):
            raise FULL
        save_file(tensors, path, **options)

    monkeypatch.setattr(save_module, 'save_file', full)
    assert run_here(f'--out_dir={tmp_path}', *OFTEN) == 0
    printed = capsys.readouterr().out
    assert printed.count('warning: checkpoint of step 6 not written: ') == 1
    assert 'No space left on device; the earlier ones are intact; training continues' in printed
    assert steps(tmp_path) == [3, 9, 12]
    assert hashes(find_checkpoint(tmp_path, 'last')) == hashes(find_checkpoint(at_once, 'last'))


# -----------------------------------------------------------------------------
# in parts


PARTS = ('--max_iters=4', '--eval_interval=2', '--n_layer=2')


@pytest.fixture(scope='module')
def sharded(forks, tiny, tmp_path_factory):
    """A sharded run of two ranks, and the same run unsharded."""
    folder = tmp_path_factory.mktemp('sharded')
    for name, flag in (('parts', '--shard'), ('whole', '--shard=False')):
        crew = forks.start(2, f'--out_dir={folder / name}', *PARTS, flag, config=tiny)
        assert crew.end() == [0, 0], crew.err
    return folder


@pytest.fixture
def parts(sharded, tmp_path):
    return shutil.copytree(sharded / 'parts', tmp_path / 'parts')


def test_the_parts_together_equal_an_unsharded_checkpoint(sharded):
    paths = [list_checkpoints(sharded / name) for name in ('parts', 'whole')]
    for cut, whole in zip(*paths, strict=True):
        for file in (MODEL_FILE, OPTIMIZER_FILE):
            named, expected = (dict(read_tensors(path, file)) for path in (cut, whole))
            assert named.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(named[name], tensor), name
        states = [load_module.read_state(path) for path in (cut, whole)]
        for key in ('step', 'samples', 'model', 'val_loss', 'best_val_loss'):
            assert states[0][key] == states[1][key], key


def test_a_checkpoint_in_parts_is_inspected_verified_sampled_and_exported(
    parts, sharded, run_here, tmp_path, capsys
):
    for command in ('inspect', 'verify'):
        __main__.main([command, str(parts)])
        assert capsys.readouterr().out.count(' ok\n') == 2
    model, tokenizer = sample.load(
        {'out_dir': str(parts), 'checkpoint': 'last', 'device': 'cpu', 'dtype': 'float32'}
        | {'tokenizer': None, 'quantize': None}
    )
    expected = load_checkpoint(find_checkpoint(sharded / 'whole', 'last'))[0].eval()
    prompt = torch.from_numpy(tokenizer.encode('the cat'))[None].long()
    assert torch.equal(model(prompt)[0], expected(prompt)[0])
    for name in ('parts', 'whole'):
        __main__.main(['export', str(sharded / name), str(tmp_path / f'{name}.hf')])
    weights = [tmp_path / f'{name}.hf' / MODEL_FILE for name in ('parts', 'whole')]
    assert files.sha256(weights[0]) == files.sha256(weights[1])


PART = [f'{stem}-0000{n}-of-00002.safetensors' for stem in ('model', 'optimizer') for n in (1, 2)]


@pytest.mark.parametrize('name', PART)
@pytest.mark.parametrize('how', ['missing', 'flipped'])
def test_a_damaged_part_is_reported_and_the_checkpoint_before_is_used(parts, capsys, name, how):
    path = list_checkpoints(parts)[-1] / name
    if how == 'missing':
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-5] ^= 16
        path.write_bytes(content)
    assert find_checkpoint(parts, 'last') == list_checkpoints(parts)[0]
    error = capsys.readouterr().err
    assert f'{path.parent} is damaged: {name} ' in error
    assert error.count('\n') == 1


def test_one_process_resumes_equally_from_a_sharded_checkpoint(sharded, run_here, tmp_path):
    for name in ('parts', 'whole'):
        shutil.copytree(sharded / name, tmp_path / name)
        args = (*PARTS, '--init_from=resume', '--max_iters=6', '--shard=False')
        assert run_here(f'--out_dir={tmp_path / name}', *args) == 0
    last = [find_checkpoint(tmp_path / name, 'last') for name in ('parts', 'whole')]
    assert hashes(last[0]) == hashes(last[1])


LATE = """
import time
from flatgpt.checkpoint import save
save.SYNC_SAVE_BYTES, write = 0, save.write_checkpoint
def late(*args):
    time.sleep(0.3)
    write(*args)
save.write_checkpoint = late
"""


def test_parts_are_written_in_the_background_too(ranks, sharded, tmp_path):
    crew = ranks(2, f'--out_dir={tmp_path}', *PARTS, '--shard', before=LATE)
    assert crew.end() == [0, 0], crew.err
    paths = [list_checkpoints(path) for path in (tmp_path, sharded / 'parts')]
    for here, there in zip(*paths, strict=True):
        assert [files.sha256(here / name) for name in PART] == [
            files.sha256(there / name) for name in PART
        ]


CANNOT = """
from flatgpt.checkpoint import save
save_file = save.save_file
def full(tensors, path, **options):
    if '00000002' in str(path):
        raise OSError(28, 'No space left on device')
    save_file(tensors, path, **options)
save.save_file = full
"""


@pytest.mark.parametrize('which', [0, 1])
def test_if_a_rank_cannot_write_its_part_only_that_checkpoint_is_missing(
    ranks, sharded, tmp_path, which
):
    before = lambda rank: CANNOT if rank == which else ''  # noqa: E731
    crew = ranks(2, f'--out_dir={tmp_path}', *PARTS, '--shard', before=before)
    assert crew.end() == [0, 0], crew.err
    why = f'{"rank 1: " if which else ""}[Errno 28] No space left on device'
    line = f'warning: checkpoint of step 2 not written: {why}; the earlier ones are intact'
    assert crew.out.count(line) == 1
    assert steps(tmp_path) == [4]
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000004']
    expected = find_checkpoint(sharded / 'parts', 'last')
    for name in PART:
        assert files.sha256(find_checkpoint(tmp_path, 'last') / name) == files.sha256(
            expected / name
        )


def test_waiting_for_a_rank_s_part_has_a_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, 'PART_TIMEOUT', 0.1)
    final = tmp_path / 'checkpoints' / 'step-00000001'
    save_module.make_temp_folder(final, 0)
    with pytest.raises(OSError, match=r'rank 1 did not write its part within 0\.1 s'):
        save_module.write_checkpoint(final, {}, {}, False, 0, 2)
    assert list(final.parent.iterdir()) == []


def test_a_rank_on_a_full_disk_makes_room_to_report_it(tmp_path, monkeypatch):
    parts = tmp_path / 'parts'
    parts.mkdir()
    as_json, left = files.as_json, []

    def full_after_a_few_bytes(tensors, path, **options):
        path.write_bytes(b'x')
        raise FULL

    def look_then_write(value):
        left.extend(parts.iterdir())
        return as_json(value)

    monkeypatch.setattr(save_module, 'save_file', full_after_a_few_bytes)
    monkeypatch.setattr(save_module, 'as_json', look_then_write)
    with pytest.raises(OSError, match=r'rank 1: .*No space left'):
        save_module.write_rank_files(parts, {MODEL_FILE: {}, OPTIMIZER_FILE: {}}, 1, 2)
    assert left == []
    with pytest.raises(OSError, match=r'rank 1: .*No space left'):
        save_module.wait_for_rank_files(parts, 1)


# -----------------------------------------------------------------------------
# the mirror


def mirrored(folder):
    """The steps of a mirror's complete checkpoints, which are verified."""
    paths = [path for path in list_checkpoints(folder) if (path / MANIFEST_FILE).exists()]
    for path in paths:
        verify_checkpoint(path)
    return [load_module.step_of(path) for path in paths]


@pytest.fixture(scope='module')
def pair(run_here, tmp_path_factory):
    """A finished run and its mirror."""
    folder = tmp_path_factory.mktemp('pair')
    args = (f'--out_dir={folder}/run', f'--checkpoint_mirror={folder}/mirror')
    assert run_here(*args, *OFTEN, '--always_save_checkpoint=False') == 0
    return folder


@pytest.fixture
def both(pair, tmp_path):
    """A copy of them -> the arguments for both, the run, its mirror."""
    shutil.copytree(pair, tmp_path / 'both')
    run, mirror = tmp_path / 'both' / 'run', tmp_path / 'both' / 'mirror'
    return (f'--out_dir={run}', f'--checkpoint_mirror={mirror}'), run, mirror


def test_a_mirror_has_the_same_checkpoints_and_what_a_resumed_run_needs(pair):
    run, mirror = pair / 'run', pair / 'mirror'
    assert mirrored(mirror) == steps(run)
    assert len(steps(run)) < 4  # by the same rules: the last two and the best
    for here, there in zip(list_checkpoints(run), list_checkpoints(mirror), strict=True):
        copies = {f.name: f.read_bytes() for f in there.iterdir()}
        beside = {name: copies.pop(name) for name in ('config.py', 'metrics.jsonl')}
        assert copies == {f.name: f.read_bytes() for f in here.iterdir()}
        assert beside['config.py'] == (run / 'config.py').read_bytes()
        assert list(metrics(there))[: load_module.step_of(there)] == list(
            range(1, 1 + load_module.step_of(there))
        )
    assert b'max_iters = 12' in beside['config.py']


def test_the_manifest_is_copied_last_and_removed_first(tmp_path, monkeypatch):
    run = Run(tmp_path / 'run')
    run.save()
    path, mirror = find_checkpoint(tmp_path / 'run', 'last'), tmp_path / 'mirror'
    copied, copyfile, rmtree = [], shutil.copyfile, shutil.rmtree

    def copy(source, target):
        copied.append(Path(source).name)
        copyfile(source, target)

    monkeypatch.setattr(shutil, 'copyfile', copy)
    send_checkpoint(path, mirror, False)
    assert copied[-1] == MANIFEST_FILE
    assert mirrored(mirror) == [1]
    left = []

    def look(folder, **options):
        left.append((Path(folder) / MANIFEST_FILE).exists())
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, 'rmtree', look)
    send_checkpoint(path, mirror, False)  # once more, as after an evaluation
    assert left == [False]
    assert mirrored(mirror) == [1]
    run.saver.finish()


def test_an_incomplete_copy_in_the_mirror_is_not_a_checkpoint(tmp_path):
    run, mirror = Run(tmp_path / 'run'), tmp_path / 'mirror'
    for _ in range(4):
        run.save()
        send_checkpoint(find_checkpoint(tmp_path / 'run', 'last'), mirror, False)
        run.train()
        half = mirror / 'checkpoints' / f'step-{run.step:08d}'  # and then it was killed
        half.mkdir()
        (half / MODEL_FILE).write_bytes(b'half')
        run.train()
    assert mirrored(mirror) == [5, 7]
    assert [load_module.step_of(path) for path in list_checkpoints(mirror)] == [5, 7, 8]
    restore_newest(mirror, tmp_path / 'new')
    assert steps(tmp_path / 'new') == [7]
    run.saver.finish()


@pytest.mark.parametrize('flag', ['--auto_resume', '--init_from=resume'])
def test_a_run_resumes_from_its_mirror_on_an_empty_disk(run_here, both, tmp_path, flag):
    args, run, mirror = both
    shutil.copytree(run, tmp_path / 'kept')
    shutil.rmtree(run)
    longer = (flag, '--max_iters=15', '--lr_decay_iters=15')
    assert run_here(*args, *longer) == 0
    assert run_here(f'--out_dir={tmp_path}/kept', '--checkpoint_mirror=None', *longer) == 0
    assert hashes(find_checkpoint(run, 'last')) == hashes(
        find_checkpoint(tmp_path / 'kept', 'last')
    )
    assert metrics(run) == metrics(tmp_path / 'kept')
    assert list(metrics(run)) == list(range(1, 16))
    assert mirrored(mirror) == steps(run)


def test_the_settings_come_from_the_mirror_too(run_here, both, capsys):
    args, run, _ = both
    shutil.rmtree(run)
    (run.parent / 'none.py').write_text('', encoding='utf-8')
    assert run_here(*args, '--init_from=resume', config=run.parent / 'none.py') == 0
    assert f'{run} is finished: 12 of 12 steps' in capsys.readouterr().out


def test_a_checkpoint_with_a_subfolder_is_restored_too(run_here, pair, tmp_path):
    """LoRA adapters have a folder of their own."""
    args = (f'--out_dir={tmp_path}/run', f'--checkpoint_mirror={tmp_path}/mirror')
    start = (f'--init_from={pair}/run', '--lora_rank=2', '--max_iters=2')
    assert run_here(*args, *start) == 0
    before = hashes(find_checkpoint(tmp_path / 'run', 'last'))
    assert any(path.is_dir() for path in find_checkpoint(tmp_path / 'run', 'last').iterdir())
    shutil.rmtree(tmp_path / 'run')
    restore_newest(tmp_path / 'mirror', tmp_path / 'run')
    assert hashes(find_checkpoint(tmp_path / 'run', 'last')) == before
    assert mirrored(tmp_path / 'mirror') == steps(tmp_path / 'run')[-1:]


def damage(path):
    (path / MODEL_FILE).write_bytes(b'damaged')


def test_if_the_mirror_s_newest_is_damaged_the_one_before_is_used(run_here, both, capsys):
    args, run, mirror = both
    shutil.rmtree(run)
    damage(list_checkpoints(mirror)[-1])
    assert run_here(*args, *OFTEN, '--init_from=resume') == 0
    streams = capsys.readouterr()
    assert f'is damaged: {MODEL_FILE} does not match its hash; trying another one' in streams.err
    assert list(metrics(run))[-1] == 12
    assert mirrored(mirror)[-1] == steps(run)[-1] == 12


def test_a_mirror_replaces_damaged_local_checkpoints(run_here, both, tmp_path, capsys):
    args, run, _ = both
    expected = hashes(list_checkpoints(run)[-1])
    for path in list_checkpoints(run):
        damage(path)
    assert run_here(*args, *OFTEN, '--auto_resume') == 0
    assert 'is finished: 12 of 12 steps' in capsys.readouterr().out
    assert hashes(find_checkpoint(run, 'last')) == expected


def test_a_checkpoint_that_exists_locally_is_not_copied(both, monkeypatch):
    _, run, mirror = both
    monkeypatch.setattr(mirror_module, 'fetch_checkpoint', lambda *args: pytest.fail('fetched'))
    restore_newest(mirror, run)


def test_a_run_that_resumes_an_earlier_checkpoint_removes_later_ones_from_its_mirror(
    run_here, both
):
    args, run, mirror = both
    first = list_checkpoints(run)[0]
    step = load_module.step_of(first)
    again = ('--init_from=resume', f'--checkpoint={first}', f'--max_iters={step + 1}')
    assert run_here(*args, *again) == 0
    assert mirrored(mirror) == steps(run) == [step, step + 1]
    shutil.rmtree(run)
    restore_newest(mirror, run)
    assert steps(run) == [step + 1]  # and not what has been left behind


def test_the_mirror_of_another_run_is_not_used(run_here, both, tmp_path):
    _, _, mirror = both
    before = mirrored(mirror)
    message = refused(run_here, f'--out_dir={tmp_path}/new', f'--checkpoint_mirror={mirror}')
    assert message.startswith(f'{mirror} has checkpoints already')
    assert not (tmp_path / 'new').exists()
    assert mirrored(mirror) == before


def test_a_mirror_that_fails_is_a_warning_and_the_next_copy_is_tried(
    run_here, tmp_path, monkeypatch, capsys
):
    copyfile = shutil.copyfile

    def fail(source, target):
        if '00000006' in str(target):
            raise FULL
        return copyfile(source, target)

    monkeypatch.setattr(shutil, 'copyfile', fail)
    args = (f'--out_dir={tmp_path}/run', f'--checkpoint_mirror={tmp_path}/mirror')
    assert run_here(*args, *OFTEN) == 0
    printed = capsys.readouterr().out
    line = f'warning: step-00000006 not copied to {tmp_path}/mirror: '
    assert re.search(f'{re.escape(line)}.*No space left', printed)
    assert steps(tmp_path / 'run') == [3, 6, 9, 12]
    assert mirrored(tmp_path / 'mirror') == [3, 9, 12]


def test_a_checkpoint_that_is_pruned_while_it_is_sent_leaves_nothing_behind(tmp_path, monkeypatch):
    run, copyfile = Run(tmp_path / 'run', mirror=tmp_path / 'mirror'), shutil.copyfile

    def prune_meanwhile(source, target):
        copyfile(source, target)
        if '00000001' in str(source) and Path(source).parent.exists():
            shutil.rmtree(Path(source).parent)

    monkeypatch.setattr(shutil, 'copyfile', prune_meanwhile)
    run.save()
    run.train()
    run.save()
    run.saver.finish()
    assert run.saver.pop_warnings() == []
    assert [path.name for path in (tmp_path / 'mirror' / 'checkpoints').iterdir()] == [
        'step-00000002'
    ]


def test_two_runs_at_once_do_not_share_a_mirror(tmp_path):
    one, other = (Run(tmp_path / name, mirror=tmp_path / 'm', run=name) for name in 'ab')
    for each in (one, other):
        each.save(run=each.run)
        each.saver.finish()
    assert one.saver.pop_warnings() == []
    (problem,) = other.saver.pop_warnings()
    assert 'has checkpoints of another run; give each run its own' in problem
    assert hashes(find_checkpoint(tmp_path / 'm', 'last')) == hashes(
        find_checkpoint(tmp_path / 'a', 'last')
    )
    # nor does the other go on from what is there
    assert 'has checkpoints of another run' in refused(
        restore_newest, tmp_path / 'm', tmp_path / 'b'
    )
    own = find_checkpoint(tmp_path / 'b', 'last')
    shutil.copytree(own, own.with_name('step-00000002'))
    later = own.with_name('step-00000002')
    assert 'has checkpoints of another run' in refused(
        mirror_module.copy_if_missing, later, tmp_path / 'm'
    )


def test_of_two_checkpoints_of_a_step_the_evaluated_one_is_restored(tmp_path):
    run = Run(tmp_path / 'run', mirror=tmp_path / 'm')
    run.save()
    shutil.copytree(tmp_path / 'run', tmp_path / 'elsewhere')
    run.save(evaluated=True, val_loss=1.0)
    run.saver.finish()
    restore_newest(tmp_path / 'm', tmp_path / 'elsewhere')
    assert find_checkpoint(tmp_path / 'elsewhere', 'last').name == 'step-00000001.again'


@pytest.mark.parametrize('mirror', ['s3://bucket/mine', 'run', './run/'])
def test_a_mirror_that_is_a_url_or_the_out_dir_is_an_error_also_in_the_check(
    run_here, tmp_path, monkeypatch, mirror
):
    monkeypatch.chdir(tmp_path)
    for more in ([], ['--check']):
        with pytest.raises(UserError, match=r'checkpoint_mirror=.*give (another|its) folder'):
            run_here('--out_dir=run', f'--checkpoint_mirror={mirror}', *more)
    assert os.listdir(tmp_path) == []


def test_a_mirror_that_cannot_be_written_is_an_error_at_the_start(run_here, tmp_path):
    mirror = '/dev/null/mirror'
    message = refused(run_here, f'--out_dir={tmp_path}/run', f'--checkpoint_mirror={mirror}')
    assert message.startswith(f'checkpoint_mirror={mirror!r} cannot be written')
    assert not (tmp_path / 'run').exists()


def test_a_failed_copy_from_the_mirror_is_one_line(both, tmp_path, monkeypatch):
    _, _, mirror = both

    def no_room(folder, need):
        raise OSError('needs 5 MB, and 1 MB are free')

    monkeypatch.setattr(save_module, 'check_free_space', no_room)
    message = refused(fetch_checkpoint, list_checkpoints(mirror)[0], tmp_path / 'new')
    assert 'cannot be copied to' in message
    assert 'needs 5 MB' in message
