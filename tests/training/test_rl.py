"""objective='rl': completions of prompts, their rewards, and a run that learns from them."""

import itertools
import shutil

import pytest
import torch
from conftest import hashes, metrics, random_model, saved
from error_lines import case, error_line
from rl_runs import BYTES, tuning

from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import ConfigError, UserError
from flatgpt.runtime import Runtime
from flatgpt.training.loss import loss_of, token_logps
from flatgpt.training.rollout import Rollouts, advantages
from flatgpt.training.stop_signal import StopSignal

pytest_plugins = ['rl_runs']
CONFIG = {'seed': 3, 'rl_samples': 3, 'rl_tokens': 6, 'batch_size': 2, 'reward': 'length'}
CONFIG |= {'rl_baseline': 'mean', 'rl_normalize': 'tokens', 'eval_iters': None}


def rollouts(asked, **changes):
    model = random_model(257, 32)
    runtime = Runtime('cpu', torch.float32)
    return Rollouts(model, BYTES, Dataset(asked, 32, objective='rl'), CONFIG | changes, runtime)


# -----------------------------------------------------------------------------
# the gradient


def test_the_mean_over_all_completions_is_the_gradient_of_the_expected_reward():
    """Of completions of at most three tokens, where token 2 ends one and token 3 is never
    sampled."""
    model, prompt, end = random_model(4, 8).double(), [0, 1], 2
    suppressed = torch.tensor([False, False, False, True])
    paths = [p for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)]
    paths = [p for p in paths if end not in p[:-1] and (p[-1] == end or len(p) == 3)]
    rewards = torch.linspace(-1, 2, len(paths)).double().sin()
    rows = []
    for path in paths:
        ids = torch.tensor([*prompt, *path])
        x, y = ids[None, :-1], ids[None, 1:].clone()
        y[:, : len(prompt) - 1] = -1
        rows.append((x, y))

    def log_p(x, y):
        return token_logps(model, x, y, suppressed).double().sum()

    expected = sum(log_p(*row).exp() * reward for row, reward in zip(rows, rewards, strict=True))
    exact = torch.autograd.grad(-expected, model.trunk.h[0].mlp.c_fc.weight)[0]
    estimate = torch.zeros_like(exact)
    total = 0.0
    for (x, y), reward in zip(rows, rewards - 0.7, strict=True):  # any baseline
        p = log_p(x, y).exp().item()
        loss = loss_of(model, x, y, advantages=reward[None], suppressed=suppressed)
        loss = loss * (y >= 0).sum()  # a sum over its tokens
        estimate += p * torch.autograd.grad(loss, model.trunk.h[0].mlp.c_fc.weight)[0]
        total += p
    assert total == pytest.approx(1)
    torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-9)


