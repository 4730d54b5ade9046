"""objective='reward': a model that scores completions, learned from pairs, and RL with it."""

import json

import pytest
import torch
from conftest import hashes, metrics, random_model, refused, saved
from error_lines import error_line

from flatgpt.checkpoint.__main__ import main as checkpoint_command
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.checkpoint.load import find_checkpoint, load_model
from flatgpt.data import chat, prompts
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import CheckpointError, ConfigError
from flatgpt.runtime import Runtime
from flatgpt.training.loss import compute_metrics, last_tokens, loss_of
from flatgpt.training.reward import RewardModel, load_reward_model

BYTES, RUNTIME = byte_tokenizer(), Runtime('cpu', torch.float32)
PAIRS = [('Hi', 'aa', 'bbb'), ('A fish?', 'aab', 'bb'), ('2+2', 'a', 'b'), ('Why?', 'aaaa', 'ba')]
CONTEXT = 96


def write(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(path)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pairs')
    lines = [dict(zip(('prompt', 'chosen', 'rejected'), pair, strict=True)) for pair in PAIRS]
    files = [write(folder / name, lines) for name in ('train.jsonl', 'val.jsonl')]
    flags = (f'--out_dir={folder / "data"}', '--tokenizer=byte', f'--block_size={CONTEXT}')
    chat.main([files[0], f'--val={files[1]}', *flags])
    return folder / 'data'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('base') / 'run', BYTES, block_size=CONTEXT)


@pytest.fixture(scope='module')
def judge(tmp_path_factory, run_here, base, pairs):
    """A run directory of a trained reward model."""
    out_dir = tmp_path_factory.mktemp('judge') / 'run'
    run_here(f'--out_dir={out_dir}', *learning(base, pairs))
    return out_dir


def learning(base, pairs):
    return (
        f'--init_from={base}', f'--dataset={pairs}', '--objective=reward', '--batch_size=2',
        '--gradient_accumulation_steps=2', '--block_size=96', '--max_iters=30', '--eval_iters=None',
        '--learning_rate=3e-3', '--lr_schedule=constant', '--lr_decay_iters=None',
        '--eval_interval=10', '--always_save_checkpoint=True',
    )  # fmt: skip


def reward_model(**changes):
    model = random_model(257, CONTEXT, **changes)
    model.become_reward_model()
    torch.nn.init.normal_(model.score.weight, std=0.3)
    return model.eval()


def scores_of(model, sequences):
    return [
        model(torch.tensor([ids]), ends=torch.tensor([len(ids) - 1]))[0].item() for ids in sequences
    ]


# -----------------------------------------------------------------------------
# the loss


def test_the_score_is_that_of_the_last_real_token(pairs):
    data, model = Dataset(pairs, CONTEXT, objective='reward'), reward_model()
    x, y = data.eval_batch('val', data.eval_starts('val'))
    ends = last_tokens(y)
    scores = model(torch.from_numpy(x), ends=torch.from_numpy(ends))[0]
    rows = [row[: end + 1].tolist() for row, end in zip(x, ends, strict=True)]
    assert all(row[-1] == BYTES.eot for row in rows)
    assert scores.tolist() == pytest.approx(scores_of(model, rows), abs=1e-5)


def test_a_row_that_is_full_keeps_its_last_token():
    y = torch.full((2, 64), -1)
    y[0, 3:62], y[1, 5] = 7, 7
    assert last_tokens(y.numpy()).tolist() == [62, 6]


