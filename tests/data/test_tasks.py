"""The datasets made for reinforcement learning: sums, and beginnings of film reviews."""

import os
import runpy

import pytest
from conftest import ROOT, metrics, saved
from error_lines import error_line

from flatgpt.data import arithmetic
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import get_tokenizer
from flatgpt.errors import UserError
from flatgpt.training.reward import load_reward

PREPARE = str(ROOT / 'data/imdb_prompts/prepare.py')
needs_gpt2 = pytest.mark.skipif(
    'TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR has the gpt2 vocabulary'
)


def prepared(name, folder):
    runpy.run_path(str(ROOT / 'data' / name / 'prepare.py'))['main']([f'--out_dir={folder}'])
    return folder


# -----------------------------------------------------------------------------
# sums


@pytest.fixture(scope='module')
def sums(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sums')
    solved = Dataset(prepared('arithmetic', folder / 'solved'), 128, objective='sft')
    asked = Dataset(prepared('arithmetic_prompts', folder / 'asked'), 128, objective='rl')
    return solved, asked


def test_the_answers_of_the_prompts_are_right_and_their_own_reward_says_so(sums):
    _, asked = sums
    reward = load_reward('exact')
    for prompt in asked.prompts('train', range(50)):
        a, b = prompt.record['prompt'].split('+')
        assert asked.tokenizer.decode(prompt.ids) == f'{a}+{b}='
        right, wrong = str(int(a) + int(b)), str(int(a) + int(b) + 1)
        assert reward(['', ''], [right, wrong], [prompt.record] * 2) == [1, 0]


def test_no_sum_is_solved_and_asked_and_both_hold_out_the_same(sums):
    solved, asked = sums
    lines = {}
    for split in ('train', 'val'):
        x, _ = solved.eval_batch(split, solved.eval_starts(split))
        texts = solved.tokenizer.decode(x.ravel().tolist()).split('<|endoftext|>')
        lines[split] = {text.strip('\0').partition('=')[0] for text in texts} - {''}
    count = {split: asked.tokens[split] // asked.stride for split in lines}
    prompts = {
        split: {p.record['prompt'] for p in asked.prompts(split, range(count[split]))}
        for split in lines
    }
    assert len(prompts['train']) == arithmetic.PROMPTS
    assert prompts['val'] == lines['val']
    assert len(lines['val']) == arithmetic.HELD_OUT
    assert len(lines['train']) == arithmetic.SOLVED
    assert not prompts['train'] & (lines['train'] | lines['val'])


# -----------------------------------------------------------------------------
# film reviews: prepared from a stand-in, and rewarded by one


@pytest.fixture
def reviews(tmp_path):
    """A folder like the download, with short and long reviews, and some that are for nothing."""
    pytest.importorskip('pyarrow.parquet')
    import pyarrow

    folder = tmp_path / 'plain_text'
    folder.mkdir()
    long = [f'Film {n} was a film of many words. ' * 8 for n in range(1100)]
    for name, texts in (('train', long), ('test', ['Short.']), ('unsupervised', ['No.' * 99])):
        table = pyarrow.table({'text': texts, 'label': [0] * len(texts)})
        pyarrow.parquet.write_table(table, folder / f'{name}-00000-of-00001.parquet')
    return tmp_path


@needs_gpt2
def test_prompts_are_the_first_tokens_of_long_reviews(reviews, tmp_path):
    main = runpy.run_path(PREPARE)['main']
    main([f'--source={reviews}', f'--out_dir={tmp_path / "out"}'])
    data = Dataset(tmp_path / 'out', 128, objective='rl')
    assert data.tokens['val'] // data.stride == 1024
    for prompt in data.prompts('train', range(76)):
        assert 2 <= len(prompt.ids) <= 8
        assert data.tokenizer.decode(prompt.ids) == prompt.record['prompt']
        assert prompt.record['prompt'].startswith('Film ')


@needs_gpt2
@error_line('reviews: too few')
def test_a_part_of_the_reviews_is_refused(reviews, tmp_path):
    main = runpy.run_path(PREPARE)
    main['beginnings'].__globals__['HELD_OUT'] = 1100
    with pytest.raises(UserError, match='1100 reviews'):
        main['main']([f'--source={reviews}', f'--out_dir={tmp_path / "out"}'])
    main['beginnings'].__globals__['HELD_OUT'] = 1024
    main['main']([f'--source={reviews}', f'--out_dir={tmp_path / "out"}'])


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """A tiny classifier of random weights in the format of the Hub."""
    transformers = pytest.importorskip('transformers')
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[UNK]': 0, '[PAD]': 1}, '[UNK]'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / 'classifier'
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token='[PAD]', unk_token='[UNK]', model_max_length=64
    ).save_pretrained(folder)
    config = transformers.DistilBertConfig(
        vocab_size=2, dim=16, n_heads=2, n_layers=1, hidden_dim=16, max_position_embeddings=64
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder)
    monkeypatch.setenv('SENTIMENT_MODEL', str(folder))
    return folder


@needs_gpt2
@pytest.mark.filterwarnings('ignore')
def test_the_experiment_runs_with_stand_ins(reviews, classifier, run_here, tmp_path, monkeypatch):
    main = runpy.run_path(PREPARE)['main']
    main([f'--source={reviews}', f'--out_dir={tmp_path / "prompts"}'])
    base = saved(tmp_path / 'base', get_tokenizer('gpt2'), block_size=64)
    monkeypatch.chdir(tmp_path)  # the reward's file is that of the clone
    run_here(
        f'--init_from={base}', f'--dataset={tmp_path / "prompts"}', f'--out_dir={tmp_path}/run',
        '--max_iters=2', '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=2',
        config=ROOT / 'config/rl_sentiment.py',
    )  # fmt: skip
    assert len(metrics(tmp_path / 'run', 'val_reward')) == 2
    assert metrics(tmp_path / 'run', 'val_kl')[2] >= 0
