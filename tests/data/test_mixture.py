"""Several datasets mixed by weights, and trained on as one."""

import itertools

import numpy as np
import pytest
import torch
from conftest import hashes, make_dataset, metrics, refused

from flatgpt.checkpoint.load import find_checkpoint, load_model
from flatgpt.data.dataset import FIRST, TARGET, Dataset, Writer
from flatgpt.data.mixture import SHARE_BLOCK, Mixture, open_data, quotas_of
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer

CHARS = char_tokenizer([chr(0x4E00 + i) for i in range(20000)])
SIZES = {'long': (0, 6000), 'short': (7000, 7300), 'tiny': (9000, 9100)}  # ids from, to
WEIGHTS = {'long': 7, 'short': 2.5, 'tiny': 0.5}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Datasets whose ids identify the dataset and the position in it."""
    base = tmp_path_factory.mktemp('parts')
    for name, (begin, end) in SIZES.items():
        with Writer(base / name, CHARS, shard_tokens=300) as writer:
            writer.write('train', np.arange(begin, end))
            writer.write('val', np.arange(begin, begin + 50))
    return base


def setting(folders, weights=WEIGHTS):
    return ', '.join(f'{folders / name}:{weight}' for name, weight in weights.items())


@pytest.fixture
def mixture(folders):
    return open_data(setting(folders), 8)


def source_of(x):
    """The part that each row comes from."""
    ends = np.array([end for _, end in SIZES.values()])
    return np.searchsorted(ends, x[:, 0], side='right')


# -----------------------------------------------------------------------------
# batches


def test_every_thousand_samples_have_exactly_the_shares(mixture):
    for first in (0, SHARE_BLOCK, 10**9 * SHARE_BLOCK):
        x, y = mixture.batch(first, SHARE_BLOCK)
        assert np.bincount(source_of(x)).tolist() == [700, 250, 50]
        assert np.array_equal(y, x + 1)


def test_the_parts_are_shuffled_differently_in_each_thousand(mixture):
    orders = [source_of(mixture.batch(n * SHARE_BLOCK, SHARE_BLOCK)[0]) for n in range(3)]
    assert not np.array_equal(orders[0], orders[1])
    for order in orders:
        tens = order.reshape(10, 100)
        assert ((tens == 0).sum(1) > 50).all()
        assert ((tens == 0).sum(1) < 90).all()


@pytest.mark.parametrize('weights', [[1, 1, 1], [0.7, 0.3], [1e-3, 1], [3, 3, 1, 1, 1, 1, 1]])
def test_quotas_are_the_nearest_integers(weights):
    quotas = np.array(quotas_of(weights))
    assert quotas.sum() == SHARE_BLOCK
    assert (abs(quotas - np.array(weights) / sum(weights) * SHARE_BLOCK) < 1).all()


def test_the_samples_of_a_part_keep_their_order(mixture, folders):
    x, y = mixture.batch(0, 2500)
    for number, name in enumerate(SIZES):
        rows = source_of(x) == number
        alone = Dataset(folders / name, 8).batch(0, int(rows.sum()))
        assert np.array_equal(x[rows], alone[0])
        assert np.array_equal(y[rows], alone[1])


@pytest.mark.parametrize('world_size', [1, 2, 3, 5])
def test_every_world_size_trains_on_the_same_batches_of_a_mixture(mixture, world_size):
    rows = 60
    for step in range(15, 20):  # past the first thousand
        x, y = mixture.batch(step * rows, rows)
        ends = [rank * rows // world_size for rank in range(world_size + 1)]
        parts = [mixture.batch(step * rows + a, b - a) for a, b in itertools.pairwise(ends)]
        assert np.array_equal(x, np.concatenate([part[0] for part in parts]))
        assert np.array_equal(y, np.concatenate([part[1] for part in parts]))


def test_batches_of_a_mixture_do_not_depend_on_earlier_calls(mixture, folders):
    ids = [7, 100000, 999, 7, 0, 12345678901]
    batches = [mixture.batch(i, 4)[0] for i in ids]
    for i, x in reversed(list(zip(ids, batches, strict=True))):
        assert np.array_equal(open_data(setting(folders), 8).batch(i, 4)[0], x)
        assert np.array_equal(mixture.batch(i, 4)[0], x)


def test_an_epoch_ends_when_every_part_has_completed_one(mixture):
    def seen(samples):
        x, _ = mixture.batch(0, samples)
        rows = source_of(x)
        each = [len(np.unique(x[rows == number][:, 0])) for number in range(3)]
        return [n >= part.n_windows for n, (_, part) in zip(each, mixture.parts, strict=True)]

    # a window of a later epoch begins elsewhere, so only the slowest part is counted here
    slowest = max(
        range(3), key=lambda k: mixture._samples_until(k, mixture.parts[k].data.n_windows)
    )
    assert seen(mixture.n_windows)[slowest]
    assert not seen(mixture.n_windows - 1)[slowest]


def test_the_seed_changes_the_order_of_the_parts(folders):
    orders = [source_of(open_data(setting(folders), 8, s).batch(0, 200)[0]) for s in (1, 2)]
    assert not np.array_equal(*orders)


def test_a_mixture_changes_its_fingerprint_with_weights_and_parts(folders):
    prints = [
        open_data(setting(folders, weights), 8).fingerprint
        for weights in (
            WEIGHTS,
            {**WEIGHTS, 'tiny': 1},
            {'long': 7, 'short': 3},
            {'short': 1, 'tiny': 1},
        )
    ]
    assert len(set(prints)) == 4
    assert (
        open_data(setting(folders, {'long': 70, 'short': 25, 'tiny': 5}), 8).fingerprint
        == prints[0]
    )


# -----------------------------------------------------------------------------
# training


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    base = tmp_path_factory.mktemp('texts')
    for seed, name in enumerate(('words', 'other')):
        make_dataset(base / name, byte_tokenizer(), seed=seed, val=300)
    rng = np.random.default_rng(0)
    with Writer(base / 'noise', byte_tokenizer()) as writer:
        for split in ('train', 'val'):
            writer.write(split, rng.integers(0, 256, 1000))
    return base


def test_a_mixture_is_evaluated_part_by_part_and_by_its_shares(run_here, tmp_path, texts, capsys):
    mixed = f'--dataset={texts / "words"}:3,{texts / "noise"}:1'
    args = ('--eval_iters=None', '--eval_interval=10', '--max_iters=10', '--sample_tokens=5')
    run_here(f'--out_dir={tmp_path}', mixed, *args)
    out = capsys.readouterr().out
    assert 'data: 75.0% words, 25.0% noise' in out
    model, expected = load_model(tmp_path, 'last')[0], {}
    for name in ('words', 'noise'):
        data = Dataset(texts / name, 16)
        batch = data.eval_batch('val', data.eval_starts('val'))
        with torch.no_grad():
            expected[name] = model(*map(torch.from_numpy, batch))[1].item()
        assert metrics(tmp_path, f'val_loss_on_{name}')[10] == pytest.approx(
            expected[name], rel=1e-5
        )
        assert f'on {name} {expected[name]:.3f}' in out
    whole = 0.75 * expected['words'] + 0.25 * expected['noise']
    assert expected['noise'] > expected['words'] + 0.5
    assert metrics(tmp_path, 'val_loss')[10] == pytest.approx(whole, rel=1e-5)
    # a byte of words is a token; half of noise's bytes are no text, and count as they are written
    bits = metrics(tmp_path, 'val_bpb')[10] * np.log(2)
    assert bits == pytest.approx(whole, rel=1e-4)


def test_a_mixture_is_resumed_where_it_stopped(run_here, tmp_path, texts):
    mixed = f'--dataset={texts / "words"}:0.6,{texts / "other"}:0.4'
    args = (mixed, '--eval_train=False', '--eval_interval=3', '--decay_lr=False')
    run_here(f'--out_dir={tmp_path}/whole', *args, '--max_iters=6')
    run_here(f'--out_dir={tmp_path}/parts', *args, '--max_iters=3')
    run_here(f'--out_dir={tmp_path}/parts', *args, '--init_from=resume', '--max_iters=6')
    assert hashes(find_checkpoint(tmp_path / 'whole', 'last')) == hashes(
        find_checkpoint(tmp_path / 'parts', 'last')
    )


def test_a_changed_weight_is_reported_when_a_run_is_resumed(run_here, tmp_path, texts, capsys):
    parts = '{0}/words:{1},{0}/other:0.4'
    run_here(f'--out_dir={tmp_path}', f'--dataset={parts.format(texts, 0.6)}')
    again = ('--init_from=resume', f'--dataset={parts.format(texts, 0.7)}', '--max_iters=5')
    run_here(f'--out_dir={tmp_path}', *again)
    assert 'has changed since' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ('text', 'problem'),
    [
        ('long:0.5,short', "'short' needs a name and a weight"),
        ('long:0.5,short:', "'short:' needs"),
        ('long:0.5,:0.5', "':0.5' needs"),
        ('long:0.5,short:x', "'short:x' needs"),
        ('long:0.5,short:0', "'short:0' needs"),
        ('long:0.5,short:-1', "'short:-1' needs"),
        ('long:0.5,short:nan', "'short:nan' needs"),
        ('long:0.5,short:inf', "'short:inf' needs"),
        ('long:0.5,', "'' needs"),
        ('long:0.5,long:0.5', 'long is listed twice'),
        ('./nowhere:0.5,./short:1', './nowhere: no such folder'),
        ('shakespere_char:0.5,pydocs:1', 'did you mean shakespeare_char'),
        ('./long:1,./short:0.0001', 'short: its weight is below 1/1000'),
        ('./long:1,./sub/long:1', 'another dataset of the mixture is also called long'),
    ],
)
def test_a_mistake_in_a_mixture_is_one_line(folders, monkeypatch, text, problem):
    monkeypatch.chdir(folders)
    if 'sub' in text and not (folders / 'sub').exists():
        with Writer(folders / 'sub' / 'long', CHARS) as writer:
            writer.write('train', np.arange(50))
            writer.write('val', np.arange(50))
    assert problem in refused(open_data, text, 8)


def test_parts_with_different_tokenizers_are_both_reported(folders, texts):
    message = refused(open_data, f'{folders / "long"}:1,{texts / "words"}:1', 8)
    for text in ('long', 'words', 'uses the tokenizer byte', 'char'):
        assert text in message


def rows_of(folder, length, tokenizer=None, pairs=False):
    rows = {'length': length, 'pairs': pairs}
    with Writer(folder, tokenizer or byte_tokenizer(), rows=rows) as writer:
        for split in ('train', 'val'):
            ids = np.arange(length * 4) % 100
            flags = np.where(np.arange(len(ids)) % length == 0, FIRST, TARGET)
            writer.write(split, ids, flags.astype(np.uint8))
    return folder


def test_parts_of_another_kind_are_refused(tmp_path, texts):
    talks, text = rows_of(tmp_path / 'talks', 16), texts / 'words'
    for objective in ('lm', 'sft'):
        message = refused(open_data, f'{talks}:1,{text}:1', 16, objective=objective)
        assert f"objective='{objective}' needs" in message
    pairs = rows_of(tmp_path / 'pairs', 16, pairs=True)
    assert 'does not support mixtures' in refused(
        open_data, f'{pairs}:1,{pairs}:2', 16, objective='dpo'
    )


def test_conversations_can_be_mixed_if_their_rows_have_the_same_length(tmp_path):
    for name, length in (('a', 16), ('b', 16), ('c', 12)):
        rows_of(tmp_path / name, length)
    mixture = open_data(f'{tmp_path}/a:1,{tmp_path}/b:1', 64, objective='sft')
    assert isinstance(mixture, Mixture)
    assert mixture.block_size == 16
    assert mixture.window_tokens == 16
    assert mixture.count_targets(3, 100) == (mixture.batch(3, 100)[1] >= 0).sum()
    assert mixture.batch(3, 100, documents=True)[2].shape == (100, 16)
    message = refused(open_data, f'{tmp_path}/a:1,{tmp_path}/c:1', 64, objective='sft')
    assert 'packed sequences of 12 tokens' in message
    assert 'of 16' in message


def test_different_chat_templates_are_refused(tmp_path):
    for name in 'ab':
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {'user': [name, ''], 'assistant': ['', '']}
        rows_of(tmp_path / name, 16, tokenizer)
    message = refused(open_data, f'{tmp_path}/a:1,{tmp_path}/b:1', 16, objective='sft')
    assert 'chat templates' in message


def test_a_folder_with_a_comma_in_its_name_is_not_a_mixture(tmp_path):
    make_dataset(tmp_path / 'a,b:1')
    assert isinstance(open_data(str(tmp_path / 'a,b:1'), 8), Dataset)