def test_advantages_compare_the_completions_of_a_prompt():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    assert advantages(rewards, 'mean')[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages(rewards, 'mean')[1].tolist() == [0, 0, 0, 0]
    assert advantages(rewards, 'leave_one_out')[2].tolist() == pytest.approx([3, -1, -1, -1])
    scaled = advantages(rewards, 'std')
    assert scaled[0].std().item() == pytest.approx(1, abs=1e-3)
    assert scaled[1].tolist() == [0, 0, 0, 0]


# -----------------------------------------------------------------------------
# completions


def test_a_completion_depends_on_nothing_but_its_prompt_and_number(asked):
    many, alone = rollouts(asked), rollouts(asked)
    asking = many.data.prompts('train', range(6))
    seeds = [(3, number) for number in range(6)]
    together = many.complete(asking, seeds, lambda: True)
    for first in (5, 2, 0):
        part = alone.complete(asking[first : first + 1], seeds[first : first + 1], lambda: True)
        assert part == together[3 * first : 3 * first + 3]
    assert len({tuple(c.ids) for c in together}) > 10


def test_only_completions_are_targets_and_the_divisor_counts_all_of_them(asked):
    rl = rollouts(asked)
    stop = StopSignal(rl.runtime)
    groups = [{'samples': range(n, n + 2), 'prompts': rl.data.prompts('train', [n, n + 1])}
              for n in (0, 2)]  # fmt: skip
    rl.reward = lambda prompts, texts, rows: [float(n * n) for n in range(len(texts))]
    completions = rl.sample([(group, 1.0) for group in groups], stop, lambda: None)
    batches = rl.micro_batches(completions, rows=2)
    targets = [(batch['y'] >= 0).sum().item() for batch, _ in batches]
    assert [divisor for _, divisor in batches] == [sum(targets) / n for n in targets]
    batch, prompt = batches[0][0], groups[0]['prompts'][0]
    assert batch['y'].shape[0] == batch['advantages'].shape[0] == 6
    start = len(prompt.ids) - 1
    assert (batch['y'][0, :start] == -1).all()
    assert batch['x'][0, : start + 1].tolist() == prompt.ids
    ids = batch['y'][0, start:]
    assert (
        batch['x'][0, start + 1 : start + (ids >= 0).sum()].tolist() == ids[ids >= 0][:-1].tolist()
    )
    assert rl.stats['completion_tokens'] == pytest.approx(sum(targets) / 12)


def test_what_has_no_advantage_is_left_out_and_changes_nothing(asked):
    rl = rollouts(asked)
    prompts = rl.data.prompts('train', range(4))
    # of the first two prompts all are equal, and of the third one is at the mean
    rl.reward = lambda *_: [0.1] * 6 + [0.0, 0.5, 1.0] + [1.0, 0.0, 0.0]
    groups = [({'samples': range(n, n + 2), 'prompts': prompts[n : n + 2]}, 1.0) for n in (0, 2)]
    sampled = rl.sample(groups, StopSignal(rl.runtime), lambda: None)
    batches = rl.micro_batches(sampled, rows=2)
    assert [len(batch['x']) for batch, _ in batches] == [5]
    assert rl.stats['flat_groups'] == 0.5
    loss = sum(loss_of(rl.model, **batch) / divisor for batch, divisor in batches)
    completions = rl.complete(prompts, [(3, n) for n in range(4)], lambda: True)
    whole = rl.tensors(completions, len(completions))
    weights = advantages(torch.tensor(rl.reward()).view(4, 3), 'mean').flatten()
    expected = loss_of(rl.model, **whole, advantages=weights, suppressed=rl.suppressed)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    equal = [c._replace(reward=0.1) for c in sampled]
    ((batch, _),) = rl.micro_batches(equal, rows=2)
    assert loss_of(rl.model, **batch).item() == 0


def test_no_rollout_sees_the_weights_before_the_last_update(asked):
    rl = rollouts(asked)
    rl.copy = random_model(257, 32, seed=5)  # as in 16 bits
    prompt, seeds = rl.data.prompts('train', [0]), [(3, 0)]
    before = rl.complete(prompt, seeds, lambda: True)
    with torch.no_grad():
        for parameter in rl.model.parameters():
            parameter.mul_(1.2)
    changed = rl.complete(prompt, seeds, lambda: True)
    assert before != changed
    rl.copy = None
    rl.model.eval()
    assert rl.complete(prompt, seeds, lambda: True) == changed


def test_the_engine_and_training_give_a_token_the_same_probability(asked):
    rl = rollouts(asked)
    completions = rl.complete(rl.data.prompts('val', [0, 1]), [(3, 0), (3, 1)], lambda: True)
    assert rl.compare(completions)[0] < 1e-4


# -----------------------------------------------------------------------------
# runs


def test_a_run_raises_the_reward(run_here, base, asked, letters, tmp_path, capsys):
    flags = (*tuning(base, asked, letters), '--max_iters=30', '--eval_interval=10')
    assert run_here(f'--out_dir={tmp_path}/run', *flags) == 0
    reward = metrics(tmp_path / 'run', 'val_reward')
    assert reward[30] > 2 * reward[0]
    printed = capsys.readouterr().out
    assert 'pass@1' in printed
    assert 'validation reward' in printed
    assert "'say " in printed
    lines = metrics(tmp_path / 'run', 'entropy')
    assert all(value > 0 for value in lines.values())


def test_a_killed_run_resumes_bit_for_bit(run_here, base, asked, letters, tmp_path):
    flags = (*tuning(base, asked, letters), '--rl_kl=0.1', '--always_save_checkpoint=True')
    run_here(f'--out_dir={tmp_path}/whole', *flags)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    (tmp_path / 'cut/DONE').unlink()
    shutil.rmtree(tmp_path / 'cut/checkpoints/step-00000008')
    run_here('--init_from=resume', config=tmp_path / 'cut/config.py')
    last = 'checkpoints/step-00000008'
    assert hashes(tmp_path / 'whole' / last) == hashes(tmp_path / 'cut' / last)


@error_line('is missing or belongs to another run')
def test_the_kl_penalty_needs_the_initial_model(run_here, base, asked, letters, tmp_path):
    flags = (*tuning(base, asked, letters), '--rl_kl=10', '--max_iters=4')
    run_here(f'--out_dir={tmp_path}/near', *flags)
    run_here(f'--out_dir={tmp_path}/far', *flags, '--rl_kl=1e-9')
    near, far = (metrics(tmp_path / name, 'val_kl') for name in ('near', 'far'))
    assert near[0] == far[0] == 0
    assert 0 < near[4] < far[4]
    (tmp_path / 'near/reference.safetensors').unlink()
    with pytest.raises(UserError, match='start a new run'):
        run_here(f'--out_dir={tmp_path}/near', *flags, '--init_from=resume', '--max_iters=6')


def test_two_processes_give_the_same_result_as_one(
    two_ranks, run_here, base, asked, letters, tmp_path
):
    flags = (*tuning(base, asked, letters), '--rl_kl=0.1')
    run_here(f'--out_dir={tmp_path}/one', *flags)
    two_ranks(f'--out_dir={tmp_path}/two', *flags)
    for key in ('loss', 'grad_norm', 'reward', 'val_reward', 'val_kl', 'completion_tokens'):
        one, two = metrics(tmp_path / 'one', key), metrics(tmp_path / 'two', key)
        assert list(one) == list(two) != []
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4, abs=1e-5), key


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case("objective='rl' needs a reward", ['--reward=None'], []),
        (['--rl_samples=1'], ['--rl_samples=2']),
        case("is not supported with objective='rl'", ['--mask_documents'], []),
        case("is not supported with objective='rl'", ['--dropout=0.1'], ['--dropout=0']),
        case('leave room for {} in a context', ['--rl_tokens=99'], ['--rl_tokens=16']),
        case('leave room for {} in a context', ['--block_size=8'], []),
        case(' needs {}: give --init_from=RUN_DIRECTORY', ['--init_from=scratch'], []),
    ],
)
def test_settings_without_a_meaning_are_refused(
    run_here, base, asked, letters, tmp_path, bad, good
):
    flags = (*tuning(base, asked, letters), f'--out_dir={tmp_path}/run', '--max_iters=0')
    with pytest.raises(ConfigError):
        run_here(*flags, *bad)
    assert not (tmp_path / 'run').exists()
    assert run_here(*flags, *good) == 0


