"""config/auto.py: what is chosen for a time, and a run that keeps to it and resumes."""

import json
import re
import shutil
import time

import pytest
from conftest import ROOT, hashes
from error_lines import case, error_line

from flatgpt.data import dataset as dataset_module
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import byte_tokenizer, get_tokenizer
from flatgpt.errors import ConfigError, UserError
from flatgpt.runtime import Runtime, pick_dtype
from flatgpt.training import auto, deadline, speed
from flatgpt.training.auto import Search
from flatgpt.training.deadline import Deadline
from flatgpt.training.recipe import (
    Choice,
    Shape,
    possible_block_sizes,
    possible_shapes,
    settings_of,
)
from flatgpt.training.scaling import Text
from flatgpt.training.speed import Machine, StepCost
from flatgpt.training.state import TrainState
from flatgpt.training.validate import check_short_blocks

AUTO = ROOT / 'config' / 'auto.py'
TEXT = Text(2_500_000, 257, 1.0)
LAPTOP = Machine({64: 1e11, 128: 2.5e11, 256: 3.5e11}, 2.0)


@pytest.fixture
def auto_here(run_here, byte_dataset, monkeypatch):
    """Run config/auto.py in this process, on a machine of known speed."""
    monkeypatch.setattr(auto, 'measure', lambda *args: Machine({64: 1e11}, 0.1))
    monkeypatch.setattr(speed, 'PLOT_SECONDS', 0.1)  # small pictures
    monkeypatch.setattr(auto, 'SETUP_SECONDS', 0.1)  # all is imported

    def run(*args):
        monkeypatch.setattr(auto, 'STARTED', time.perf_counter())
        fixed = ('--sample_tokens=0', f'--dataset={byte_dataset}', '--device=cpu')
        return run_here(*fixed, *args, config=AUTO)

    return run


def settings_in(out_dir):
    """What a run's config.py assigns."""
    lines = (out_dir / 'config.py').read_text(encoding='utf-8').splitlines()
    pairs = [line.split(' = ', 1) for line in lines if ' = ' in line and '#' not in line]
    return {name: value for name, value in pairs}


# -----------------------------------------------------------------------------
# the choice


BYTES = byte_tokenizer()
SMALL = ('--n_layer=2', '--n_embd=64')
BRIEF = '--minutes=0.02'
SETTINGS = {'eval_train': False, 'batch_size': 12, 'gradient_accumulation_steps': 40}
SETTINGS |= {'optimizer': 'muon', 'sample_tokens': 600, 'arch': 'modern', 'bias': False}
SETTINGS |= {'n_kv_head': None, 'dataset': 'mine', 'block_size': 64}
SETTINGS |= {'n_layer': 2, 'n_head': 2, 'n_embd': 64}


def search(text=TEXT, memory=1e9, **given):
    return Search(text, {**SETTINGS, **given}, given, 1, memory)


def choose_in(seconds, text=TEXT, machine=LAPTOP, **given):
    tokens_of = auto.tokens_in_time(seconds, 600, text, machine)
    return search(text, **given).rank(tokens_of)[0]


def test_more_time_buys_a_larger_model_and_more_tokens():
    short, long = choose_in(60), choose_in(15 * 60)
    assert long.shape.parameters > short.shape.parameters
    assert long.tokens > 1.5 * short.tokens


def test_a_slower_machine_gets_a_smaller_model():
    slow = Machine({width: speed / 8 for width, speed in LAPTOP.speeds.items()}, 2.0)
    assert choose_in(240, machine=slow).shape.parameters < choose_in(240).shape.parameters


def test_a_model_that_does_not_fit_into_memory_is_no_choice():
    shapes = [*possible_shapes({}, {}, TEXT, 16 * 5e6)]
    assert shapes
    assert max(shape.parameters for shape in shapes) < 5e6


def test_a_model_with_many_more_parameters_than_its_text_has_tokens_is_no_choice():
    short = TEXT._replace(tokens=200_000)
    assert max(shape.parameters for shape in possible_shapes({}, {}, short, 1e12)) <= 1.6e6
    assert choose_in(3600, text=short).shape.parameters <= 1.6e6


def test_so_many_tokens_or_operations_get_a_model_in_proportion():
    models = search(memory=1e12, block_size=256)
    few, many = (models.rank_for_tokens(n)[0] for n in (5e5, 2e7))
    assert many.shape.parameters > few.shape.parameters
    best = models.rank(auto.tokens_for_flops(auto.flops_of(many, TEXT), TEXT))[0]
    assert best.shape == many.shape