@pytest.mark.filterwarnings('ignore')
def test_the_loss_is_that_of_trl(pairs, tmp_path):
    trl = pytest.importorskip('trl')
    datasets = pytest.importorskip('datasets')
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = reward_model()
    data = Dataset(pairs, CONTEXT, objective='reward')
    x, y = data.eval_batch('val', data.eval_starts('val'))
    rows = [row[: end + 1].tolist() for row, end in zip(x, last_tokens(y), strict=True)]
    model.config.vocab_size += 1  # as padded: an id for the padding of transformers
    table = model.transformer.wte.weight.detach()
    model.transformer.wte = torch.nn.Embedding.from_pretrained(torch.cat((table, table[:1])))
    export_transformers(model, BYTES, {}, tmp_path / 'model')
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'model')
    words = AutoTokenizer.from_pretrained(tmp_path / 'model')
    assert words.pad_token_id == theirs.config.pad_token_id == BYTES.vocab_size
    dataset = datasets.Dataset.from_dict({'chosen_ids': rows[::2], 'rejected_ids': rows[1::2]})
    config = trl.RewardConfig(
        output_dir=str(tmp_path / 'out'), per_device_eval_batch_size=len(PAIRS), use_cpu=True,
        bf16=False, report_to='none', disable_tqdm=True, max_length=CONTEXT,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=theirs, args=config, train_dataset=dataset, eval_dataset=dataset,
        processing_class=words,
    )  # fmt: skip
    measured = trainer.evaluate()
    batch = {'x': torch.from_numpy(x), 'ends': torch.from_numpy(last_tokens(y))}
    (loss, accuracy, margin), count = compute_metrics(model, **batch)
    assert count == len(PAIRS)
    assert loss.item() == loss_of(model, **batch).item()
    assert loss.item() == pytest.approx(measured['eval_loss'], abs=1e-5)
    assert accuracy.item() == pytest.approx(measured['eval_accuracy'])
    assert margin.item() == pytest.approx(measured['eval_margin'], abs=1e-5)


# -----------------------------------------------------------------------------
# runs


@pytest.mark.parametrize('flags', [[], ['--lora_rank=4'], ['--optimizer=muon']], ids=str)
def test_a_run_learns_which_completion_is_preferred(run_here, base, pairs, tmp_path, capsys, flags):
    run_here(f'--out_dir={tmp_path}/run', *learning(base, pairs), *flags)
    accuracy = metrics(tmp_path / 'run', 'val_reward_accuracy')
    assert accuracy[30] == 1
    assert metrics(tmp_path / 'run', 'val_loss')[30] < metrics(tmp_path / 'run', 'val_loss')[0]
    printed = capsys.readouterr().out
    assert f'train_rl --reward={tmp_path}/run' in printed
    assert 'sample reply' not in printed


def test_a_stopped_run_resumes_bit_for_bit(run_here, base, pairs, judge, tmp_path):
    flags = (f'--out_dir={tmp_path}/run', *learning(base, pairs))
    run_here(*flags, '--max_iters=10', '--lr_decay_iters=30')
    run_here(*flags, '--init_from=resume')
    ends = [hashes(find_checkpoint(where, 'last')) for where in (judge, tmp_path / 'run')]
    assert ends[0] == ends[1]


@pytest.mark.parametrize('shard', [False, True])
def test_two_processes_learn_as_one(two_ranks, base, pairs, judge, tmp_path, shard):
    two_ranks(f'--out_dir={tmp_path}/two', *learning(base, pairs), f'--shard={shard}')
    for key in ('loss', 'val_loss', 'val_reward_margin'):
        one, two = metrics(judge, key), metrics(tmp_path / 'two', key)
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-3, abs=1e-4), key


# -----------------------------------------------------------------------------
# what it can be used for


def test_the_export_gives_the_same_scores_and_is_read_back(tmp_path, judge):
    from transformers import AutoModelForSequenceClassification

    checkpoint_command(['export', str(judge), str(tmp_path / 'out')])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'out').eval()
    sequences = [[72, 105, 256], [65, 66, 67, 68]]
    with torch.no_grad():
        found = [theirs(torch.tensor([ids])).logits.item() for ids in sequences]
    ours = RewardModel(str(judge), BYTES, RUNTIME, 32)(sequences)
    assert found == pytest.approx(ours, abs=1e-5)
    assert RewardModel(str(tmp_path / 'out'), BYTES, RUNTIME, 32)(sequences) == pytest.approx(ours)


