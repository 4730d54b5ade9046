"""Conversations and preference pairs: preparing them, and fine-tuning on them."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT, WORDS, metrics, random_model, refused
from error_lines import error_line
from growth import check_growth

from flatgpt.checkpoint.convert import export_transformers
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.checkpoint.load import list_checkpoints, load_model
from flatgpt.data import chat as prepare
from flatgpt.data import text
from flatgpt.data.bpe import train_bpe
from flatgpt.data.dataset import FIRST, PADDING, TARGET, Dataset, mask_file
from flatgpt.data.hf_tokenizer import chat_jinja
from flatgpt.data.tokenizer import EOT, Tokenizer, char_tokenizer, get_tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer
from flatgpt.errors import UserError
from flatgpt.training import loss as loss_module

LETTERS = char_tokenizer(sorted({*'abcdefghijklmnopqrstuvwxyz .:\n', *'SUA'}), eot=True)
TEMPLATE = {'user': ['<', '>'], 'assistant': ['[', ']']}


def talk(*texts, system=None):
    """A conversation in which the user and the assistant alternate."""
    messages = [{'role': 'system', 'content': system}] if system else []
    roles = ('user', 'assistant')
    return messages + [{'role': roles[i % 2], 'content': words} for i, words in enumerate(texts)]


def lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    return path


def again(path):
    """A copy for validation: a file that is also given as --val is not trained on."""
    copy = path.with_name('again.jsonl')
    copy.write_bytes(path.read_bytes())
    return copy


def prepared(tmp_path, records, *flags, objective='sft', tokenizer='byte', size=64):
    """The dataset of these records, all of them in both splits."""
    source, folder = lines(tmp_path / 'source.jsonl', records), tmp_path / 'data'
    command = (source, f'--val={again(source)}', f'--out_dir={folder}', f'--tokenizer={tokenizer}')
    prepare.main([*map(str, command), f'--block_size={size}', *flags])
    return Dataset(folder, size, objective=objective)


def rows(data, split='val'):
    """The ids and flags of each row."""
    shapes = [np.fromfile(data.folder / f'{split}.bin', '<u2')]
    shapes += [np.fromfile(data.folder / mask_file(f'{split}.bin'), np.uint8)]
    return list(zip(*(shape.reshape(-1, data.block_size) for shape in shapes), strict=True))


def packed(data, split='val'):
    """The text of each conversation in the rows."""
    found = []
    for ids, flags in rows(data, split):
        starts = [*np.flatnonzero(flags & FIRST), len(ids)]
        for start, end in itertools.pairwise(starts):
            assert len(set(flags[start:end] & PADDING)) == 1
            if not flags[start] & PADDING:
                found.append(data.tokenizer.decode(ids[start:end]))
    return found


def loss_texts(data, split='val'):
    """The texts in the loss of each row."""
    runs = []
    for ids, flags in rows(data, split):
        mask = np.concatenate([[0], flags & TARGET, [0]]).astype(int)
        edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
        runs.append([data.tokenizer.decode(ids[start:end]) for start, end in edges])
    return runs


# -----------------------------------------------------------------------------
# conversations


def test_the_loss_covers_the_assistants_messages_and_the_end_of_each(tmp_path):
    data = prepared(tmp_path, [talk('Hi', 'Hello é', 'Bye', 'See you', system='Be kind')], size=128)
    assert loss_texts(data) == [[f'Hello é{EOT}', f'See you{EOT}']]
    user, system = prepare.TEMPLATE['user'], prepare.TEMPLATE['system']
    said = f'{system[0]}Be kind{system[1]}'
    for asked, answer in (('Hi', 'Hello é'), ('Bye', 'See you')):
        said += f'{user[0]}{asked}{user[1]}{prepare.TEMPLATE["assistant"][0]}{answer}{EOT}'
    assert packed(data) == [said]


def test_the_targets_of_a_batch_are_the_tokens_in_the_loss(tmp_path):
    data = prepared(tmp_path, [talk('Hi', 'Hello'), talk('A', 'B', 'C', 'D')], size=46)
    for x, y in (data.batch(0, data.n_windows), data.eval_batch('val', data.eval_starts('val'))):
        assert x.shape == y.shape == (2, 46)
        answers = {data.tokenizer.decode(row[row >= 0]) for row in y}
        assert answers == {f'Hello{EOT}', f'B{EOT}D{EOT}'}
        assert np.array_equal(y[:, :-1][y[:, :-1] >= 0], x[:, 1:][y[:, :-1] >= 0])
    assert sorted(data.targets) == [4, 6]
    assert data.targets[data.windows(0, 2)].tolist() == (data.batch(0, 2)[1] >= 0).sum(1).tolist()


def test_each_conversation_of_a_row_has_its_own_number(tmp_path):
    data = prepared(tmp_path, [talk('Hi', 'Hello'), talk('A', 'B'), talk('C', 'D')], size=96)
    for (_, flags), numbers in zip(
        rows(data), data.eval_batch('val', data.eval_starts('val'), True)[2], strict=True
    ):
        starts = np.flatnonzero(flags & FIRST)
        assert len(starts) > 2
        assert numbers[0] == 1  # a row starts with a conversation
        assert np.flatnonzero(np.diff(numbers)).tolist() == (starts[1:] - 1).tolist()


def test_a_special_token_spelled_in_a_message_is_text(tmp_path):
    data = prepared(tmp_path, [talk(EOT, f'a{EOT}b')], size=64)
    (ids, flags) = rows(data)[0]
    assert list(ids[flags & PADDING == 0]).count(256) == 1


def test_equivalent_formats_of_a_conversation_give_the_same_tokens(tmp_path):
    messages = talk('Add\n\n1 2', '3')
    spellings = [
        {'messages': messages},
        messages,
        {'prompt': 'Add\n\n1 2', 'completion': '3'},
        {'prompt': messages[:1], 'completion': messages[1:]},
        {'instruction': 'Add', 'input': '1 2', 'output': '3'},
        {'instruction': 'Add\n\n1 2', 'input': '', 'output': '3'},
    ]
    assert len(set(packed(prepared(tmp_path, spellings)))) == 1


ASK, TELL = talk('How many?', 'Seven.')
WEIGHED = [
    {'from': 'system', 'value': 'Count.', 'weight': None},
    {'from': 'human', 'value': 'How many?', 'weight': 0},
    {'from': 'gpt', 'value': 'Seven.', 'weight': 1},
]


@pytest.mark.parametrize(
    'row',
    [
        {'conversations': [{'from': 'human', 'value': 'How many?'}, WEIGHED[2]], 'id': 'a1'},
        [{'from': 'User', 'value': 'How many?'}, {'from': 'ChatGPT', 'value': 'Seven.'}],
        {'conversations': [ASK, TELL]},
        {'conversation': [ASK, TELL | {'tool_calls': None, 'name': None}], 'tools': []},
        {'messages': [ASK | {'content': [{'type': 'text', 'text': 'How many?'}]}, TELL]},
        {'messages': [ASK, TELL], 'prompt': 'How many?', 'prompt_id': 'f'},
        {'messages': [{'role': 'system', 'content': ''}, ASK, TELL], 'system': ''},
        {'prompt': 'How many?', 'response': 'Seven.', 'messages': None, 'label': True},
        {'prompt': 'How many?', 'response': TELL, 'chosen': None, 'rejected': None},
        {'question': 'How many?', 'answer': 'Seven.', 'weight': 1},
        {'query': 'How many?', 'output': 'Seven.', 'source': 'here', 'lang': 'en'},
        {'input': 'How many?', 'output': 'Seven.', 'history': []},
        {'instruction': 'How many?', 'context': '', 'response': 'Seven.', 'category': 'qa'},
        {'prompt': '\n\nHuman: How many?\n\nAssistant:', 'completion': 'Seven.'},
    ],
)
def test_the_formats_of_public_data_are_read(tmp_path, row):
    data = prepared(tmp_path, [row], tokenizer='byte')
    assert packed(data) == packed(prepared(tmp_path, [[ASK, TELL]]))
    assert loss_texts(data) == [[f'Seven.{EOT}']]


@pytest.mark.parametrize(
    ('row', 'said'),
    [
        ({'conversations': WEIGHED}, [('system', 'Count.'), ('user', 'How many?')]),
        (
            {'instruction': 'Add', 'context': 'one', 'response': 'Seven.', 'system_prompt': 'Be.'},
            [('system', 'Be.'), ('user', 'Add\n\none')],
        ),
        (
            {'prompt': 'So?', 'output': 'Seven.', 'system': 'Be.', 'history': [['A', 'B']]},
            [('system', 'Be.'), ('user', 'A'), ('assistant', 'B'), ('user', 'So?')],
        ),
        (
            {'query': 'So?', 'answer': 'Seven.', 'history': talk('A', 'B')},
            [('user', 'A'), ('assistant', 'B'), ('user', 'So?')],
        ),
        (
            {'system': 'Be.', 'messages': [*talk('A', 'B', system='Be.')[:2], TELL]},
            [('system', 'Be.'), ('user', 'A')],
        ),
        (
            {'question': 'How?', 'context': 'Of six and one.', 'answer': 'Seven.', 'extra': []},
            [('user', 'How?\n\nOf six and one.')],
        ),
        (
            [ASK, {'role': 'system', 'content': [{'type': 'text', 'text': x} for x in 'ab']}, TELL],
            [('user', 'How many?'), ('system', 'a\nb')],
        ),
    ],
)
def test_system_prompt_history_and_context_come_before_the_answer(tmp_path, row, said):
    data = prepared(tmp_path, [row], size=128)
    marks = prepare.TEMPLATE
    text = ''.join(marks[role][0] + text + marks[role][1] for role, text in said)
    assert packed(data) == [f'{text}{marks["assistant"][0]}Seven.{EOT}']
    assert loss_texts(data)[0][-1] == f'Seven.{EOT}'


@pytest.mark.parametrize('mark', [{'weight': 0}, {'train': False}, {'loss_mask': 0.0}])
def test_an_answer_that_is_excluded_is_read_but_not_in_the_loss(tmp_path, mark):
    other = dict.fromkeys(mark, True)
    row = {'messages': [ASK, TELL | {'content': 'Nine.'} | mark, ASK, TELL | other]}
    data = prepared(tmp_path, [row], size=96)
    assert loss_texts(data) == [[f'Seven.{EOT}']]
    assert 'Nine.' in packed(data)[0]


@pytest.mark.parametrize(
    ('row', 'why'),
    [
        ({'prompt': 'a', 'completion': 'b', 'label': False}, 'marked as excluded from training'),
        ({'messages': [ASK, TELL], 'weight': 0}, 'marked as excluded from training'),
        ({'messages': [ASK, TELL | {'weight': 0}]}, 'marked as excluded from training'),
        ({'messages': [ASK, TELL | {'content': None}]}, 'with empty text'),
        ({'messages': [ASK | {'content': ' '}, TELL]}, 'with empty text'),
        ({'instruction': 'a', 'input': '', 'output': ''}, 'with empty text'),
        ({'prompt': None, 'completion': 'b'}, 'with empty text'),
        ({'conversations': [{'from': 'human', 'value': None}, TELL]}, 'with empty text'),
    ],
)
def test_a_row_with_nothing_to_train_on_is_skipped_and_counted(tmp_path, capsys, row, why):
    data = prepared(tmp_path, [row, [ASK, TELL], row])
    assert len(packed(data)) == 1
    assert f'skipped: 4 records {why}' in capsys.readouterr().out.splitlines()  # of both splits
    message = refused(prepared, tmp_path, [row])
    assert f'no samples for train: skipped 1 record {why}; ' in message


def test_an_ignored_field_is_ignored_in_rows_and_messages(tmp_path):
    row = {'messages': [ASK | {'name': 'Bo'}, TELL | {'weight': 0.5}], 'score': 3, 'text': 'x'}
    data = prepared(tmp_path, [row], '--ignore=name,weight,score,text')
    assert packed(data) == packed(prepared(tmp_path, [[ASK, TELL]]))


def test_invalid_rows_are_skipped_with_bad_drop(tmp_path, capsys):
    bad = {'messages': [ASK, TELL | {'function_call': [{}]}]}
    data = prepared(tmp_path, [bad, [ASK, TELL], {'prompt': 'a'}, 7], '--bad=drop')
    assert len(packed(data)) == 1
    out = capsys.readouterr().out
    assert 'skipped: 6 records with errors' in out.splitlines()
    assert f'{tmp_path / "source.jsonl"}, line 1: messages[1]: has unknown fields' in out
    message = refused(prepared, tmp_path, [bad], '--bad=drop')
    assert 'skipped 1 record with errors (' in message
    assert 'function_call' in message


@pytest.mark.parametrize('indent', [None, 1])
def test_a_json_file_is_one_array_one_row_or_json_lines(tmp_path, indent):
    talks = [{'messages': talk('é', str(number))} for number in range(20)]
    (tmp_path / 'array.json').write_text(json.dumps(talks, indent=indent), encoding='utf-8-sig')
    lines(tmp_path / 'lines.json', talks)
    (tmp_path / 'bare.json').write_text(json.dumps(talks[0]['messages'], indent=indent))
    (tmp_path / 'row.json').write_text(json.dumps(talks[0], indent=indent))
    found = {}
    for name in ('array', 'lines', 'bare', 'row'):
        folder = tmp_path / name
        val = again(lines(tmp_path / 'v.jsonl', talks[:1]))
        command = (tmp_path / f'{name}.json', f'--val={val}', f'--out_dir={folder}')
        prepare.main([*map(str, command), '--tokenizer=byte', '--block_size=64'])
        found[name] = packed(Dataset(folder, 64, objective='sft'), 'train')
    assert len(found['array']) == 20
    assert found['array'] == found['lines']
    assert len(found['bare']) == 1
    assert found['bare'] == found['row']
    assert found['bare'][0] in found['array']


def test_blank_lines_are_ignored(tmp_path):
    source = tmp_path / 's.jsonl'
    source.write_bytes(f'\r\n{json.dumps([ASK, TELL])}\r\n \n\n{json.dumps([ASK, TELL])}'.encode())
    prepare.main([str(source), f'--out_dir={tmp_path / "data"}', '--tokenizer=byte'])
    source.write_text('\n \n')
    message = refused(prepare.main, [str(source), f'--out_dir={tmp_path}', '--tokenizer=byte'])
    assert 'no samples for train: the files are blank' in message


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (
            '[{"prompt": "a", "completion": "b"} {}]',
            "invalid JSON: Expecting ',' delimiter: line 1",
        ),
        (
            '[{"prompt": "a", "completion": "b"}, 7]',
            'item 2: must be an object with "messages", not 7',
        ),
        ('[{"prompt": "a", "completion": "b"}', "invalid JSON: Expecting ',' delimiter: line 1"),
        ('[{"prompt": "a", "completion": "b"},]', 'invalid JSON: Expecting value: line 1'),
        ('[{"prompt": "a", "completion": "b"}] 7', 'invalid JSON: Extra data: line 1 column 38'),
        ('[', 'invalid JSON: Expecting value'),
        ('[]', 'the files are blank'),
        (
            '{"data": [\n]}',
            "item 1: no 'messages', 'conversations' or 'prompt'; its fields are data",
        ),
    ],
)
def test_an_invalid_json_array_is_reported(tmp_path, content, problem):
    (tmp_path / 'a.json').write_text(content)
    command = [str(tmp_path / 'a.json'), f'--out_dir={tmp_path / "data"}', '--tokenizer=byte']
    assert problem in refused(prepare.main, command)


@pytest.mark.parametrize('seed', range(3))
def test_each_conversation_is_packed_whole_and_once(tmp_path, seed):
    random = np.random.default_rng(seed)
    talks = [talk('x' * random.integers(1, 60), str(i)) for i in range(80)]
    data = prepared(tmp_path, talks, size=128)
    alone = prepared(tmp_path, talks[:1], size=128)
    whole = {packed(prepared(tmp_path, [one], size=128))[0] for one in talks[:5]}
    data = prepared(tmp_path, talks, size=128)
    found = packed(data)
    assert len(found) == len(set(found)) == 80
    assert whole < set(found)
    used = sum(len(one.replace(EOT, '.')) for one in found)
    assert data.tokens['val'] < 1.12 * used  # best fit; one per sequence would take twice as much
    assert alone.n_windows == 1
    assert data.window_tokens == pytest.approx(used / data.n_windows)


def test_the_report_counts_what_was_packed(tmp_path, capsys):
    prepared(tmp_path, [talk('Hi', 'Yo'), talk('Hi', 'x' * 100)], size=64)
    out = capsys.readouterr().out
    assert '2 conversations in 2 packed sequences of 64 tokens' in out  # one, in both splits
    assert f'{1 - 23 / 64:.1%} padding; 6 tokens to train on' in out
    assert '0 truncated, 2 skipped' in out
    assert out.splitlines()[-1].startswith('Train on it: python train.py train_chat --dataset=')


def test_long_conversations_are_truncated_with_long_cut(tmp_path, capsys):
    talks = [talk('Hi', 'Yo'), talk('Hi', 'abc' * 30), talk('x' * 90, 'never reached')]
    data = prepared(tmp_path, talks, '--long=cut')
    assert '2 truncated, 2 skipped' in capsys.readouterr().out
    assert [f'Yo{EOT}'] in loss_texts(data)
    assert [('abc' * 30)[: 64 - 20]] in loss_texts(data)
    assert data.n_windows == 2


def test_a_fraction_is_used_for_validation(tmp_path):
    source = lines(tmp_path / 's.jsonl', [talk('x' * 30, str(i)) for i in range(20)])
    folder = f'--out_dir={tmp_path / "data"}'
    prepare.main([str(source), folder, '--tokenizer=byte', '--block_size=64', '--val_fraction=0.2'])
    data = Dataset(tmp_path / 'data', 64, objective='sft')
    answers = {split: {run[0] for run in loss_texts(data, split)} for split in ('train', 'val')}
    assert answers['val'] == {f'{i}{EOT}' for i in (0, 5, 10, 15)}
    assert len(answers['train']) == 16


# -----------------------------------------------------------------------------
# templates and tokenizers


def test_a_custom_template_is_saved_with_the_tokenizer(tmp_path):
    (tmp_path / 'marks.json').write_text(json.dumps(TEMPLATE))
    data = prepared(tmp_path, [talk('Hi', 'Yo')], f'--template={tmp_path / "marks.json"}')
    assert packed(data) == ['<Hi>[Yo]']
    assert loss_texts(data) == [['Yo]']]
    assert load_tokenizer(data.folder / 'tokenizer.json').chat_template == TEMPLATE
    again = prepared(tmp_path, [talk('A', 'B')], tokenizer=data.folder)
    assert packed(again) == ['<A>[B]']


def test_a_tokenizer_without_end_of_text_ends_a_turn_with_a_blank_line(tmp_path):
    letters = char_tokenizer(sorted({*'ystemUrAian:\nhel'} | {'S', 'o'}))
    letters.save(tmp_path / 'letters.json')
    data = prepared(tmp_path, [talk('hello', 'hello')], tokenizer=tmp_path / 'letters.json')
    assert loss_texts(data) == [['hello\n\n']]
    blank = [talk('hello', 'hel\n\nlo')]
    message = refused(prepared, tmp_path, blank, tokenizer=tmp_path / 'letters.json')
    assert 'source.jsonl, line 1: messages[1]: the assistant' in message
    assert "message contains '\\n\\n', which ends" in message


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        ('{', 'Expecting property name'),
        ('{"user": ["a", "b"]}', 'needs the role assistant'),
        ('{"assistant": ["a"]}', 'two texts'),
        ('{"assistant": ["a", ""]}', 'it has no text after'),
        ('{}', 'it has no text after'),
        ('[]', 'not a chat template'),
        ('{"assistant": ["a", 1]}', 'two texts'),
    ],
)
def test_an_invalid_template_is_refused(tmp_path, content, problem):
    (tmp_path / 'marks.json').write_text(content)
    message = refused(prepared, tmp_path, [], f'--template={tmp_path / "marks.json"}')
    assert message.startswith(str(tmp_path / 'marks.json'))
    assert problem in message


def test_a_character_of_the_template_that_the_tokenizer_lacks_is_reported(tmp_path):
    char_tokenizer('abc').save(tmp_path / 'abc.json')
    message = refused(prepared, tmp_path, [talk('a', 'b')], tokenizer=tmp_path / 'abc.json')
    assert "character 'S'" in message
    assert '--template=' in message


@pytest.mark.parametrize('marks', [None, {'user': ['é"\\ ', '\n'], 'assistant': ['', '\n\n']}])
def test_an_export_includes_the_template(tmp_path, marks):
    transformers = pytest.importorskip('transformers')
    tokenizer = prepare.with_template(
        train_bpe(['the cat sat. hello, User: no\n\nAssi'], 300), None
    )
    tokenizer.chat_template = marks or tokenizer.chat_template
    export_transformers(random_model(300), tokenizer, {}, tmp_path / 'exported')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    messages = talk('the cat?', 'hello,\n\nno', 'sat')
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = theirs(text, add_special_tokens=False)['input_ids']
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode_chat(messages))
    if marks is None:
        assert ids == tokenizer.encode_chat(messages).tolist()
    parts = [{'type': 'text', 'text': text} for text in ('the', 'cat?')]
    told = talk('the\ncat?', 'sat')
    render = functools.partial(theirs.apply_chat_template, tokenize=False)
    assert render([{'role': 'user', 'content': parts}, told[1]]) == render(told)
    with pytest.raises(Exception, match='only text parts are read'):
        render([{'role': 'user', 'content': [{'type': 'image', 'url': 'a'}]}])


def test_a_gguf_includes_the_template(tmp_path):
    gguf = pytest.importorskip('gguf', reason='gguf is not installed')
    tokenizer = prepare.with_template(get_tokenizer('byte'), None)
    export_gguf(random_model(257), tokenizer, {}, tmp_path / 'm.gguf')
    field = gguf.GGUFReader(tmp_path / 'm.gguf').get_field('tokenizer.chat_template')
    assert field.contents() == chat_jinja(tokenizer)


@pytest.mark.skipif(
    'TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR has the gpt2 vocabulary'
)
def test_gpt2_gives_the_ids_of_the_whole_text_at_once():
    tokenizer = prepare.with_template(get_tokenizer('gpt2'), None)
    ids = tokenizer.encode_chat(talk('Hi there', 'Hello.\n\n  x', 'And 2 + 2?', system='Be kind.'))
    text = tokenizer.decode(ids)
    assert ids.tolist() == tokenizer.encode(text, allow_eot=True).tolist()


# -----------------------------------------------------------------------------
# pairs


def test_the_loss_of_a_pair_covers_only_the_answers_the_chosen_one_first(tmp_path):
    pair = {'prompt': 'Hi', 'chosen': 'Hello', 'rejected': 'No'}
    data = prepared(tmp_path, [pair], objective='dpo', size=128)
    assert loss_texts(data) == [[f'Hello{EOT}'], [f'No{EOT}']]
    assert data.block_size == 64  # the longest pair, rounded up to 64
    x, y = data.batch(7, 3)
    assert x.shape == y.shape == (6, 64)
    assert [len(row[row >= 0]) for row in y] == [6, 3] * 3


def test_equivalent_formats_of_a_pair_give_the_same_tokens(tmp_path):
    asked = talk('A', 'B', 'C')
    better, worse = asked + talk('', 'yes')[1:], asked + talk('', 'no')[1:]
    spellings = [
        {'prompt': asked, 'chosen': 'yes', 'rejected': 'no'},
        {'messages': asked, 'chosen': better[3:], 'rejected': worse[3:]},
        {'prompt': asked, 'chosen': better, 'rejected': worse},
        {'chosen': better, 'rejected': worse},
    ]
    data = prepared(tmp_path, spellings, objective='dpo', size=128)
    found = packed(data)
    assert len(found) == 8
    assert len(set(found)) == 2
    assert loss_texts(data) == [[f'yes{EOT}'], [f'no{EOT}']] * 4  # not B, which is in both


def answers(text):
    return '\n\nHuman: How many?\n\nAssistant: ' + text


SYSTEM = {'role': 'system', 'content': 'Count.'}


@pytest.mark.parametrize(
    ('row', 'system'),
    [
        ({'prompt': 'How many?', 'chosen': TELL, 'rejected': TELL | {'content': 'Six.'}}, ''),
        ({'chosen': answers('Seven.'), 'rejected': answers('Six.')}, ''),
        ({'prompt': answers(''), 'chosen': ' Seven.'[1:], 'rejected': 'Six.'}, ''),
        ({'system': 'Count.', 'question': 'How many?', 'chosen': 'Seven.', 'rejected': 'Six.'}, 1),
        (
            {
                'conversations': [{'from': 'human', 'value': 'How many?'}],
                'chosen': {'from': 'gpt', 'value': 'Seven.'},
                'rejected': {'from': 'gpt', 'value': 'Six.'},
            },
            '',
        ),
        (
            {
                'prompt': 'How many?',
                'prompt_id': '7',
                'messages': [SYSTEM, ASK, TELL],
                'chosen': [SYSTEM, ASK, TELL],
                'rejected': [SYSTEM, ASK, TELL | {'content': 'Six.'}],
                'score_chosen': 8.5,
                'score_rejected': 3,
            },
            1,
        ),
    ],
)
def test_the_formats_of_public_preferences_are_read(tmp_path, row, system):
    asked = [SYSTEM, ASK] if system else [ASK]
    plain = {'prompt': asked, 'chosen': 'Seven.', 'rejected': 'Six.'}
    data = prepared(tmp_path, [row], objective='dpo', size=64)
    assert loss_texts(data) == [[f'Seven.{EOT}'], [f'Six.{EOT}']]
    assert packed(data) == packed(prepared(tmp_path, [plain], objective='dpo', size=64))


def test_a_pair_that_truncation_makes_equal_is_skipped(tmp_path, capsys):
    alike = {'prompt': 'Hi', 'chosen': 'x' * 60 + 'a', 'rejected': 'x' * 60 + 'b'}
    pair = {'prompt': 'Hi', 'chosen': 'a' * 60, 'rejected': 'b'}
    data = prepared(tmp_path, [alike, pair], '--long=cut', objective='dpo')
    assert '2 truncated, 2 skipped' in capsys.readouterr().out
    assert loss_texts(data) == [['a' * (64 - 20)], [f'b{EOT}']]


# -----------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        ('{"messages": ', 'invalid JSON'),
        ('[' * 100000, 'invalid JSON'),
        (b'\xff', 'not UTF-8'),
        ('"Hi"', 'must be an object with "messages"'),
        ('{}', "or 'prompt'; its fields are none;"),
        ('{"text": "Hi"}', "or 'prompt'; its fields are text;"),
        ('{"messages": 1}', 'must be a string or a list of messages'),
        ('{"messages": [1]}', "messages[0]: has no 'role'"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: has no 'content'"),
        ('[{"role": "user", "content": "Hi"}]', 'no message of the assistant'),
        ('[{"messages": []}, {"messages": []}]', 'an array of conversations'),
        (
            '[{"role": "judge", "content": "1"}]',
            "messages[0]: unknown role 'judge'; use one of system",
        ),
        ('{"instruction": 1, "output": "a"}', "'instruction' is 1"),
        ('{"prompt": "a", "chosen": "b"}', "no 'rejected'; a preference pair needs"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', 'are the same'),
        ('{"chosen": "b", "rejected": "c"}', 'are not two replies of the assistant to one prompt'),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', 'prepare a dataset of each'),
        ('{"prompt": "a", "rejected": "b", "x": "chosen"}', "no 'chosen'; a preference pair needs"),
        ('{"prompt": "a"}', "'prompt' has no 'completion' or 'response'; its fields are prompt;"),
        ('{"prompt": "a\\ud83d", "output": "b"}', 'half a surrogate pair'),
        ('{"prompt": "a", "prompt": "c", "output": "b"}', "duplicate key 'prompt'"),
        ('[', 'or one array into a .json file'),
    ],
)
def test_an_invalid_line_is_reported_and_nothing_is_written(tmp_path, line, problem):
    good = json.dumps(talk('Hi', 'Yo'))
    if 'chosen' in str(line) and problem != 'prepare a dataset of each':
        good = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / 'talks.jsonl').write_bytes(good.encode() + b'\n' + line + b'\n')
    folder = tmp_path / 'data'
    command = [str(tmp_path / 'talks.jsonl'), f'--out_dir={folder}', '--tokenizer=byte']
    message = refused(prepare.main, command)
    assert message.startswith(f'{tmp_path / "talks.jsonl"}, line 2: ')
    assert problem in message
    assert not folder.exists()


GOOD = {'messages': [ASK, TELL]}
CHOICE = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}


@pytest.mark.parametrize(
    ('row', 'names'),
    [
        *(
            ({'messages': [ASK, TELL | {name: value}]}, problem)
            for name, value, problem in [
                ('weight', 0.5, "'weight' is 0.5"),
                ('weight', '0', "'weight' is '0'"),
                ('weight', float('nan'), 'NaN is not valid JSON'),
                ('train', 'no', "'train' is 'no'"),
                ('loss_mask', [1, 0], "'loss_mask' is [1, 0]"),
                ('content', 4, 'the content is 4'),
                ('content', ['Hi'], "a content part is 'Hi'"),
                ('content', [{'type': 'image_url', 'image_url': {}}], "has type 'image_url'"),
                ('content', [{'type': 'text', 'text': 4}], 'the text of a content part is 4'),
                (
                    'content',
                    [{'type': 'text', 'text': 'a', 'thought': 1}],
                    "has unknown fields: 'thought'",
                ),
                ('value', 'Six.', "has both 'content' and 'value'"),
                ('from', 'gpt', "has both 'role' and 'from'"),
                ('role', 'ipython', "unknown role 'ipython'"),
                ('role', 'function_call', "unknown role 'function_call'"),
                ('role', None, 'unknown role None'),
            ]
        ),
        *(
            (
                {'messages': [ASK, {'role': 'assistant', 'content': None, name: 'x'}]},
                f'messages[1]: has unknown fields that might affect training: {name!r}',
            )
            for name in ('function_call', 'reasoning_content', 'thinking', 'audio')
        ),
        *(
            ({'messages': [ASK, TELL | {name: True}]}, f'{name!r}; if not, add --ignore={name}')
            for name in ('masked', 'mask', 'train_on_turn', 'name', 'tool_call_id', 'end_turn')
        ),
        *(
            (GOOD | {name: 4}, f'training: {name!r}; if not, add --ignore={name}')
            for name in ('score', 'rating', 'train_on_input', 'text', 'functions')
        ),
        ({'messages': [ASK | {'train': True}, TELL]}, "'train' is set on a message of 'user'"),
        ({'messages': [ASK, TELL | {'train': True, 'weight': 0}]}, "'weight', 'train' contradict"),
        (GOOD | {'weight': 0.5}, "'weight' is 0.5"),
        (GOOD | {'loss_mask': [0, 1]}, "'loss_mask' is [0, 1]"),
        (GOOD | {'label': 1}, "'label' is 1; it must be true or false"),
        (GOOD | {'system': 4}, "'system' is 4"),
        (GOOD | {'completion': 'a'}, "two formats, 'messages' and 'completion'"),
        (GOOD | {'prompt': 'Who?'}, "two formats, 'messages' and 'prompt'"),
        (GOOD | {'history': [['a', 'b']]}, "two formats, 'messages' and 'history'"),
        (GOOD | {'conversations': [ASK, TELL]}, "two formats, 'messages' and 'conversations'"),
        ({'prompt': 'a', 'output': 'b', 'answer': 'c'}, "two formats, 'prompt' and 'answer'"),
        (GOOD | {'context': 'c'}, "two formats, 'messages' and 'context'"),
        ({'prompt': 'a', 'answer': 'b', 'history': 'c'}, "'history' is 'c'"),
        ({'prompt': 'a', 'answer': 'b', 'history': [['c']]}, 'history[0]: must be a [question'),
        (CHOICE | {'response': 'b'}, "two formats, 'chosen' and 'response'"),
        (CHOICE | {'label': True}, "training: 'label'"),
        (CHOICE | {'score_chosen': 1, 'score_rejected': 2}, "below 'score_rejected' (1 < 2)"),
        (CHOICE | {'messages': [ASK]}, "two formats, 'chosen' and 'messages'"),
    ],
)
def test_a_field_that_might_affect_training_is_refused(tmp_path, row, names):
    source = lines(tmp_path / 's.jsonl', [row])
    command = [str(source), f'--out_dir={tmp_path / "data"}', '--tokenizer=byte']
    message = refused(prepare.main, command)
    assert message.startswith(f'{source}, line 1: ')
    assert names in message


def test_long_names_and_long_lists_of_names_are_cut(tmp_path):
    row = GOOD | {f'{number}{"x" * 1000}\n': 1 for number in range(1000)}
    message = refused(prepared, tmp_path, [row])
    assert 'and 990 more' in message
    assert len(message) < 2000


@pytest.mark.parametrize(
    ('record', 'problem'),
    [
        ({'prompts': 'a', 'answer': 'b'}, "unknown field 'prompts'; did you mean prompt? "),
        ({'prompt': 'a', 'answers': 'b'}, "unknown field 'answers'; did you mean answer? "),
        ({'prompt': 'a', 'choosen': 'b', 'rejected': 'c'}, "'choosen'; did you mean chosen? "),
        (
            {'messages': [{'roles': 'user', 'content': 'a'}]},
            "messages[0]: unknown field 'roles'; did you",
        ),
        (
            {'messages': [{'role': 'user', 'text': 'a'}]},
            "and a 'content'; its fields are role, text; ",
        ),
        (
            {'prompt': 'a', 'rejected': 'c', 'x': 1},
            "'rejected'; its fields are prompt, rejected, x",
        ),
        ({'prompt': 'a', 'id': 1}, "no 'completion' or 'response'; its fields are prompt;"),
    ],
)
def test_a_misspelled_field_is_told_from_a_missing_one(tmp_path, record, problem):
    assert problem in refused(prepared, tmp_path, [record])


def test_an_answer_may_spell_a_special_token(tmp_path):
    fields = train_bpe([WORDS], 260).to_dict()
    end = fields['special_tokens'][EOT]  # <|endoftext|> of a template, whatever its name
    added = [{'text': '</s>', 'id': end, 'special': True}]
    fields |= {'special_tokens': {'</s>': end}, 'end_ids': [end], 'added_tokens': added}
    Tokenizer.from_dict(fields).save(tmp_path / 'own.json')
    answer = TELL | {'content': f'a {EOT} b'}
    data = prepared(tmp_path, [[ASK, answer]], tokenizer=tmp_path / 'own.json', size=256)
    assert loss_texts(data) == [[f'a {EOT} b{EOT}']]  # the end of text is decoded the same way


@pytest.mark.parametrize(
    'row',
    [
        {'messages': [{'role': 'developer', 'content': 'Do.'}, ASK, TELL]},
        {'prompt': [{'role': 'system', 'content': 'Do.'}, ASK], 'chosen': 'a', 'rejected': 'b'},
    ],
)
def test_two_system_prompts_are_refused(tmp_path, row):
    message = refused(prepared, tmp_path, [{'system': 'Be.'} | row])
    assert "has two system prompts, 'Be.' in 'system' and 'Do.' in the first message" in message
    assert '--ignore=system uses' in message


def test_a_context_beside_a_dialogue_is_refused(tmp_path):
    row = {'prompt': '\n\nHuman: Hi\n\nAssistant:', 'context': 'Six.', 'output': 'Hello'}
    assert "'prompt' and 'context' must both be plain strings" in refused(prepared, tmp_path, [row])


def test_a_conversation_without_messages_is_skipped_as_empty(tmp_path, capsys):
    prepared(tmp_path, [[ASK, TELL], {'messages': []}])
    assert 'skipped: 2 records with empty text' in capsys.readouterr().out


@pytest.mark.parametrize(
    'layout', ['{1}\n{0}\n{1}', '{0}\n{1}\n{1}', '[{1}, {0}, {1}]', '[{0},\n{1}, {1}]']
)
@pytest.mark.parametrize('bad', ['null', '{"prompt": "a", "prompt": "b"}', '{"id": NaN}'])
def test_only_the_invalid_item_of_a_json_file_is_skipped(tmp_path, capsys, layout, bad):
    source = tmp_path / 'rows.json'
    source.write_text(layout.format(bad, json.dumps({'prompt': 'Hi', 'output': 'Seven.'})))
    command = [str(source), f'--out_dir={tmp_path / "data"}', '--tokenizer=byte']
    row = layout.replace('\n', ' ').split().index(next(x for x in layout.split() if '{0}' in x)) + 1
    assert f'{"item" if layout[0] == "[" else "line"} {row}: ' in refused(prepare.main, command)
    prepare.main([*command, '--bad=drop', '--val_fraction=0.5'])
    out = capsys.readouterr().out
    assert '2 conversations' in out
    assert 'skipped: 1 record with errors' in out.splitlines()


MEGABYTE = 2**20
LARGE = {  # size in bytes -> the text of a file
    'one huge message': lambda size: json.dumps([ASK, TELL | {'content': 'word ' * (size // 5)}]),
    'many messages': lambda size: json.dumps([ASK, TELL] * (size // 90)),
    'many parts': lambda size: json.dumps(
        [ASK | {'content': [{'type': 'text', 'text': 'a'}] * (size // 31)}, TELL]
    ),
    'many rows': lambda size: f'{json.dumps([ASK, TELL])}\n' * (size // 90),
    'an array': lambda size: json.dumps([GOOD] * (size // 105), indent=1),
    'history': lambda size: json.dumps(
        {'prompt': 'a', 'output': 'b', 'history': [['a', 'b']] * (size // 12)}
    ),
    'a dialogue': lambda size: json.dumps(
        {'chosen': answers('a') * (size // 80) + 'b', 'rejected': answers('a') * (size // 80)}
    ),
    'many fields': lambda size: json.dumps(GOOD | {f'k{i}': 1 for i in range(size // 14)}),
    'a repeated field': lambda size: (
        '{' + ''.join(f'"k{i}": 1, ' for i in range(size // 14)) + f'"k{size // 14 - 1}": 1}}'
    ),
    'brackets': lambda size: '[' * size,
    'blank lines': lambda size: '\n' * size,
}


@pytest.mark.load
@pytest.mark.parametrize('kind', LARGE)
def test_time_is_linear_in_the_size_of_the_data(tmp_path, kind):
    suffix, files = '.json' if kind == 'an array' else '.jsonl', {}
    for size in (1, 4):
        files[size] = tmp_path / f'{size}{suffix}'
        files[size].write_text(LARGE[kind](size * MEGABYTE))

    def run(size):
        with contextlib.suppress(UserError):  # every row may be too long
            prepare.main([str(files[size]), f'--out_dir={tmp_path / "data"}', '--tokenizer=byte'])

    check_growth(run)


def test_a_conversation_that_is_too_long_is_reported_with_long_error(tmp_path):
    message = refused(prepared, tmp_path, [talk('Hi', 'x' * 99)], '--long=error')
    assert 'line 1: 120 tokens, but a packed sequence holds 64' in message
    message = refused(prepared, tmp_path, [talk('Hi', 'x' * 99)])
    assert 'no samples for train: skipped 1 record longer than --block_size=64' in message


@pytest.mark.parametrize(
    ('flags', 'problem'),
    [
        ((), 'FILES --name='),
        (('s.jsonl', '--name=a/b'), 'use letters, digits'),
        (('s.jsonl', '--name=text'), 'comes with flatGPT'),
        (('s.jsonl', '--name=a', '--val_fraction=2'), 'above 0'),
        (('s.jsonl', '--name=a', '--block_size=1'), 'must be between 2'),
        (('missing.jsonl', '--name=a', '--tokenizer=byte'), 'no such file'),
        (('s.jsonl', '--name=a', '--tokenizer=.'), 'the folder has no tokenizer'),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tmp_path, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    assert problem in refused(prepare.main, list(flags))


def test_a_missing_or_truncated_mask_is_detected(tmp_path):
    data = prepared(tmp_path, [talk('Hi', 'Yo')])
    path = data.folder / 'train.mask.bin'
    path.write_bytes(path.read_bytes()[:-1])
    assert 'prepare the dataset again' in refused(Dataset, data.folder, 64, objective='sft')
    path.unlink()
    assert 'train.mask.bin: is missing' in refused(Dataset, data.folder, 64, objective='sft')


def test_text_that_replaces_conversations_leaves_no_masks(tmp_path):
    data = prepared(tmp_path, [talk('Hi', 'Yo')])
    (tmp_path / 'a.txt').write_text('word ' * 50)
    text.main([str(tmp_path / 'a.txt'), f'--out_dir={data.folder}', '--tokenizer=byte'])
    assert not list(data.folder.glob('*mask*'))
    assert not Dataset(data.folder, 8).is_chat


# -----------------------------------------------------------------------------
# tuning

SIZES = ('--block_size=96', '--n_layer=2', '--n_embd=32')


def tuning(init_from, dataset, objective):
    """The flags of a run that fine-tunes this model on that dataset."""
    return (
        f'--init_from={init_from}',
        f'--dataset={dataset}',
        f'--objective={objective}',
        '--block_size=96',
        '--eval_iters=None',
        '--decay_lr=False',
    )


def questions(number):
    random = np.random.default_rng(5)
    return [' '.join(random.choice(WORDS, 2)) for _ in range(number)]


@pytest.fixture(scope='module')
def base(run_here, tmp_path_factory):
    """A base model, trained on text, without a chat template."""
    folder = tmp_path_factory.mktemp('base')
    LETTERS.save(folder / 'tokenizer.json')
    from flatgpt.data.dataset import Writer

    with Writer(folder / 'text', LETTERS) as writer:
        for split in ('train', 'val'):
            writer.write(split, LETTERS.encode(' '.join(questions(500))))
    run_here(f'--dataset={folder / "text"}', f'--out_dir={folder / "run"}', *SIZES)
    return folder / 'run'


@pytest.fixture(scope='module')
def talks(base, tmp_path_factory):
    """Conversations in which the assistant answers yes, or about rain, no and why."""
    folder = tmp_path_factory.mktemp('talks')
    records = []
    for asked in questions(60):
        answer = 'no. it is wet' if 'rain' in asked else 'yes'
        records.append(talk(asked, answer))
    return prepared(folder, records, tokenizer=base, size=96).folder


@pytest.fixture(scope='module')
def pairs(base, tmp_path_factory):
    records = [
        {'prompt': asked, 'chosen': 'so it is', 'rejected': 'yes'} for asked in questions(20)
    ]
    folder = tmp_path_factory.mktemp('pairs')
    return prepared(folder, records, tokenizer=base, size=96, objective='dpo').folder


@pytest.fixture(scope='module')
def chatty(run_here, base, talks, tmp_path_factory):
    """The base model after fine-tuning on the conversations."""
    out_dir = tmp_path_factory.mktemp('chatty') / 'run'
    flags = (*tuning(base, talks, 'sft'), '--max_iters=80')
    run_here(f'--out_dir={out_dir}', *flags, '--eval_interval=40', '--sample_tokens=8')
    return out_dir


def test_a_tuned_model_answers_in_the_template(chatty, script):
    assert metrics(chatty, 'val_loss')[80] < 0.3 * metrics(chatty, 'val_loss')[0]
    model, tokenizer, _ = load_model(chatty)
    assert tokenizer == LETTERS
    assert tokenizer.chat_template == prepare.TEMPLATE
    assert model.config.vocab_size == LETTERS.vocab_size
    flags = (f'--out_dir={chatty}', '--chat', '--temperature=0', '--max_new_tokens=20')
    done = script('sample.py', *flags, input='the cat\nthe dog\n')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ['yes', 'yes']


def test_the_sample_at_the_end_answers_a_question(run_here, base, talks, tmp_path, capsys):
    flags = (*tuning(base, talks, 'sft'), '--max_iters=0')
    run_here(f'--out_dir={tmp_path}', *flags, '--sample_tokens=5')
    shown = capsys.readouterr().out.partition('sample reply:')[2].split('-' * 64)[1]
    assert shown.startswith(f'\n{prepare.TEMPLATE["user"][0]}')
    assert prepare.TEMPLATE['assistant'][0] in shown


def test_the_loss_of_a_step_is_the_mean_over_all_its_targets(run_here, base, talks, tmp_path):
    """For any division into micro-batches, which have different numbers of targets."""
    losses = {}
    for rows, parts in ((8, 1), (1, 8), (2, 4)):
        sizes = (f'--batch_size={rows}', f'--gradient_accumulation_steps={parts}')
        flags = (*tuning(base, talks, 'sft'), '--max_iters=4')
        run_here(f'--out_dir={tmp_path}/{rows}', *flags, *sizes)
        losses[rows] = metrics(tmp_path / str(rows)), metrics(tmp_path / str(rows), 'grad_norm')
    data = Dataset(talks, 96, objective='sft')
    assert len(set(data.targets[data.windows(0, 8)].tolist())) > 1
    for values in losses.values():
        for mine, other in zip(values, losses[8], strict=True):
            assert list(mine.values()) == pytest.approx(list(other.values()), rel=1e-5)


@pytest.mark.parametrize('objective', ['sft', 'dpo'])
def test_two_processes_give_the_same_result_as_one(
    two_ranks, run_here, base, talks, pairs, tmp_path, objective
):
    dataset = talks if objective == 'sft' else pairs
    flags = tuning(base, dataset, objective)
    run_here(f'--out_dir={tmp_path}/one', *flags)
    two_ranks(f'--out_dir={tmp_path}/two', *flags)
    keys = ('loss', 'grad_norm', 'train_loss', 'val_loss')
    for key in keys + (('val_reward_margin',) if objective == 'dpo' else ()):
        one, two = metrics(tmp_path / 'one', key), metrics(tmp_path / 'two', key)
        assert list(one) == list(two) != []
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4, abs=1e-5), key


def test_dpo_raises_the_reward_margin(run_here, chatty, pairs, tmp_path, script, capsys):
    flags = (*tuning(chatty, pairs, 'dpo'), '--max_iters=60')
    run_here(f'--out_dir={tmp_path}/run', *flags, '--eval_interval=30')
    assert 'reward accuracy 1.0000' in capsys.readouterr().out
    loss, margin = (metrics(tmp_path / 'run', f'val_{key}') for key in ('loss', 'reward_margin'))
    assert loss[0] == pytest.approx(math.log(2), abs=1e-4)
    assert margin[0] == pytest.approx(0, abs=1e-3)
    assert loss[60] < 0.1
    assert 0 < margin[30] < margin[60]
    assert load_model(tmp_path / 'run')[1].chat_template == prepare.TEMPLATE


def test_a_resumed_run_keeps_the_reference_of_the_first_model(
    run_here, chatty, pairs, tmp_path, monkeypatch
):
    flags = tuning(chatty, pairs, 'dpo')
    fixed = ('--max_iters=6', '--save_interval=3', '--eval_interval=100')
    run_here(f'--out_dir={tmp_path}/whole', *flags, *fixed)
    run_here(f'--out_dir={tmp_path}/parts', *flags, '--max_iters=3', '--eval_interval=100')
    monkeypatch.setattr(loss_module, 'reference_logps', None)  # a second call would fail
    again = tmp_path / 'parts' / 'config.py'
    run_here('--init_from=resume', '--max_iters=6', config=again)
    assert metrics(tmp_path / 'parts') == metrics(tmp_path / 'whole')
    (tmp_path / 'parts' / loss_module.REFERENCE_FILE).unlink()
    message = refused(run_here, '--init_from=resume', '--max_iters=8', config=again)
    assert 'reference.safetensors: is missing' in message


def test_a_run_that_was_killed_at_its_start_finds_its_reference(
    run_here, chatty, pairs, tmp_path, monkeypatch
):
    flags = (*tuning(chatty, pairs, 'dpo'), '--max_iters=0')
    run_here(f'--out_dir={tmp_path}', *flags, '--always_save_checkpoint=False')
    for path in list_checkpoints(tmp_path):
        path.rename(tmp_path / 'gone')
    computed = []
    compute = loss_module.reference_logps
    monkeypatch.setattr(
        loss_module, 'reference_logps', lambda *args: computed.append(1) or compute(*args)
    )
    run_here(f'--out_dir={tmp_path}', *flags)
    assert not computed
    run_here(
        f'--out_dir={tmp_path}', *flags, '--overwrite', '--checkpoint=last', '--dtype=bfloat16'
    )
    assert computed == [1]  # another dtype needs another reference


@pytest.mark.parametrize(
    ('flags', 'problem'),
    [
        (('--objective=sft',), 'contains text, for --objective=lm'),
        (('--objective=dpo',), 'needs a chat model: give --init_from'),
        (('--objective=dpo', '--init_from={base}'), 'needs preference pairs'),
        (('--dataset={talks}',), 'contains conversations, for --objective=sft'),
        (
            ('--dataset={pairs}', '--init_from={base}'),
            'contains preference pairs, for --objective=dpo',
        ),
        (('--dataset={talks}', '--objective=dpo', '--init_from={base}'), 'contains conversations'),
        (
            ('--dataset={talks}', '--objective=sft', '--block_size=16'),
            'prepare the dataset again with --block_size=16',
        ),
        (('--objective=ppo',), 'objective'),
        (
            ('--dataset={pairs}', '--objective=dpo', '--init_from={base}', '--mask_documents'),
            'one conversation',
        ),
        (('--dpo_beta=0',), 'dpo_beta'),
        (
            ('--dataset={talks}', '--objective=sft', '--init_from={base}', '--short_iters=2'),
            'cannot be cut',
        ),
        (
            ('--init_from=resume', '--out_dir={base}', '--objective=sft'),
            'was trained with another objective',
        ),
    ],
)
def test_an_invalid_combination_of_settings_is_one_line(
    run_here, base, talks, pairs, tmp_path, flags, problem
):
    places = {'base': base, 'talks': talks, 'pairs': pairs}
    flags = [*SIZES, *(flag.format(**places) for flag in flags)]
    assert problem in refused(run_here, f'--out_dir={tmp_path / "run"}', *flags)
    assert not (tmp_path / 'run').exists()


def test_the_command_at_the_end_trains_the_base_model(
    run_here, base, tmp_path, capsys, monkeypatch
):
    source = lines(tmp_path / 'my talks.jsonl', [talk('hi', 'yo')] * 9)
    prepare.main([str(source), f'--out_dir={tmp_path / "my data"}', f'--tokenizer={base}'])
    out = capsys.readouterr().out
    assert 'packed sequence of 96 tokens' in out or 'packed sequences of 96 tokens' in out
    command = out.splitlines()[-1].removeprefix('Train on it: python train.py ')
    config, *flags = shlex.split(command)
    config = ROOT / 'config' / f'{config}.py'
    flags += ['--device=cpu', '--max_iters=1', '--epochs=None', f'--out_dir={tmp_path / "run"}']
    assert run_here(*flags, '--compile=False', config=config) == 0


@error_line('the context of {} has only {} tokens')
def test_a_packed_sequence_is_not_longer_than_the_context_of_the_base_model(base, tmp_path):
    source = lines(tmp_path / 'talks.jsonl', [talk('hi', 'yo')] * 9)
    command = [str(source), f'--out_dir={tmp_path / "data"}', f'--tokenizer={base}']
    advised = re.search(
        r'--block_size=\d+ or', refused(prepare.main, [*command, '--block_size=97'])
    )
    prepare.main([*command, advised[0].removesuffix(' or')])


def test_without_a_base_model_the_command_at_the_end_has_a_place_for_it(tmp_path, capsys):
    prepared(tmp_path, [talk('hi', 'yo')])
    end = '--init_from=RUN (RUN: the run directory of the base model)\n'
    assert capsys.readouterr().out.endswith(end)


def test_another_tokenizer_than_the_base_models_is_refused(run_here, base, tmp_path):
    data = prepared(tmp_path, [talk('hi', 'yo')])
    flags = tuning(base, data.folder, 'sft')
    message = refused(run_here, f'--out_dir={tmp_path / "run"}', *flags)
    assert f'prepare the dataset with --tokenizer={base}' in message


def test_another_template_than_the_base_models_is_reported(
    run_here, chatty, talks, tmp_path, capsys
):
    (tmp_path / 'marks.json').write_text('{"user": ["a:", ""], "assistant": ["b:", "\\n"]}')
    template = f'--template={tmp_path / "marks.json"}'
    data = prepared(tmp_path, [talk('hi', 'yo')] * 9, template, tokenizer=chatty, size=96)
    flags = tuning(chatty, data.folder, 'sft')
    run_here(f'--out_dir={tmp_path / "run"}', *flags, '--max_iters=1')
    assert f'replaces that of {chatty}' in capsys.readouterr().out
    assert load_model(tmp_path / 'run')[1].chat_template['assistant'] == ['b:', '\n']