def test_models_that_take_more_operations_for_the_same_tokens_say_so():
    ranked = search().rank_for_tokens(5e6)
    lines = [
        *auto.describe_choice(ranked, TEXT, SETTINGS | settings_of(ranked[0], TEXT, SETTINGS, {}))
    ]
    assert re.search(r'-0\.\d+ after [\d.]+ times the operations', lines[1])


def test_what_is_given_stays():
    choice = choose_in(240, n_layer=3, block_size=64)
    assert (choice.shape.n_layer, choice.block_size) == (3, 64)
    assert 'muon_lr' not in settings_of(choice, TEXT, SETTINGS, {'muon_lr': 0.1})
    rows = settings_of(choice, TEXT, SETTINGS, {'batch_size': 12})
    assert 'batch_size' not in rows
    assert rows['gradient_accumulation_steps'] * 12 * 64 == pytest.approx(3072, rel=0.4)


@pytest.mark.parametrize(
    ('block_size', 'short'),
    [(256, 64), (250, 50), (149, None), (90, 18), (64, 16), (60, None), (7, None), (1, None)],
)
def test_short_sequences_divide_any_context(block_size, short):
    choice = choose_in(240)._replace(block_size=block_size)
    settings = SETTINGS | settings_of(choice, TEXT, SETTINGS, {'block_size': block_size})
    assert settings['short_block_size'] == short
    assert bool(settings['short_iters']) == bool(short)
    check_short_blocks(settings, block_size)
    speed.step_cost(settings | {'block_size': block_size}, choice.shape, TEXT, LAPTOP)
    given = {'block_size': block_size, 'short_iters': 0}
    assert settings_of(choice, TEXT, SETTINGS, given)['short_block_size'] is None


