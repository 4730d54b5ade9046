"""The SFT and DPO losses, compared with the formula and with TRL."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import random_model

from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data import chat as prepare
from flatgpt.data.dataset import TARGET, Dataset, mask_file
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.training.loss import completion_logps, compute_metrics, dpo_loss, loss_of, trim_padding

BETA = 0.3
TALKS = [
    [('user', 'Hi'), ('assistant', 'Hello!')],
    [('user', 'A fish?'), ('assistant', 'Trout.'), ('user', 'More'), ('assistant', 'Eel, carp.')],
    [('system', 'Be brief.'), ('user', 'Two and two?'), ('assistant', 'Four')],
    [('user', 'Why?'), ('assistant', '.')],
]
PAIRS = [('Hi', 'Hello, you!', 'What'), ('A fish?', 'Eel', 'A cow, I think.'), ('2+2', '4', '5')]


def prepared(folder, lines, *flags):
    (folder / 'lines.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    command = [str(folder / 'lines.jsonl'), f'--out_dir={folder / "data"}', '--tokenizer=byte']
    (folder / 'again.jsonl').write_bytes((folder / 'lines.jsonl').read_bytes())
    prepare.main([*command, f'--val={folder / "again.jsonl"}', *flags])
    return folder / 'data'


@pytest.fixture(scope='module')
def talks(tmp_path_factory):
    lines = [[{'role': role, 'content': text} for role, text in talk] for talk in TALKS]
    folder = prepared(tmp_path_factory.mktemp('talks'), lines, '--block_size=96')
    return Dataset(folder, 96, objective='sft')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    lines = [dict(zip(('prompt', 'chosen', 'rejected'), pair, strict=True)) for pair in PAIRS]
    folder = prepared(tmp_path_factory.mktemp('pairs'), lines, '--block_size=96')
    return Dataset(folder, 96, objective='dpo')


@pytest.fixture(scope='module')
def models():
    """A model and the one it began as, a little different."""
    changed, initial = random_model(257, 96), random_model(257, 96)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return changed, initial


def whole_split(data, split='val'):
    return [torch.from_numpy(part) for part in data.eval_batch(split, data.eval_starts(split))]


# -----------------------------------------------------------------------------
# by the formula


def test_the_loss_on_conversations_is_the_mean_over_what_the_assistant_says(talks, models):
    x, y = whole_split(talks)
    logits = models[0](x)[0].log_softmax(-1)
    spoken = [-logits[b, t, y[b, t]] for b, t in torch.nonzero(y >= 0).tolist()]
    assert len(spoken) == sum(
        len(text) + 1 for talk in TALKS for role, text in talk if role == 'assistant'
    )
    with torch.no_grad():
        assert loss_of(models[0], x, y).item() == pytest.approx(torch.stack(spoken).mean().item())


@torch.no_grad()
def test_the_loss_on_pairs_is_equation_7_of_the_paper(pairs, models):
    x, y = whole_split(pairs)
    expected, margins = [], []
    for row in range(0, len(x), 2):
        ratios = []
        for better_or_worse in (row, row + 1):
            said = [t for t in range(x.size(1)) if y[better_or_worse, t] >= 0]
            p, p_reference = (
                math.prod(
                    model(x[[better_or_worse]])[0].double().softmax(-1)[0, t, y[better_or_worse, t]]
                    for t in said
                )
                for model in models
            )
            ratios.append(math.log(p / p_reference))
        margins.append(BETA * (ratios[0] - ratios[1]))
        expected.append(-math.log(1 / (1 + math.exp(-margins[-1]))))
    reference = completion_logps(models[1], x, y)
    loss = loss_of(models[0], x, y, reference, BETA).item()
    assert loss == pytest.approx(np.mean(expected), abs=1e-4)
    means, count = compute_metrics(models[0], x, y, reference, BETA)
    assert count == len(PAIRS)
    assert means[0] == loss
    assert means[1].item() == pytest.approx(np.mean(np.array(margins) > 0))
    assert means[2].item() == pytest.approx(np.mean(margins), abs=1e-4)


def test_a_model_that_has_not_moved_has_the_loss_of_a_coin():
    logps = torch.tensor([-3.0, -5.0, -2.0, -1.0])
    losses, margins = dpo_loss(logps, logps, BETA)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert margins.tolist() == [0, 0]


def test_the_better_answer_is_pushed_up_and_the_worse_down():
    logps = torch.zeros(4, requires_grad=True)
    dpo_loss(logps, torch.zeros(4), BETA)[0].mean().backward()
    assert logps.grad.tolist() == pytest.approx([-BETA / 4, BETA / 4] * 2)


@torch.no_grad()
def test_what_is_cut_off_behind_the_last_target_changes_nothing(pairs, models):
    x, y = pairs.eval_batch('val', pairs.eval_starts('val')[:1])
    short = [torch.from_numpy(part) for part in trim_padding(x, y, step=8)]
    assert short[0].size(1) % 8 == 0
    assert short[0].size(1) < x.shape[1]
    logps = completion_logps(models[0], torch.from_numpy(x), torch.from_numpy(y))
    assert torch.allclose(completion_logps(models[0], *short), logps, rtol=0, atol=1e-4)


# -----------------------------------------------------------------------------
# as TRL computes them

peers = pytest.mark.filterwarnings('ignore')  # those of others are theirs


def trl_loss(kind, folder, models, columns, **settings):
    """The evaluation loss of a TRL trainer, of all rows in one batch."""
    trl = pytest.importorskip('trl')
    datasets = pytest.importorskip('datasets')
    from transformers import AutoTokenizer, GPT2LMHeadModel

    theirs = []
    for name, model in zip(('changed', 'initial'), models, strict=True):
        export_transformers(model, byte_tokenizer(), {}, folder / name)
        theirs.append(GPT2LMHeadModel.from_pretrained(folder / name, dtype=torch.float32))
    words = AutoTokenizer.from_pretrained(folder / 'changed')
    words.pad_token = words.eos_token
    rows = datasets.Dataset.from_dict(columns)
    config = getattr(trl, f'{kind}Config')(
        output_dir=str(folder / 'out'),
        per_device_eval_batch_size=len(rows),
        bf16=False,
        use_cpu=True,
        report_to='none',
        max_length=96,
        disable_tqdm=True,
        **settings,
    )
    reference = {'ref_model': theirs[1]} if kind == 'DPO' else {}
    trainer = getattr(trl, f'{kind}Trainer')(
        model=theirs[0],
        args=config,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=words,
        **reference,
    )
    return trainer.evaluate()


@peers
def test_the_loss_on_conversations_is_that_of_trl(talks, models, tmp_path):
    ids = np.fromfile(talks.folder / 'val.bin', '<u2').reshape(-1, 96)
    flags = np.fromfile(talks.folder / mask_file('val.bin'), np.uint8).reshape(-1, 96)
    columns = {'input_ids': ids.tolist(), 'completion_mask': (flags & TARGET).tolist()}
    measured = trl_loss('SFT', tmp_path, models, columns, completion_only_loss=True)
    x, y = whole_split(talks)
    with torch.no_grad():
        loss = loss_of(models[0], x, y).item()
    assert loss == pytest.approx(measured['eval_loss'], abs=1e-5)


@peers
def test_the_loss_on_pairs_is_that_of_trl(pairs, models, tmp_path):
    before, after = prepare.TEMPLATE['user']
    asked = [f'{before}{prompt}{after}{prepare.TEMPLATE["assistant"][0]}' for prompt, *_ in PAIRS]
    columns = {
        'prompt': asked,
        'chosen': [better for _, better, _ in PAIRS],
        'rejected': [worse for *_, worse in PAIRS],
    }
    measured = trl_loss('DPO', tmp_path, models, columns, beta=BETA)
    x, y = whole_split(pairs)
    with torch.no_grad():
        reference = completion_logps(models[1], x, y)
        (loss, accuracy, margin), _ = compute_metrics(models[0], x, y, reference, BETA)
    assert loss.item() == pytest.approx(measured['eval_loss'], abs=1e-5)
    assert accuracy.item() == pytest.approx(measured['eval_rewards/accuracies'])
    assert margin.item() == pytest.approx(measured['eval_rewards/margins'], abs=1e-5)