def test_a_reward_that_fails_in_an_evaluation_alone_is_one_line(run_here, base, asked, letters):
    flags = (*tuning(base, asked, letters), '--eval_only')
    with pytest.raises(UserError, match='returned None'):
        run_here(*flags, f'--reward={letters}:none')
    assert run_here(*flags) == 0


@error_line('the logits of a completion are not finite')
def test_weights_that_an_update_broke_are_one_line(run_here, base, asked, letters, tmp_path):
    flags = (*tuning(base, asked, letters), f'--out_dir={tmp_path}/run', '--max_iters=2')
    with pytest.raises(UserError, match='lower --learning_rate'):
        run_here(*flags, '--learning_rate=1e20')
    assert run_here(*flags, '--overwrite') == 0


def test_prompts_of_another_tokenizer_are_prepared_again(run_here, base, asked, letters, tmp_path):
    other = saved(tmp_path / 'other', char_tokenizer(sorted('abcsy ')), block_size=32)
    with pytest.raises(UserError, match=r'data/prompts/prepare\.py FILES --tokenizer='):
        run_here(*tuning(other, asked, letters), f'--out_dir={tmp_path}/run')


def test_a_reward_that_fails_later_loses_no_step(run_here, base, asked, letters, tmp_path, capsys):
    flags = tuning(base, asked, letters)
    run_here(f'--out_dir={tmp_path}/run', *flags, '--max_iters=4')
    again = (f'--out_dir={tmp_path}/run', *flags, '--init_from=resume')
    with pytest.raises(UserError, match='returned None'):
        run_here(*again, f'--reward={letters}:none')
    assert 'warning: reward=' in capsys.readouterr().out
    assert run_here(*again) == 0
    assert 'warning: reward=' not in capsys.readouterr().out