def test_a_shape_that_the_given_heads_cannot_have_is_no_choice():
    def widths(**given):
        return {shape.n_embd for shape, _ in search(memory=1e12, **given).options}

    assert 320 in widths(n_head=5)
    assert all(width % 10 == 0 for width in widths(n_head=5))
    assert widths(n_kv_head=2) < widths(n_kv_head=1) == widths()
    assert widths(n_embd=66) == {66}
    for wrong in ({'n_embd': 65}, {'n_embd': 0}, {'n_layer': 0}, {'n_head': 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            widths(**wrong)


def test_micro_batches_that_are_given_share_the_rows_of_a_step():
    choice, given = choose_in(240), {'gradient_accumulation_steps': 4}
    free = settings_of(choice, TEXT, SETTINGS, {})
    for ranks in (1, 2, 4):
        config = SETTINGS | given
        size = settings_of(choice, TEXT, config, given, ranks)['batch_size']
        assert 4 * size == pytest.approx(free['batch_size'], abs=3)


def test_many_evaluations_are_short_ones():
    choice, given = choose_in(240), {'eval_interval': 50}
    free = settings_of(choice, TEXT, SETTINGS, {})
    many = settings_of(choice, TEXT, SETTINGS | given, given)
    assert many['eval_iters'] * (many['max_iters'] // 50) < 1.3 * free['eval_iters'] * 4
    once = {'eval_interval': None}
    assert settings_of(choice, TEXT, SETTINGS | once, once)['eval_iters'] > free['eval_iters']


def test_adamw_gets_no_learning_rate_of_muons():
    adamw = settings_of(choose_in(240), TEXT, SETTINGS | {'optimizer': 'adamw'}, {})
    assert not adamw.keys() & {'learning_rate', 'muon_lr', 'muon_momentum'}


def test_the_context_fits_into_each_part_of_a_mixture(tmp_path):
    for name, tokens in (('long', 100_000), ('short', 3000)):
        with Writer(tmp_path / name, BYTES) as writer:
            writer.write('train', [65] * tokens)
            writer.write('val', [65] * (tokens // 20))
    mixture = f'{tmp_path / "long"}:0.5,{tmp_path / "short"}:0.5'
    config = dict(dataset=mixture, seed=1, objective='lm', data_cache=None, check=0, plan=0)
    text = auto.read_text(config)
    assert (text.tokens, text.max_context) == (103_000, 149)
    assert possible_block_sizes({}, {}, text) == (64, 128)


def test_a_short_text_is_repeated_with_dropout_and_a_long_one_without():
    choice = Choice(Shape(4, 2, 160), 256, 8e6)
    assert settings_of(choice, TEXT._replace(tokens=200_000), SETTINGS, {})['dropout'] > 0.1
    assert settings_of(choice, TEXT, SETTINGS, {})['dropout'] == 0.0


@pytest.mark.parametrize('ranks', [1, 2, 3, 8])
@pytest.mark.parametrize('memory', [1e9, 5e6])
def test_every_rank_gets_as_many_whole_micro_batches(ranks, memory):
    settings = settings_of(choose_in(240), TEXT, SETTINGS, {}, ranks, memory)
    assert settings['gradient_accumulation_steps'] % ranks == 0


def test_little_memory_divides_a_step_into_micro_batches():
    choice = choose_in(240)
    whole, cut = (settings_of(choice, TEXT, SETTINGS, {}, 1, n) for n in (1e9, 5e6))
    assert cut['batch_size'] < whole['batch_size']
    rows = [s['batch_size'] * s['gradient_accumulation_steps'] for s in (whole, cut)]
    assert rows[1] == pytest.approx(rows[0], rel=0.1)


def test_the_speed_between_two_measured_widths_is_interpolated():
    assert LAPTOP.speed(32) == LAPTOP.speed(64) == 1e11
    assert 1e11 < LAPTOP.speed(96) < 2.5e11
    assert LAPTOP.speed(1024) == 3.5e11


def test_the_cost_of_steps_counts_short_ones_full_ones_and_evaluations():
    cost = StepCost(short=1.0, full=2.0, short_iters=10, evaluation=100.0, eval_interval=8)
    assert cost.seconds(0, 10) == 10 + 2 * 100  # before steps 0 and 8
    assert cost.seconds(1, 8) == 7
    assert cost.seconds(9, 12) == 1 + 2 * 2
    assert cost._replace(eval_interval=None).seconds(0, 11) == 10 + 2
    assert cost.stretched(4, 0.5).short_iters == 4 + 3
    assert cost.stretched(11, 0.5) == cost


def test_a_machine_is_measured_until_a_probe_would_take_too_long(monkeypatch):
    monkeypatch.setattr(speed, 'time_step', lambda *args: 1e-5 * args[3].n_embd ** 2)
    runtime = Runtime('cpu', pick_dtype('float32', 'cpu'))
    widths = [[*speed.measure(SETTINGS, runtime, 257, n).speeds] for n in (1, 100, 60_000)]
    assert widths[0] == [64]
    assert widths[0] < widths[1] < widths[2]


# -----------------------------------------------------------------------------
# a run


def test_a_run_writes_plain_settings_and_an_equal_run_needs_no_measuring(
    auto_here, run_here, tmp_path, capsys, monkeypatch
):
    out, again = tmp_path / 'out', tmp_path / 'again'
    assert auto_here('--tokens=90_000', f'--out_dir={out}') == 0
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith('auto: ')]) == 5
    settings = settings_in(out)
    assert settings['minutes'] == settings['tokens'] == 'None'
    assert int(settings['max_iters']) >= auto.LEAST_STEPS
    monkeypatch.setattr(auto, 'choose', None)
    assert run_here(f'--out_dir={again}', config=out / 'config.py') == 0
    name = f'checkpoints/step-{int(settings["max_iters"]):08d}'
    assert hashes(out / name) == hashes(again / name)


@pytest.fixture
def changes_at(monkeypatch):
    """The deadline changes the number of steps at given steps: {step: new number}."""

    def change(changes):
        monkeypatch.setattr(Deadline, 'is_due', lambda self, step: step in changes)
        monkeypatch.setattr(Deadline, 'refit', lambda self, step, _: changes[step])

    return change


def test_a_shortened_run_still_cools_down_and_a_resumed_one_follows_its_events(
    auto_here, run_here, changes_at, tmp_path, capsys, monkeypatch
):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    every = ('--log_interval=1', '--eval_interval=5', '--always_save_checkpoint=True')
    changes_at({10: 30, 20: 26})
    assert auto_here('--minutes=0.2', *SMALL, *every, f'--out_dir={whole}') == 0
    assert '26 steps instead of 30' in capsys.readouterr().out
    lines = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    rates = [line['lr'] for line in lines if 'lr' in line]
    assert len(rates) == 26
    assert rates[-1] < 0.2 * max(rates)
    state = json.loads((whole / 'checkpoints/step-00000026/state.json').read_text())
    assert state['events'] == [[10, 30], [20, 26]]

    # killed after step 20, and resumed, without a clock
    shutil.copytree(whole, cut)
    (cut / 'DONE').unlink()
    for step in (25, 26):
        shutil.rmtree(cut / f'checkpoints/step-{step:08d}')
    monkeypatch.setattr(Deadline, 'is_due', None)
    assert run_here('--init_from=resume', '--check', config=cut / 'config.py') == 0
    assert 'schedule: 26 steps' in capsys.readouterr().out
    assert run_here('--init_from=resume', config=cut / 'config.py') == 0
    last = 'checkpoints/step-00000026'
    assert hashes(whole / last) == hashes(cut / last)


KNOWN_SPEED = """
import time
import flatgpt
from flatgpt.training import auto, deadline, speed
flatgpt.STARTED = auto.STARTED = time.perf_counter()
auto.measure = lambda *args: speed.Machine({64: 2e10}, 0.1)
deadline.Deadline.is_due = lambda self, step: step in (10, 20)
deadline.Deadline.refit = lambda self, step, _: {10: 30, 20: 26}[step]
"""


def test_two_ranks_choose_and_change_the_same(ranks, byte_dataset, tmp_path):
    crew = ranks(
        2, f'--dataset={byte_dataset}', '--minutes=0.2', *SMALL, '--device=cpu',
        '--sample_tokens=0', f'--out_dir={tmp_path / "out"}', config=AUTO, before=KNOWN_SPEED,
    )  # fmt: skip
    assert crew.end() == [0, 0], crew.err
    assert int(settings_in(tmp_path / 'out')['gradient_accumulation_steps']) == 2
    assert '26 steps instead of 30' in crew.out
    assert (tmp_path / 'out/checkpoints/step-00000026').exists()


def test_the_same_command_resumes_with_the_settings_that_were_chosen(
    auto_here, tmp_path, monkeypatch, capsys
):
    args = (BRIEF, *SMALL, f'--out_dir={tmp_path / "out"}', '--auto_resume')
    assert auto_here(*args) == 0
    (tmp_path / 'out/DONE').unlink()
    monkeypatch.setattr(auto, 'choose', None)
    assert auto_here(*args) == 0
    assert f'{BRIEF} is ignored' in capsys.readouterr().out
    assert (tmp_path / 'out/DONE').exists()


EVEN = StepCost(short=1.0, full=1.0, short_iters=0, evaluation=0.0, eval_interval=None)


def test_a_deadline_changes_nothing_while_the_machine_keeps_its_speed(clock):
    line = Deadline(100.0, EVEN, 100)
    for step in range(100):
        clock.now = step * 1.0
        if line.is_due(step):
            assert line.refit(step, 100) is None


@pytest.mark.parametrize(('factor', 'low', 'high'), [(2.0, 50, 56), (4.0, 25, 32), (0.5, 190, 205)])
def test_a_deadline_ends_in_time_on_a_machine_of_another_speed(clock, factor, low, high):
    line, step, steps = Deadline(100.0, EVEN, 100), 0, 100
    while step < steps:
        if line.is_due(step):
            steps = line.refit(step, steps) or steps
        step, clock.now = step + 1, clock.now + factor
    assert low <= steps <= high
    assert 95 <= clock.now <= 105


def test_short_sequences_stay_the_same_part_of_a_run_that_is_cut(clock):
    cost = StepCost(short=1.0, full=2.0, short_iters=50, evaluation=0.0, eval_interval=None)
    line, state, steps, changes = Deadline(150.0, cost, 100), TrainState(), 100, 0
    for step in range(100):
        if step < steps and line.is_due(step) and (new := line.refit(step, steps)):
            state.events.append([step, new])
            steps, changes = new, changes + 1
        if step < steps:
            clock.now += 2 * (1.0 if state.schedule_step(step, 100) < 50 else 2.0)
    assert 145 <= clock.now <= 156
    assert 48 <= steps <= 56
    assert changes <= 3


def test_a_machine_that_becomes_slow_halfway_still_ends_in_time(clock):
    line, step, steps = Deadline(100.0, EVEN, 100), 0, 100
    while step < steps:
        if line.is_due(step):
            steps = line.refit(step, steps) or steps
        step, clock.now = step + 1, clock.now + (2.0 if step >= 50 else 1.0)
    assert 95 <= clock.now <= 105
    assert 72 <= steps <= 78


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(deadline, 'time', clock)
    return clock


def test_the_schedule_continues_from_where_it_was_at_an_event():
    state = TrainState(events=[[50, 75]])
    assert [state.schedule_step(step, 100) for step in (0, 49, 50)] == [0, 49, 50]
    assert state.schedule_step(51, 100) == 52
    assert state.schedule_step(75, 100) == 100
    state.events.append([60, 100])
    assert state.schedule_step(60, 100) == 70
    assert state.schedule_step(80, 100) == 85


def test_a_run_without_events_has_the_schedule_of_its_steps():
    assert [TrainState().schedule_step(step, 7) for step in range(8)] == list(range(8))


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('chooses {}; use', ['--max_iters=100'], []),
        case('chooses {}; use', ['--max_iters=0'], ['--short_iters=0']),
        case('chooses {}; use', ['--short_block_size=None'], ['--lr_decay_iters=None']),
        case('are both set', ['--tokens=1e5'], ['--minutes=None', '--tokens=1e5']),
        case('is too little for', ['--minutes=0.001'], []),
        case('is too little for', ['--batch_size=999'], ['--batch_size=4']),
        case('is too little for', ['--minutes=None', '--tokens=1e5', '--batch_size=999'], []),
        case('is longer than the validation split', ['--block_size=1000000'], ['--block_size=16']),
        case('is for text, not for objective', ['--objective=sft'], []),
        case('which eval_only does not do', ['--eval_only'], []),
        case(
            'chooses the shape of a new model',
            ['--init_from=gpt2'],
            [
                '--init_from=scratch',
                '--max_iters=3',
                '--minutes=None',
                '--block_size=16',
                '--n_head=2',
            ],
        ),
    ],
)
def test_a_dial_that_cannot_be_followed_is_refused(auto_here, tmp_path, bad, good):
    out = f'--out_dir={tmp_path / "out"}'
    with pytest.raises(ConfigError):
        auto_here('--minutes=0.1', out, *bad)
    assert not (tmp_path / 'out').exists()
    assert auto_here(BRIEF, *SMALL, out, *good) == 0


def test_a_run_that_exists_is_refused_before_the_machine_is_measured(
    auto_here, tmp_path, monkeypatch
):
    out = f'--out_dir={tmp_path / "out"}'
    assert auto_here(BRIEF, *SMALL, out) == 0
    with monkeypatch.context() as patch:
        patch.setattr(auto, 'choose', None)
        with pytest.raises(UserError, match='has checkpoints already'):
            auto_here(BRIEF, *SMALL, out)
    assert auto_here(BRIEF, *SMALL, out, '--overwrite') == 0


def test_a_prediction_for_another_architecture_has_a_warning(auto_here, capsys):
    plan = (BRIEF, *SMALL, '--plan')
    assert auto_here(*plan) == 0
    assert 'warning' not in capsys.readouterr().out
    assert auto_here(*plan, '--arch=gpt2') == 0
    assert 'not for --arch=gpt2 --optimizer=muon' in capsys.readouterr().out


@error_line('to train on, and a model needs at least', 'more than the text')
def test_a_text_that_is_too_short_is_refused_until_there_is_more(auto_here, tmp_path):
    def dataset(name, tokens, tokenizer=BYTES):
        with Writer(tmp_path / name, tokenizer) as writer:
            writer.write('train', [65] * tokens)
            writer.write('val', [65] * 100)
        return f'--dataset={tmp_path / name}'

    out = f'--out_dir={tmp_path / "out"}'
    with pytest.raises(ConfigError, match='has 200 tokens to train on'):
        auto_here(dataset('tiny', 200), out)
    with pytest.raises(ConfigError, match='gpt2 tokenizer has 50,257 tokens'):
        auto_here(dataset('gpt2', 3000, get_tokenizer('gpt2')), out)
    assert auto_here(dataset('enough', 3000), BRIEF, *SMALL, out) == 0


@error_line('chose the settings when this run began')
def test_minutes_are_refused_with_a_run_that_is_resumed(auto_here, tmp_path):
    out = f'--out_dir={tmp_path / "out"}'
    assert auto_here(BRIEF, *SMALL, out) == 0
    (tmp_path / 'out/DONE').unlink()
    with pytest.raises(ConfigError):
        auto_here(BRIEF, out, '--init_from=resume')
    assert auto_here(out, '--init_from=resume') == 0


@error_line('is not prepared, and the model is chosen by its size')
def test_a_plan_prepares_no_dataset(auto_here, byte_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, 'DATA', tmp_path / 'data')
    folder = tmp_path / 'data/small'
    folder.mkdir(parents=True)
    (folder / 'prepare.py').write_text('')
    with pytest.raises(ConfigError):
        auto_here(BRIEF, *SMALL, '--plan', '--dataset=small')
    assert len([*folder.iterdir()]) == 1
    shutil.copytree(byte_dataset, folder, dirs_exist_ok=True)  # as the command does
    assert auto_here(BRIEF, *SMALL, '--plan', '--dataset=small') == 0