@error_line('labels; give one with num_labels=1')
def test_a_classifier_is_no_reward_model(tmp_path):
    folder = tmp_path / 'out'
    export_transformers(reward_model(), BYTES, {}, folder)
    config = json.loads((folder / 'config.json').read_text())
    for labels in (2, 1):
        (folder / 'config.json').write_text(json.dumps(config | {'num_labels': labels}))
        if labels == 2:
            assert 'with 2 labels' in refused(lambda: load_reward_model(str(folder)))
    load_reward_model(str(folder))


@error_line('transformers has no class for a reward model of NanoChat')
def test_a_modern_one_has_no_class_in_transformers(tmp_path):
    model = reward_model(arch='modern', n_layer=1, n_head=2, n_embd=32)
    with pytest.raises(CheckpointError, match='arch=gpt2'):
        export_transformers(model, BYTES, {}, tmp_path / 'out')
    export_transformers(reward_model(), BYTES, {}, tmp_path / 'out')


def test_the_checks_know_that_it_cannot_write(run_here, base, asked, judge, capsys):
    flags = rewarded(base, asked, judge)
    for flag in ('--check', '--plan'):
        assert run_here(*flags, f'--init_from={judge}', flag) == 2
        assert f'{judge} is a reward model' in capsys.readouterr().out
        assert run_here(*flags, flag) == 0


@error_line('is a reward model, which cannot generate text')
def test_it_cannot_write(tmp_path, judge, base):
    gguf = ['export', str(judge), str(tmp_path / 'x.gguf'), '--format=gguf']
    for call in (lambda: load_model(judge), lambda: checkpoint_command(gguf)):
        assert 'is a reward model' in refused(call)
    load_model(base)


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp('asked')
    path = write(folder / 'asked.jsonl', [{'prompt': prompt} for prompt, *_ in PAIRS] * 4)
    prompts.main([path, '--tokenizer=byte', f'--out_dir={folder / "asked"}'])
    return folder / 'asked'


def rewarded(base, asked, judge):
    return (
        f'--init_from={base}', f'--dataset={asked}', '--objective=rl', f'--reward={judge}',
        '--rl_samples=4', '--rl_tokens=6', '--batch_size=4', '--gradient_accumulation_steps=2',
        '--eval_iters=None', '--eval_interval=10', '--max_iters=20', '--learning_rate=3e-3',
        '--lr_schedule=constant', '--lr_decay_iters=None', '--block_size=96', '--rl_kl=0.01',
    )  # fmt: skip


def test_reinforcement_learning_raises_the_score(run_here, base, asked, judge, tmp_path):
    flags = rewarded(base, asked, judge)
    run_here(f'--out_dir={tmp_path}/run', *flags)
    reward = metrics(tmp_path / 'run', 'val_reward')
    assert reward[20] > reward[0]
    assert run_here(*flags, '--check') == 0


@error_line(
    'is not a reward model',
    'uses the {} tokenizer, and the model that it scores',
    'has a context of {} tokens',
)
def test_a_reward_model_that_does_not_fit_is_one_line(
    run_here, base, asked, judge, tmp_path, capsys
):
    other = saved(tmp_path / 'other', char_tokenizer([chr(300 + n) for n in range(257)]))
    letters = char_tokenizer([chr(300 + n) for n in range(257)])
    with pytest.raises(ConfigError, match='is not a reward model'):
        RewardModel(str(other), letters, RUNTIME, 8)
    with pytest.raises(ConfigError, match='tokenizer'):
        RewardModel(str(judge), letters, RUNTIME, 8)
    with pytest.raises(ConfigError, match=f'context of {CONTEXT} tokens'):
        RewardModel(str(judge), BYTES, RUNTIME, CONTEXT + 1)
    RewardModel(str(judge), BYTES, RUNTIME, CONTEXT)
    flags = rewarded(base, asked, judge)
    assert run_here(*flags, '--rl_tokens=81', '--check') == 2
    assert 'no       reward: ' in capsys.readouterr().out
    with pytest.raises(ConfigError, match='is not a reward model'):
        run_here(*flags, f'--reward={base}', f'--out_dir={tmp_path}/run')
    assert not (tmp_path / 'run').exists()
