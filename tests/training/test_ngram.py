"""Soft targets: the predictions of an n-gram model, and training toward them."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import hashes, make_dataset, metrics, random_model

from flatgpt.checkpoint.load import find_checkpoint, load_model
from flatgpt.data.dataset import Dataset, Writer
from flatgpt.data.mixture import open_data
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.training.loss import loss_of
from flatgpt.training.ngram import BACKOFF, NGramModel, max_order

SOFT = ('--ngram_order=3', '--ngram_decay=1', '--max_iters=6')


def text_dataset(folder, text, tokenizer=None, block_size=16):
    tokenizer = tokenizer or char_tokenizer(sorted(set(text)))
    with Writer(folder, tokenizer) as writer:
        writer.write('train', tokenizer.encode(text))
        writer.write('val', tokenizer.encode(text[:100]))
    return Dataset(folder, block_size)


def witten_bell(ids, context, vocab_size, order):
    """The formula, read from the text: the distribution after a context."""
    p = np.full(vocab_size, 1 / vocab_size)
    for length in range(min(order - 1, len(context)) + 1):
        key = tuple(context[len(context) - length :])
        # as the model counts: only n-grams of the whole order, by what they begin with
        grams = [tuple(ids[i : i + order]) for i in range(len(ids) - order + 1)]
        counts = Counter(gram[length] for gram in grams if gram[:length] == key)
        if counts:
            total, kinds = sum(counts.values()), BACKOFF * len(counts)
            seen = np.array([counts[token] for token in range(vocab_size)])
            p = (seen + kinds * p) / (total + kinds)
    return p


def test_predictions_follow_the_formula_in_seen_and_unseen_contexts(tmp_path):
    data = text_dataset(tmp_path, 'abracadabra arcade bar ' * 3 + 'cab drab bad card ab')
    ids, order = data.first_tokens(10**6), 4
    x = torch.from_numpy(np.random.default_rng(0).integers(data.vocab_size, size=(3, 9)))
    x[0] = torch.from_numpy(ids[5:14].astype(np.int64))
    predicted = NGramModel(data, order).predict(x)
    assert predicted.shape == (3, 9, data.vocab_size)
    for row, t in np.ndindex(3, 9):
        context = x[row, : t + 1].tolist()[-(order - 1) :]
        expected = witten_bell(ids.tolist(), context, data.vocab_size, order)
        assert predicted[row, t].numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('order', [1, 2, 5, 12])
@pytest.mark.parametrize('length', [1, 3, 16])
def test_predictions_are_distributions_whatever_the_order_and_the_length(dataset, order, length):
    data = Dataset(dataset, 16)
    p = NGramModel(data, order).predict(torch.from_numpy(data.batch(0, 4)[0][:, :length]))
    assert (p > 0).all()
    assert p.sum(-1).numpy() == pytest.approx(1.0, rel=1e-5)


def test_the_highest_order_does_not_overflow(tmp_path):
    tokenizer = byte_tokenizer()
    data = text_dataset(tmp_path, '\x7fz~' * 40, tokenizer)
    order = max_order(data.vocab_size)
    assert (order, max_order(50257), max_order(2), max_order(1)) == (7, 4, 63, 63)
    ngrams = NGramModel(data, order)
    assert all((level.keys >= 0).all() for level in ngrams.levels)
    last = ngrams.predict(torch.tensor([tokenizer.encode('\x7fz~\x7fz~').tolist()]))[0, -1]
    assert last.argmax() == ord('\x7f')


def test_a_text_shorter_than_an_n_gram_predicts_every_token_alike(tmp_path):
    data = text_dataset(tmp_path, 'abcd', block_size=1)
    assert NGramModel(data, 9).predict(torch.tensor([[0]])).tolist() == [[[0.25] * 4]]


def test_the_parts_of_a_mixture_are_counted_in_their_shares(tmp_path):
    tokenizer = char_tokenizer('ab')
    for name, text in (('a', 'a' * 1000), ('b', 'b' * 3000)):
        text_dataset(tmp_path / name, text, tokenizer)
    names = f'{tmp_path}/a:0.5,{tmp_path}/b:0.5'
    data = open_data(names, 16)
    p = NGramModel(data, 1).predict(torch.tensor([[0]]))[0, 0]
    assert p.tolist() == pytest.approx([0.5, 0.5])


def test_a_part_that_is_too_small_for_its_share_is_left_out(tmp_path):
    tokenizer = char_tokenizer('ab')
    for name, text in (('a', 'a' * 100), ('b', 'b' * 1000)):
        text_dataset(tmp_path / name, text, tokenizer)
    data = open_data(f'{tmp_path}/a:0.999,{tmp_path}/b:0.001', 16)
    assert NGramModel(data, 1).predict(torch.tensor([[0]]))[0, 0].argmax() == 0


def test_all_shards_are_counted(tmp_path):
    tokenizer = char_tokenizer('ab')
    with Writer(tmp_path, tokenizer, shard_tokens=50) as writer:
        writer.write('train', tokenizer.encode('a' * 50 + 'b' * 70))
        writer.write('val', tokenizer.encode('ab' * 20))
    data = Dataset(tmp_path, 16)
    assert data.first_tokens(80).tolist() == [0] * 50 + [1] * 30
    assert len(data.first_tokens(10**6)) == 120


def test_a_soft_target_that_is_certain_gives_the_loss_of_the_token():
    model = random_model(50)
    x = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(1))
    y = x.roll(-1, 1)
    certain = torch.nn.functional.one_hot(y, 40).float()  # fewer than a padded vocabulary
    assert loss_of(model, x, y, soft_targets=certain).item() == pytest.approx(
        loss_of(model, x, y).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ('decay', 'weights'),
    [(0, (1, 1, 1, 1)), (1, (1, 0.75, 0.5, 0.25)), (2, (1, 0.5625, 0.25, 0.0625))],
)
def test_the_weight_of_the_n_gram_model_decays_over_the_run(
    run_here, tmp_path, dataset, decay, weights
):
    still = ('--learning_rate=0', '--decay_lr=False', '--gradient_accumulation_steps=1')
    cut = ('--short_block_size=4', '--short_iters=2', '--max_iters=4')
    flags = ('--ngram_order=3', f'--ngram_decay={decay}')
    run_here(f'--out_dir={tmp_path}', *cut, *still, *flags)
    data, losses = Dataset(dataset, 16, seed=1337), []
    model, ngrams = load_model(tmp_path, 'last')[0], NGramModel(data, 3)
    for step, weight in enumerate(weights):
        x, y = map(torch.from_numpy, data.batch(4 * step, 4))
        width = 4 if step < 2 else 16
        x, y = x.view(-1, width), y.view(-1, width)
        soft = loss_of(model, x, soft_targets=ngrams.predict(x)).item()
        losses.append(weight * soft + (1 - weight) * loss_of(model, x, y).item())
    assert list(metrics(tmp_path).values()) == pytest.approx(losses, rel=1e-5)


def test_a_run_learns_more_with_it_and_its_validation_loss_is_that_of_the_tokens(
    run_here, tmp_path
):
    data = make_dataset(tmp_path / 'data', train=20000)
    args = (f'--dataset={data}', '--max_iters=60', '--eval_iters=None', '--learning_rate=0.01')
    args = (*args, '--eval_interval=None', '--decay_lr=False')
    for name, flags in (('plain', ()), ('soft', ('--ngram_order=4', '--ngram_decay=0'))):
        assert run_here(f'--out_dir={tmp_path}/{name}', *args, *flags) == 0
    losses = {name: metrics(tmp_path / name, 'val_loss')[60] for name in ('plain', 'soft')}
    assert losses['soft'] < losses['plain']
    model = load_model(tmp_path / 'soft', 'last')[0]
    text = Dataset(data, 16)
    x, y = map(torch.from_numpy, text.eval_batch('val', text.eval_starts('val')))
    with torch.no_grad():
        assert losses['soft'] == pytest.approx(model(x, y)[1].item(), rel=1e-5)


@pytest.mark.parametrize('more', [(), ('--optimizer=muon', '--arch=modern')])
def test_a_resumed_run_has_the_same_weights(run_here, tmp_path, more):
    args = (f'--out_dir={tmp_path}', *SOFT, '--save_interval=3', '--eval_interval=None')
    assert run_here(*args, *more) == 0
    last = find_checkpoint(tmp_path, 'last')
    whole = hashes(last)
    shutil.rmtree(last)
    assert run_here(*args, *more, '--init_from=resume') == 0
    assert hashes(last) == whole


def test_two_ranks_train_as_one(two_ranks, run_here, tmp_path):
    args = ('--gradient_accumulation_steps=2', *SOFT)
    two_ranks(f'--out_dir={tmp_path}/two', *args)
    assert run_here(f'--out_dir={tmp_path}/one', *args) == 0
    two, one = (list(metrics(tmp_path / name).values()) for name in ('two', 'one'))
    assert two == pytest.approx(one, rel=1e-5)
