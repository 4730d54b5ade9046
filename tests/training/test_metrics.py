"""metrics.jsonl, plots and trackers."""

import json
import sys

import matplotlib
import pytest

from flatgpt.errors import UserError
from flatgpt.training import metrics
from flatgpt.training.metrics import (
    Tracker,
    draw_loss,
    draw_runs,
    format_losses,
    read_metrics,
)

PLAIN = {'tensorboard_log': False, 'wandb_log': False, 'wandb_project': 'p', 'wandb_run_name': 'n'}


@pytest.fixture(autouse=True)
def pictures_as_users_get_them():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def write(folder, steps, start=-1):
    tracker = Tracker(folder, PLAIN, start)
    for step in steps:
        tracker.log(step, loss=float(step), mfu=None)
    tracker.close()


def test_every_line_has_its_step_and_no_value_that_is_unknown(tmp_path):
    write(tmp_path, [1, 2])
    assert read_metrics(tmp_path) == [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 2.0}]


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path):
    tracker = Tracker(tmp_path, PLAIN, -1)
    tracker.log(1, loss=2.0)
    assert read_metrics(tmp_path) == [{'step': 1, 'loss': 2.0}]
    tracker.close()


def test_a_resumed_run_drops_the_lines_of_steps_that_are_made_again(tmp_path):
    write(tmp_path, range(6))
    write(tmp_path, [4, 5], start=3)
    assert [line['step'] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_new_run_begins_with_no_lines(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, [0])
    assert [line['step'] for line in read_metrics(tmp_path)] == [0]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    write(tmp_path, range(3))
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 3, "lo')
    assert len(read_metrics(tmp_path)) == 3
    write(tmp_path, [3], start=2)
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert [json.loads(line)['step'] for line in text.splitlines()] == [0, 1, 2, 3]


def test_each_loss_is_printed_once_whatever_a_dataset_of_the_mixture_is_called():
    losses = {'train_loss': 1, 'val_loss': 2, 'val_loss_on_my_loss': 3, 'val_reward_margin': 4}
    losses |= {'train_loss_on_my_loss': 5, 'val_bpb': 6}
    shown = 'train loss 1.0000, val loss 2.0000, val bpb 6.0000, on my_loss 3.0000'
    assert format_losses(7, losses) == f'step 7: {shown}, reward margin 4.0000'


@pytest.mark.parametrize(
    'lines',
    [
        [],
        [{'step': 0, 'val_loss': 3.0, 'train_loss': 3.0}],
        [{'step': n, 'loss': 3 / n} for n in range(1, 9)] + [{'step': 8, 'val_loss': 1.0}],
        [{'step': 1, 'loss': float('nan')}, {'step': 2, 'val_loss': float('nan')}],
    ],
    ids=['nothing', 'one evaluation', 'a curve', 'not finite'],
)
def test_the_loss_curve_is_a_picture_whatever_there_is_to_draw(tmp_path, lines):
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / 'metrics.jsonl').write_text(text)
    path = draw_loss(tmp_path)
    assert path == tmp_path / 'loss.png'
    assert path.read_bytes().startswith(b'\x89PNG')
    assert path.stat().st_size > 5000


def test_a_picture_needs_no_metrics_file(tmp_path):
    assert draw_loss(tmp_path).is_file()


