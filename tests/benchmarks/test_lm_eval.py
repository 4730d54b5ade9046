"""Benchmarks: the harness's own numbers item by item, its tasks and ours, and one-line errors."""

import importlib.util
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benches import refused, settings
from error_lines import case, error_line

import bench
from flatgpt.checkpoint import load as load_module
from flatgpt.checkpoint import save
from flatgpt.checkpoint.convert import export_transformers
from flatgpt.data.tokenizer import byte_tokenizer, char_tokenizer
from flatgpt.errors import UserError
from model import GPT, GPTConfig

pytest.importorskip('lm_eval', reason='lm_eval is not installed')
import datasets
from lm_eval import evaluator, utils
from lm_eval.tasks import TaskManager

from flatgpt import benchmarks
from flatgpt.benchmarks import lm_eval, scoring

SIZE = 32  # of the models' context
KINDS = {
    'choice': """
output_type: multiple_choice
doc_to_text: "{{beginning}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    'word': """
output_type: loglikelihood
doc_to_text: "{{beginning}}"
doc_to_target: " {{choices[right]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    'text': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    'written': """
output_type: generate_until
doc_to_text: "Then: {{beginning}}"
doc_to_target: "x"
generation_kwargs: {until: ["e", "zz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
DOCS = [  # some longer than the context, one with an empty beginning, some with tokens in common
    {
        'beginning': f'After {"the very " * i}cat {i}' if i else '',
        'choices': ['sat', 'sang', 'sat on the mat'][: 2 + i % 2],
        'right': i % 2,
        'text': f'Page {i}. ' + 'One word, and another; é. ' * i,
    }
    for i in range(7)
]


def own(tokenizer, arch='gpt2', **changes):
    """A model with clear preferences."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(SIZE, tokenizer.vocab_size, 2, 4, 32, arch=arch, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A task file of each kind, with its data beside it."""
    folder = tmp_path_factory.mktemp('tasks')
    lines = [json.dumps(doc) + '\n' for doc in DOCS]
    (folder / 'docs.jsonl').write_text(''.join(lines), encoding='utf-8')
    for kind, body in KINDS.items():
        kept = json.dumps({'data_files': {'test': str(folder / 'docs.jsonl')}})
        data = f'dataset_path: json\ndataset_kwargs: {kept[:-1]}, "cache_dir": "{folder}/cache"}}\n'
        text = f'task: own_{kind}\ntest_split: test\n{data}{body}'
        (folder / f'{kind}.yaml').write_text(text, encoding='utf-8')
    return folder


@pytest.fixture(scope='module', autouse=True)
def quiet_harness():
    lm_eval.set_up_harness()


@pytest.fixture(scope='module')
def every_task():
    """The usual tasks: looking through all fifteen thousand task files takes seconds."""
    return lm_eval.task_index(['lambada'])


@pytest.fixture
def known(monkeypatch, every_task):
    monkeypatch.setattr(lm_eval, 'task_index', lambda names: every_task)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a run."""
    folder, tokenizer = tmp_path_factory.mktemp('runs') / 'run', byte_tokenizer()
    state = {'step': 1, 'evaluated': False}
    save.save_checkpoint(folder, own(tokenizer), [], tokenizer, state, keep_evaluated=False)
    return folder


def task(files, kind):
    return lm_eval.load_task(str(files / f'{kind}.yaml'), TaskManager(include_defaults=False))


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


# -----------------------------------------------------------------------------
# the numbers


@pytest.fixture(scope='module', params=['gpt2', 'modern'])
def both(request, tmp_path_factory):
    """A model as the harness sees it through us, and its export through the harness's own class."""
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    pytest.importorskip('transformers', reason='transformers is not installed')
    from lm_eval.models.huggingface import HFLM

    folder, tokenizer = tmp_path_factory.mktemp('exports') / request.param, byte_tokenizer()
    model = own(tokenizer, request.param)
    export_transformers(model, tokenizer, {}, folder)
    theirs = HFLM(str(folder), device='cpu', batch_size=3, dtype='float32')
    return lm_eval.Scorer(model, tokenizer), theirs


@pytest.mark.parametrize('kind', KINDS)
def test_every_item_scores_as_by_the_harness_own_model_on_the_export(files, both, kind):
    found = [evaluator.evaluate(lm, task(files, kind), bootstrap_iters=0) for lm in both]
    ours, theirs = (each['samples'][f'own_{kind}'] for each in found)
    assert len(ours) == len(DOCS)
    for a, b in zip(ours, theirs, strict=True):
        assert a['doc'] == b['doc']
        for x, y in zip(flat(a['resps']), flat(b['resps']), strict=True):
            assert x == (pytest.approx(y, abs=1e-4) if isinstance(y, float) else y)
    a, b = (lm_eval.metrics_of('own', each['results'][f'own_{kind}'], []) for each in found)
    assert {m: v['value'] for m, v in a.items()} == {
        m: pytest.approx(v['value'], rel=1e-4) for m, v in b.items()
    }
    assert len({str(a['resps']) for a in ours}) > 3, 'the items do not differ'


def flat(values):
    for value in values:
        yield from flat(value) if isinstance(value, (list, tuple)) else [value]


def test_windows_are_those_of_the_harness():
    tokens = list(range(50))
    for length in (1, 2, 7, 8, 9, 16, 17, 50):
        theirs = utils.get_rolling_token_windows(tokens[:length], -1, 8, 1)
        theirs = [(tuple(given), wanted) for given, wanted in theirs]
        assert list(scoring.windows([-1], tokens[:length], 8)) == theirs
    assert list(scoring.windows([-1], [], 8)) == []


def test_context_is_cut_on_the_left_and_a_long_continuation_spans_windows():
    context, answer = list(range(10)), list(range(100, 103))
    assert list(scoring.windows(context, answer, 4)) == [((8, 9, 100, 101), answer)]
    answer = list(range(100, 110))
    parts = list(scoring.windows(context, answer, 4))
    assert [token for _, wanted in parts for token in wanted] == answer
    assert all(len(given) == 4 for given, _ in parts)


@torch.no_grad()
def test_a_continuation_longer_than_the_context_is_scored_in_windows():
    tokenizer = byte_tokenizer()
    model = own(tokenizer)
    lm = lm_eval.Scorer(model, tokenizer)
    text = 'a line that is far longer than thirty-two bytes, which is all there is'
    ids = tokenizer.encode('So: ' + text).tolist()
    expected = 0.0
    for given, wanted in scoring.windows(ids[:3], ids[3:], SIZE):
        logprobs = model(torch.tensor([given]))[0][0].log_softmax(-1)
        expected += sum(logprobs[i - len(wanted), w].item() for i, w in enumerate(wanted))
    assert lm.loglikelihood(asked(('So:', ' ' + text)))[0][0] == pytest.approx(expected, abs=1e-4)
    assert lm.truncated == 1


def test_scores_are_the_same_in_batches_of_any_size_and_again(files, monkeypatch):
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    requests = asked(*[(doc['beginning'], ' ' + word) for doc in DOCS for word in doc['choices']])
    texts = asked(*[(doc['text'],) for doc in DOCS])
    together = lm.loglikelihood(requests), lm.loglikelihood_rolling(texts)
    assert together == (lm.loglikelihood(requests), lm.loglikelihood_rolling(texts))
    monkeypatch.setattr(scoring, 'BATCH_TOKENS', 1)
    monkeypatch.setattr(scoring, 'LOGITS_CHUNK', 3)
    alone = lm.loglikelihood(requests), lm.loglikelihood_rolling(texts)
    for a, b in zip(flat(together), flat(alone), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_batches_are_of_like_length_and_keep_within_their_size(monkeypatch):
    monkeypatch.setattr(scoring, 'BATCH_TOKENS', 10)
    rows = ['a' * n for n in (1, 12, 3, 3, 5, 2)]
    assert [list(map(len, batch)) for batch in scoring.batch_by_length(rows)] == [
        [12],
        [5, 3],
        [3, 2, 1],
    ]


def test_words_of_one_token_after_the_same_text_are_computed_once(monkeypatch):
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    seen = []
    monkeypatch.setattr(scoring, 'pad', lambda batch, device: seen.extend(batch) or pad(batch))
    pad = lambda batch: (torch.tensor(batch), None)  # noqa: E731
    scores = lm.loglikelihood(asked(('Answer:', 'A'), ('Answer:', 'B'), ('Answer:', 'C')))
    assert len(seen) == 1
    assert len({logprob for logprob, _ in scores}) == 3


def test_a_context_of_spaces_is_scored_as_part_of_the_continuation():
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    spaced, plain = lm.loglikelihood(asked(('  ', 'word'), ('', '  word')))
    assert spaced == plain


@error_line('has an empty prompt, for which this')
@torch.no_grad()
def test_a_vocabulary_without_an_end_of_text_begins_with_the_first_token():
    tokenizer = char_tokenizer(list('abc'))
    model = own(tokenizer)
    lm = lm_eval.Scorer(model, tokenizer)
    logprobs = model(torch.tensor([[2, 0]]))[0][0].log_softmax(-1)
    expected = (logprobs[0, 0] + logprobs[1, 1]).item()
    assert lm.loglikelihood_rolling(asked(('cab',), ('c',), ('',))) == [
        pytest.approx(expected, abs=1e-5),
        0.0,
        0.0,
    ]
    assert lm.loglikelihood(asked(('', 'cab')))[0][0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match='empty prompt'):
        lm.generate_until(asked(('', {'until': []})))
    tokenizer = byte_tokenizer()  # one with an end-of-text token, as the error advises
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    assert len(lm.generate_until(asked(('', {'until': [], 'max_gen_toks': 2})))) == 1


def test_broken_weights_are_one_line():
    tokenizer = byte_tokenizer()
    model = own(tokenizer)
    torch.nn.init.constant_(model.trunk.ln_f.weight, math.nan)
    with pytest.raises(UserError, match='the logits are not finite'):
        lm_eval.Scorer(model, tokenizer).loglikelihood(asked(('a', 'b')))


def test_sampled_text_depends_on_its_place_and_the_seed_alone(monkeypatch):
    tokenizer = byte_tokenizer()
    model = own(tokenizer)
    how = {'until': [], 'max_gen_toks': 6, 'do_sample': True, 'temperature': 2.0, 'top_p': 0.9}
    requests = asked(*[('One' * i, how) for i in (3, 1, 1, 2)])
    texts = lm_eval.Scorer(model, tokenizer).generate_until(requests)
    assert texts[1] != texts[2]
    monkeypatch.setattr(scoring, 'BATCH_TOKENS', 1)
    assert lm_eval.Scorer(model, tokenizer).generate_until(requests) == texts
    assert lm_eval.Scorer(model, tokenizer, seed=2).generate_until(requests) != texts


def test_a_prompt_is_cut_to_leave_room_for_new_tokens():
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    assert len(lm.prompt('a' * 100, 12)) == SIZE - 12
    assert len(lm.prompt('a' * 100, 256)) == SIZE  # it slides
    assert lm.truncated == 2
    assert lm.prompt('', 12) == [tokenizer.eot]


@error_line('the generation setting {} is not')
def test_a_task_works_without_a_generation_setting_that_is_not_supported():
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    with pytest.raises(UserError, match='num_beams'):
        lm.generate_until(asked(('a', {'until': ['b'], 'num_beams': 4})))
    assert len(lm.generate_until(asked(('a', {'until': ['b'], 'max_gen_toks': 2})))) == 1


# -----------------------------------------------------------------------------
# the tasks of ours, and what is made of the results


def test_the_childrens_book_test_puts_each_word_into_the_gap():
    spec = importlib.util.spec_from_file_location('cbt', lm_eval.TASKS_DIR / 'cbt.py')
    cbt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cbt)
    doc = {
        'sentences': [
            "`` Oh , I did n't know ! ''",
            "The king 's son -LRB- the tall one -RRB- left .",
        ],
        'question': "`` It was the XXXXX , '' said she .",
        'options': ['fox', 'king'],
        'answer': 'king',
    }
    before = '"Oh, I didn\'t know!" The king\'s son (the tall one) left. "It was the'
    assert cbt.context(doc) == before
    assert cbt.choices(doc) == [' fox," said she.', ' king," said she.']
    assert cbt.answer(doc) == 1
    first = {**doc, 'question': 'XXXXX left .'}
    assert (cbt.context(first) + cbt.choices(first)[0]).endswith(' left. fox left.')


HUB = {  # what stands there, in small
    'cam-cst/cbt': [
        {
            'sentences': ['It rained .'] * 20,
            'question': f'The XXXXX {i} ran .',
            'options': [w, 'ox'],
        }
        | {'answer': 'ox'}
        for i, w in enumerate(('hen', 'cow', 'dog'))
    ],
    'EleutherAI/wikitext_document_level': [
        {'page': ' = Title = \n A word of <unk> , @-@ and so on . \n' * i} for i in (1, 2, 3)
    ],
    'EleutherAI/lambada_openai': [{'text': f'he said {i} times no'} for i in range(4)],
    'nyu-mll/blimp': [{'sentence_good': 'Cats sit.', 'sentence_bad': 'Cats sits.'}] * 2,
    'Rowan/hellaswag': [
        {'ctx_a': 'A man sits.', 'ctx_b': 'he', 'activity_label': 'Roof', 'label': '1'}
        | {'endings': ['sings.', 'stands up [step] now.', 'is.', 'was.']}
    ]
    * 3,
}


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(path, name=None, **options):
        rows = datasets.Dataset.from_list(HUB[path])
        return datasets.DatasetDict({split: rows for split in ('train', 'validation', 'test')})

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)


@pytest.mark.usefixtures('hub')
def test_one_command_scores_a_run_beside_the_published_figures(run, tmp_path, capsys):
    path = tmp_path / 'found.json'
    names = 'lambada,hellaswag,wikitext2,wikitext103,cbt,blimp'
    bench.main(settings(f'--task={names}', f'--out_dir={run}', f'--json={path}', '--limit=2'))
    out = capsys.readouterr().out
    lines = {' '.join(line.split()[:2]): line for line in out.splitlines()}
    assert lines['lambada_openai perplexity'].split()[-5:] == [
        '2',
        '35.13',
        '15.60',
        '10.87',
        '8.6300',
    ]
    assert lines['cbt_cn acc'].split()[-4:] == ['0.8765', '0.9235', '0.9345', '0.9330']
    assert lines['wikitext103 word_perplexity'].split()[-4:] == ['37.50', '26.37', '22.05', '17.48']
    assert lines['blimp acc'].split()[-2:] == ['134', '0.8302']
    assert 'blimp_causative' not in out
    assert 'Radford et al. 2019' in out
    assert " right: 'no', chosen: " in out
    assert 'truncated on the left, to the context of the model: ' in out
    found = json.loads(path.read_text())
    entries = {entry['task']: entry for entry in found['results']}
    assert {'lambada_openai', 'hellaswag', 'cbt_cn', 'cbt_ne', 'blimp_causative'} < {*entries}
    assert len(entries) == 74
    for name in ('wikitext2', 'wikitext103'):
        score = entries[name]['metrics']['word_perplexity']
        assert score['value'] > 1
        assert score['stderr'] > 0
    assert entries['hellaswag']['metrics']['acc_norm']['published']['gpt2-xl'] == 0.5089
    assert entries['cbt_cn']['examples'] == 2
    assert found['machine']['lm_eval']
    again = tmp_path / 'again.json'
    bench.main(settings('--task=lambada,cbt', f'--out_dir={run}', f'--json={again}', '--limit=2'))
    for entry in json.loads(again.read_text())['results']:
        assert entry == entries[entry['task']]


@pytest.mark.usefixtures('hub')
def test_models_of_others_and_other_formats_are_scored_too(run, tmp_path, capsys):
    model, tokenizer, state = load_module.load_model(run)
    export_transformers(model, tokenizer, state, tmp_path / 'folder')
    scores = []
    for number, flags in enumerate(
        [
            [f'--out_dir={run}'],
            [f'--out_dir={tmp_path / "folder"}'],
            [f'--init_from={run}', '--checkpoint=last'],
            [f'--out_dir={run}', '--dtype=bfloat16'],
            [f'--out_dir={run}', '--quantize=int8'],
        ]
    ):
        path = tmp_path / f'{number}.json'
        bench.main(settings('--task=wikitext2', f'--json={path}', *flags))
        entry = json.loads(path.read_text())['results'][0]
        scores.append(entry['metrics']['bits_per_byte']['value'])
    assert scores[:3] == pytest.approx([scores[0]] * 3, rel=1e-6)
    for near in scores[3:]:
        assert near != scores[0]
        assert near == pytest.approx(scores[0], rel=0.05)


def test_mistakes_say_what_was_right_and_what_the_model_chose(files):
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    for kind in KINDS:
        entry = lm_eval.evaluate_task(lm, kind, task(files, kind), None)[-1]
        wrong = entry['mistakes']
        assert len(wrong) == (0 if kind == 'text' else lm_eval.MAX_MISTAKES)
        if kind == 'choice':
            for example in wrong:
                doc = next(d for d in DOCS if d['beginning'] == example['prompt'])
                assert example['right'].strip() == doc['choices'][doc['right']]
                assert example['chosen'].strip() in doc['choices']
                assert example['chosen'] != example['right']
                pair = asked(*[(example['prompt'], example[k]) for k in ('right', 'chosen')])
                (right, _), (chosen, _) = lm.loglikelihood(pair)
                assert chosen > right
        if kind == 'word':
            for example in wrong:
                assert example['chosen'] != example['right'] == example['right'].lower()


@pytest.mark.parametrize('metric', ['word_perplexity', 'bits_per_byte'])
def test_the_error_of_a_perplexity_is_that_of_resampling(metric):
    chance = np.random.default_rng(0)
    words = chance.integers(50, 400, 60)
    items = [(float(-3 * w + 40 * chance.normal()), int(w)) for w in words]

    def value(items):
        logprobs, words = np.array(items).T
        mean = -logprobs.sum() / words.sum()
        return math.exp(mean) if metric == 'word_perplexity' else mean / math.log(2)

    drawn = [value([items[i] for i in chance.integers(0, 60, 60)]) for _ in range(2000)]
    found = lm_eval.ratio_stderr(metric, value(items), items)
    assert found == pytest.approx(np.std(drawn), rel=0.1)
    assert lm_eval.ratio_stderr(metric, 1.0, items[:1]) is None
    assert lm_eval.ratio_stderr(metric, 1.0, [0.5, 1.0]) is None


def test_progress_is_lines_where_nobody_watches(monkeypatch, capsys):
    monkeypatch.setattr(lm_eval, 'PROGRESS_SECONDS', -1)
    monkeypatch.setattr(scoring, 'BATCH_TOKENS', 1)
    tokenizer = byte_tokenizer()
    lm = lm_eval.Scorer(own(tokenizer), tokenizer)
    lm.task = 'task'
    lm.loglikelihood(asked(('a', 'bc'), ('d', 'ef')))
    err = capsys.readouterr().err
    assert 'task: 50%, ETA 00:0' in err
    assert 'task: 100%, ETA 00:00' in err


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.usefixtures('known')
@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--task=lamada'], 'no such task; did you mean lambada?'),
        (['--task=lambada,'], 'task=: '),
        (['--task=nowhere.yaml'], 'nowhere.yaml: no such task file'),
        (['--task=lambada', '--limit=0'], 'limit=0: must be at least 1'),
        (['--task=lambada', '--only=data'], '--task and --only'),
        (['--task=lambada', '--json=nowhere/x.json'], 'json=nowhere'),
        (['--task=lambada', '--out_dir=nowhere'], 'nowhere: no such run directory'),
        (['--task=lambada', '--dtype=int4'], "dtype='int4'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(flags, line, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert line in refused(f'--out_dir={run}', *flags)
    assert not list(tmp_path.iterdir())


def test_all_tasks_are_looked_through_for_one_that_is_not_usual(monkeypatch):
    indexed = []

    class Index:
        all_tasks = ('lambada_openai',)

        def __init__(self, include_path, include_defaults=True):
            indexed.append(include_defaults)

    monkeypatch.setattr(lm_eval, 'TaskManager', Index)
    lm_eval.task_index(['lambada'])
    assert indexed == [False]
    lm_eval.task_index(['lambada', 'mmlu'])
    assert indexed == [False, False, True]


@pytest.mark.parametrize(
    'bad',
    [
        case('lm-evaluation-harness has no such task', 'lamada'),
        case('no such task file; check the path', 'choise.yaml'),
    ],
)
def test_the_advice_for_the_name_of_a_task_is_right(files, every_task, bad):
    with pytest.raises(UserError) as caught:
        lm_eval.check_tasks([bad], every_task)
    lm_eval.check_tasks([str(files / 'choice.yaml')], every_task)
    if bad == 'lamada':
        (name,) = re.findall(r'did you mean (\w+)\?', str(caught.value))
        lm_eval.check_tasks([name], every_task)


def test_a_model_without_a_tokenizer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_transformers(own(char_tokenizer(list('ab'))), None, {}, tmp_path / 'model')
    assert '--tokenizer=' in refused('--task=lambada', '--out_dir=model')
    assert not (tmp_path / 'bench.json').exists()


def test_a_character_the_vocabulary_lacks_is_one_line(tmp_path, hub, capsys):
    tokenizer = char_tokenizer(list('ab'))
    state = {'step': 1, 'evaluated': False}
    save.save_checkpoint(
        tmp_path / 'run', own(tokenizer), [], tokenizer, state, keep_evaluated=False
    )
    path = tmp_path / 'x.json'
    line = refused('--task=lambada', f'--out_dir={tmp_path / "run"}', f'--json={path}')
    assert "character 'h'" in line
    assert not path.exists()


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        case(
            'is downloaded once from the',
            ConnectionError('no\nnetwork'),
            r'task=lambada: cannot be loaded \(ConnectionError: no net',
        ),
        case(
            'task={}: needs pip install {}',
            ModuleNotFoundError("No module named 'x'", name='x'),
            'task=lambada: needs pip install x',
        ),
    ],
)
def test_a_task_that_cannot_be_loaded_is_loaded_once_what_it_lacks_is_there(files, error, line):
    loaded = task(files, 'choice')

    def load(names):
        assert names == ['lambada_openai']
        if lacking:
            raise error
        return loaded

    lacking = True

    with pytest.raises(UserError, match=line) as caught:
        lm_eval.load_task('lambada', SimpleNamespace(load=load))
    assert '\n' not in str(caught.value)
    lacking = False
    assert lm_eval.load_task('lambada', SimpleNamespace(load=load)) is loaded


def test_data_that_cannot_be_had_offline_ends_the_command_in_a_line(script, run, tmp_path):
    ran = script('bench.py', '--task=lambada', f'--out_dir={run}', cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stdout == ''
    *before, last = ran.stderr.strip().splitlines()
    assert last.startswith('error: task=lambada: cannot be loaded')
    assert 'EleutherAI/lambada_openai' in last
    assert all('parameters on cpu' in text for text in before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'flag',
    [
        case('executes model-generated code; choose', 'UNSAFE_CODE'),
        case('choose a task of text alone', 'MULTIMODAL'),
    ],
)
def test_tasks_that_run_code_or_show_pictures_are_refused_and_others_are_not(files, flag):
    loaded = task(files, 'choice')
    setattr(loaded['tasks']['own_choice'], flag, True)
    with pytest.raises(UserError, match='task=x: '):
        lm_eval.load_task('x', SimpleNamespace(load=lambda names: loaded))
    assert task(files, 'word')['tasks']


def test_without_the_harness_a_line_reports_what_to_install(monkeypatch, run, tmp_path):
    monkeypatch.delitem(sys.modules, 'flatgpt.benchmarks.lm_eval')
    monkeypatch.delattr(benchmarks, 'lm_eval')
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.chdir(tmp_path)
    assert 'needs pip install' in refused('--task=lambada', f'--out_dir={run}')


def test_what_was_measured_stays_if_a_later_task_fails(hub, run, tmp_path, monkeypatch):
    measure = lm_eval.evaluate_task

    def failing(lm, name, *rest):
        if name == 'cbt':
            raise KeyboardInterrupt
        return measure(lm, name, *rest)

    monkeypatch.setattr(lm_eval, 'evaluate_task', failing)
    path = tmp_path / 'found.json'
    with pytest.raises(KeyboardInterrupt):
        bench.main(settings('--task=lambada,cbt', f'--out_dir={run}', f'--json={path}'))
    assert [entry['task'] for entry in json.loads(path.read_text())['results']] == [
        'lambada_openai'
    ]


def test_the_harness_is_imported_for_its_tasks_alone(script):
    assert 'lm_eval' not in script('bench.py', '--help', python=['-X', 'importtime']).stderr