# -----------------------------------------------------------------------------
# as TRL computes it

TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # in transformers' GPT-2


def trl_trainer(name, folder, model, **settings):
    """A trainer of TRL for the same model."""
    trl = pytest.importorskip('trl')
    datasets = pytest.importorskip('datasets')
    from transformers import AutoTokenizer, GPT2LMHeadModel

    export_transformers(model, BYTES, {}, folder / 'model')
    theirs = GPT2LMHeadModel.from_pretrained(folder / 'model', dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder / 'model')
    words.pad_token = words.eos_token
    config = getattr(trl, f'{name}Config')(
        output_dir=str(folder / 'out'), per_device_train_batch_size=4, num_generations=4,
        max_completion_length=6, use_cpu=True, bf16=False, report_to='none', disable_tqdm=True,
        **settings,
    )  # fmt: skip
    trainer = getattr(trl, f'{name}Trainer')(
        model=theirs,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({'prompt': ['a']}),
        processing_class=words,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer, theirs.eval()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    ('name', 'baseline', 'settings'),
    [
        ('GRPO', 'std', {'loss_type': 'dapo', 'beta': 0.2}),
        ('GRPO', 'mean', {'loss_type': 'dr_grpo', 'scale_rewards': 'none', 'beta': 0.0}),
        ('RLOO', 'leave_one_out', {'beta': 0.0}),
    ],
)
def test_the_gradient_is_that_of_trl(name, baseline, settings, tmp_path):
    model, initial = random_model(257, 32), random_model(257, 32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in initial.parameters():
            parameter += 0.002 * torch.randn_like(parameter)
    trainer, theirs = trl_trainer(name, tmp_path, model, **settings)
    for each in (model, initial, theirs):
        each.double()
    torch.manual_seed(0)
    start, lengths = torch.randint(256, (4, 5)), torch.tensor([6, 2, 4, 1])
    ids, mask = torch.randint(256, (4, 6)), torch.arange(6) < lengths[:, None]
    rewards = torch.tensor([[1.0, 0.0, 0.3, 0.5]])
    values = advantages(rewards, baseline).flatten()
    x = torch.cat((start, ids), 1)[:, :-1]
    y = torch.cat((torch.full((4, 4), -1), ids.masked_fill(~mask, -1)), 1)
    with torch.no_grad():
        reference, before = token_logps(initial, x, y), token_logps(model, x, y)
    inputs = {
        'prompt_ids': start, 'prompt_mask': torch.ones_like(start), 'completion_ids': ids,
        'completion_mask': mask.long(), 'advantages': values, 'old_logps': before.sum(1),
        'ref_per_token_logps': reference[:, 4:], 'num_items_in_batch': mask.sum(),
    }  # fmt: skip
    trainer._compute_loss(theirs, inputs).backward()
    beta = settings['beta']
    loss = loss_of(model, x, y, reference if beta else None, beta, advantages=values)
    if name == 'RLOO':  # a mean over completions
        loss = loss * mask.sum() / 4
    if settings.get('loss_type') == 'dr_grpo':  # over completions of the greatest length
        loss = loss * mask.sum() / (4 * 6)
    loss.backward()
    expected = {key: value.grad for key, value in theirs.named_parameters()}
    for key, parameter in model.named_parameters():
        grad = parameter.grad.T if key.endswith(TRANSPOSED) else parameter.grad
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-5)