def test_several_runs_are_drawn_into_one_picture_by_steps_and_seconds(tmp_path, monkeypatch):
    for name in 'ab':
        (tmp_path / name).mkdir()
        lines = [{'step': i, 'seconds': i / 2, 'val_loss': 3 - i} for i in range(3)]
        lines += [{'step': 2, 'seconds': 1, 'loss': 9}]
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (tmp_path / name / 'metrics.jsonl').write_text(text)
    (tmp_path / 'b').rename(tmp_path / 'b$x_$')
    (tmp_path / 'b').symlink_to(tmp_path / 'b$x_$')
    assert draw_loss(tmp_path / 'b$x_$').exists()
    figures, write = [], metrics.write
    monkeypatch.setattr(metrics, 'write', lambda *args: figures.append(args[0]) or write(*args))
    path = draw_runs([tmp_path / 'a', tmp_path / 'b$x_$'], tmp_path / 'runs')
    for axes, along in zip(figures[0].axes, ([0, 1, 2], [0, 0.5, 1]), strict=True):
        drawn = [list(map(list, line.get_data())) for line in axes.lines]
        assert drawn == [[along[-1:], [9]], [along, [3, 2, 1]]] * 2
        assert axes.lines[1].get_color() != axes.lines[3].get_color()
    assert path == tmp_path / 'runs.png'
    assert path.read_bytes().startswith(b'\x89PNG')
    (tmp_path / 'b' / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    for runs, picture, message in (
        ([tmp_path / 'nowhere'], 'x.png', 'nowhere: has no metrics.jsonl'),
        ([tmp_path / 'b'], 'x.png', 'b: its metrics.jsonl has no evaluation'),
        ([tmp_path / 'a'], tmp_path / 'runs.txt', 'runs.txt: .*txt'),
        ([tmp_path / 'a'], tmp_path / 'no' / 'runs.png', 'no/runs.png: .*No such'),
    ):
        with pytest.raises(UserError, match=message):
            draw_runs(runs, picture)


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, {**PLAIN, 'tensorboard_log': True}, -1)
    tracker.log(1, loss=2.5)
    tracker.log(2, loss=1.5)
    tracker.log_text(2, 'one *two*\n\nthree')
    tracker.close()
    events = EventAccumulator(str(tmp_path / 'tb')).Reload()
    assert [(event.step, event.value) for event in events.Scalars('loss')] == [(1, 2.5), (2, 1.5)]
    (event,) = events.Tensors('sample/text_summary')
    assert event.step == 2
    assert event.tensor_proto.string_val[0].decode() == '    one *two*\n\n    three'


def test_wandb_logs_offline_into_the_run_s_folder(tmp_path, script):
    pytest.importorskip('wandb', reason='wandb is not installed')
    code = (
        'import sys; from flatgpt.training.metrics import Tracker\n'
        "config = {'tensorboard_log': False, 'wandb_log': True, 'wandb_project': 'p', "
        "'wandb_run_name': 'n'}\n"
        'tracker = Tracker(sys.argv[1], config, -1)\n'
        "tracker.log(1, loss=2.5, **dict.fromkeys('lr grad_norm tokens_per_s mfu'.split(), 0.5))\n"
        "tracker.log_text(2, 'a <b>')\n"
        'tracker.log(2, val_loss=2.25)\ntracker.close()\n'
    )
    program = tmp_path / 'program.py'
    program.write_text(code)
    (tmp_path / 'run').mkdir()
    done = script(program, tmp_path / 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / 'run').rglob('offline-run-*/*.wandb')
    for key in ('loss', 'lr', 'grad_norm', 'tokens_per_s', 'mfu', 'val_loss', 'sample'):
        assert key.encode() in kept.read_bytes(), key
    (page,) = kept.parent.rglob('sample*.html')
    assert '<pre>a &lt;b&gt;</pre>' in page.read_text()
    assert not (tmp_path / 'wandb').exists()


@pytest.mark.parametrize(
    ('setting', 'module'),
    [('tensorboard_log', 'torch.utils.tensorboard'), ('wandb_log', 'wandb')],
)
def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, monkeypatch, setting, module):
    monkeypatch.setitem(sys.modules, module, None)  # what import finds when there is none
    with pytest.raises(UserError, match=r'pip install') as caught:
        Tracker(tmp_path, {**PLAIN, setting: True}, -1)
    assert str(caught.value).startswith(f'{setting}=True')


def test_lines_that_are_none_of_ours_do_not_stop_a_run(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_bytes(b'{"loss": 3}\n5\n{"step": "3"}\n\xff\n{"step": 1, "loss": 2.0}\n')
    assert read_metrics(tmp_path) == [{'step': 1, 'loss': 2.0}]
    assert draw_loss(tmp_path).exists()
