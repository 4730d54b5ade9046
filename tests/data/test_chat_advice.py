"""The error lines of chat data: the advice of each works."""

import json
import re
import shlex

import numpy as np
import pytest
from error_lines import case, error_line
from test_chat import ASK, CHOICE, GOOD, SYSTEM, TELL, lines, refused, talk

from flatgpt.data import chat as prepare
from flatgpt.data import text
from flatgpt.data.dataset import TARGET, mask_file
from flatgpt.data.messages import content_text, template_role
from flatgpt.data.tokenizer import EOT, char_tokenizer
from flatgpt.data.tokenizer import load as load_tokenizer

FINE = {'messages': talk('How?', 'Fine.')}
BETTER = {'prompt': 'How?', 'chosen': 'Fine.', 'rejected': 'Bad.'}
PAIR = {'prompt': 'How many?', 'chosen': 'Seven.', 'rejected': 'Six.'}
HISTORY = {'prompt': 'How many?', 'response': 'Seven.', 'history': [['Who?', 'We.']]}
CUT_EMOJI, EMOJI = '\ud83d', '\U0001f600'


def run(source, *flags):
    """Prepare a file, whose second row is for training -> the texts that are in the loss."""
    folder = source.parent / 'data'
    flags = ('--tokenizer=byte', '--block_size=64', *flags)
    prepare.main([str(source), f'--out_dir={folder}', '--val_fraction=0.5', *flags])
    return trained_on(folder)


def trained_on(folder, split='train'):
    ids = np.fromfile(folder / f'{split}.bin', '<u2')
    flags = np.fromfile(folder / mask_file(f'{split}.bin'), np.uint8)
    tokenizer = load_tokenizer(folder / 'tokenizer.json')
    return {*tokenizer.decode(ids[flags & TARGET > 0]).split(EOT)} - {''}


def reply(**fields):
    """A conversation whose answer has these fields."""
    return {'messages': [ASK, TELL | fields]}


def part(**fields):
    """A conversation whose answer is a text part with these fields."""
    return reply(content=[{'type': 'text', 'text': 'Seven.'} | fields])


# -----------------------------------------------------------------------------
# rows


@pytest.mark.parametrize(
    ('bad', 'good', 'texts'),
    [
        case('unknown role {}; use one of', [ASK | {'role': 'me'}, TELL], GOOD, 'Seven.'),
        case('that might affect', GOOD | {'score': 3}, '--ignore=score', 'Seven.'),
        case('that might affect', reply(name='Bo'), '--ignore=name', 'Seven.'),
        case('that might affect', GOOD | {'my score': 3}, "'--ignore=my score'", 'Seven.'),
        case('that might affect', GOOD | {'a,b': 3}, GOOD, 'Seven.'),
        case('the content is {}', reply(content=7), GOOD, 'Seven.'),
        case('the content is {}', reply(content=7), part(), 'Seven.'),
        case('it must be an object like', reply(content=['Seven.']), part(), 'Seven.'),
        case('a content part has type', part(type='audio'), part(), 'Seven.'),
        case('a content part has unknown', part(thought='6 + 1'), part(), 'Seven.'),
        case('the text of a content part', part(text=7), part(), 'Seven.'),
        case('contradict', reply(weight=1, train=False), '--ignore=train', 'Seven.'),
        case('contradict', reply(weight=0, train=True), '--ignore=train', 'Fine.'),
        case('has both', reply(value='Six.'), '--ignore=value', 'Seven.'),
        case('its fields are {}; --help', [ASK, {'role': 'assistant'}], [ASK, TELL], 'Seven.'),
        case(
            'its fields are {}; --help',
            {'messages': [ASK, {'content': 'Seven.'}]},
            [ASK, TELL],
            'Seven.',
        ),
        case('are not two replies', CHOICE | {'prompt': ''}, CHOICE, 'b c'),
        case(
            'are not two replies',
            {'chosen': 'b', 'rejected': 'c'},
            {'chosen': talk('a', 'b'), 'rejected': talk('a', 'c')},
            'b c',
        ),
        case(
            'half a surrogate pair; remove', reply(content=CUT_EMOJI), reply(content=EMOJI), EMOJI
        ),
        case('half a surrogate pair; remove', reply(content=f'Seven.{CUT_EMOJI}'), GOOD, 'Seven.'),
        case('mixes two', GOOD | {'completion': 'Six.'}, '--ignore=completion', 'Seven.'),
        case('mixes two', GOOD | {'context': 'c'}, [ASK | {'content': 'c'}, TELL], 'Seven.'),
        case('trains regardless of it', reply(weight=0.5), '--ignore=weight', 'Seven.'),
        case('trains regardless of it', reply(weight=0.5), reply(weight=1), 'Seven.'),
        case('trains regardless of it', GOOD | {'label': 2}, '--ignore=label', 'Seven.'),
        case('trains regardless of it', GOOD | {'label': 2}, GOOD | {'label': True}, 'Seven.'),
        case(
            'unknown field {}; {}',
            {'prompts': 'How many?', 'answer': 'Seven.'},
            {'prompt': 'How many?', 'answer': 'Seven.'},
            'Seven.',
        ),
        case('no message of the assistant', [ASK], [ASK, TELL], 'Seven.'),
        case('no message of the assistant', [ASK], '--bad=drop', 'Fine.'),
        case('it must be a list of [', HISTORY | {'history': 'a'}, HISTORY, 'We. Seven.'),
        case('must be a [question', HISTORY | {'history': [['a']]}, HISTORY, 'We. Seven.'),
        case('{} is {}; it must be a string', GOOD | {'system': 4}, GOOD, 'Seven.'),
        case(
            'two system prompts',
            {'system': 'Be.', 'messages': [SYSTEM, ASK, TELL]},
            '--ignore=system',
            'Seven.',
        ),
        case('are the same', PAIR | {'rejected': 'Seven.'}, '--bad=drop', 'Fine. Bad.'),
        case(
            "is below 'score_rejected'",
            PAIR | {'score_chosen': 1, 'score_rejected': 2},
            '--ignore=score_chosen,score_rejected',
            'Seven. Six.',
        ),
        case(
            "is below 'score_rejected'",
            PAIR | {'chosen': 'Six.', 'rejected': 'Seven.', 'score_chosen': 1, 'score_rejected': 2},
            PAIR,
            'Seven. Six.',
        ),
        case('must be a string or a list of messages', {'messages': 1}, GOOD, 'Seven.'),
        case('is set on', {'messages': [ASK | {'train': 1}, TELL]}, GOOD, 'Seven.'),
        *(
            case('both be plain strings', {'prompt': [ASK], 'context': 'c', 'output': 'd'}, *fixed)
            for fixed in (
                ({'prompt': 'How many?', 'context': 'c', 'output': 'd'}, 'd'),
                ({'prompt': [SYSTEM, ASK], 'output': 'd'}, 'd'),
            )
        ),
        case(
            "'instruction' is",
            {'instruction': 1, 'output': 'Seven.'},
            {'instruction': '1', 'output': 'Seven.'},
            'Seven.',
        ),
        case(
            'its fields are {}; --help',
            {'prompt': 'How many?', 'chosen': 'Seven.'},
            PAIR,
            'Six. Seven.',
        ),
        case('must be an object with', 7, GOOD, 'Seven.'),
    ],
)
def test_a_row_is_read_once_its_advice_is_followed(tmp_path, bad, good, texts):
    pairs = 'chosen' in bad if isinstance(bad, dict) else False
    other = BETTER if pairs else FINE
    source = lines(tmp_path / 'rows.jsonl', [other, bad, other])
    message = refused(run, source)
    assert ', line 2: ' in message
    if isinstance(good, str):
        assert good in message
        flags = shlex.split(good)
    else:
        lines(source, [other, good, other])
        flags = ()
    assert run(source, *flags) == {*texts.split()}


@error_line('that might affect')
def test_the_fields_of_several_lines_can_be_ignored_one_after_another(tmp_path):
    long = 'x' * 90
    row = GOOD | {f'{number:02}': 1 for number in range(12)} | {long: 1}
    source, flags = lines(tmp_path / 'rows.jsonl', [FINE, row, FINE]), []
    while '--ignore=' in (message := refused(run, source, *flags)):
        flags.append(re.search('--ignore=[^ ]*', message)[0])
    assert len(flags) == 2
    assert message.endswith('; remove them from the file')  # a name too long to be printed
    del row[long]
    assert run(lines(source, [FINE, row, FINE]), *flags) == {'Seven.'}


@error_line('--template={}: {}; give a JSON file')
def test_a_template_is_read_once_its_file_is_there(tmp_path):
    source, template = lines(tmp_path / 'rows.jsonl', [FINE, FINE]), tmp_path / 'template.json'
    refused(run, source, f'--template={template}')
    template.write_text(json.dumps(prepare.TEMPLATE))
    assert run(source, f'--template={template}') == {'Fine.'}


@error_line('its fields are {}; --help')
def test_the_formats_in_the_help_are_read(tmp_path, capsys):
    source = lines(tmp_path / 'rows.jsonl', [FINE, {'text': 'Hi'}, FINE])
    assert '--help shows the formats' in refused(run, source)
    with pytest.raises(SystemExit):
        prepare.main(['--help'])
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith('    {')]
    assert len(found) == 6
    for line in found:
        row, _ = json.JSONDecoder().raw_decode(line.strip())
        other = BETTER if 'chosen' in row else FINE
        texts = run(lines(source, [other, row, other]))
        assert texts in ({'Hello!'}, {'3'}, {'Ada'}, {'Hello!', 'What?'})


@error_line('or add the role with', 'unknown role {}; use one of')
def test_a_role_can_be_added_to_the_template(tmp_path):
    source = lines(tmp_path / 'rows.jsonl', [FINE, [ASK | {'role': 'judge'}, TELL], FINE])
    assert 'add the role with --template=FILE' in refused(run, source)
    template = prepare.TEMPLATE | {'judge': ['Judge:\n', '\n']}
    (tmp_path / 'template.json').write_text(json.dumps(template))
    assert run(source, f'--template={tmp_path / "template.json"}') == {'Seven.'}


@pytest.mark.parametrize('way', ['drop', 'cut'])
@error_line('tokens, but a packed sequence holds')
def test_a_long_row_is_skipped_or_truncated(tmp_path, way):
    source = lines(tmp_path / 'rows.jsonl', [FINE, talk('Hi', 'x' * 99), FINE])
    assert f'--long={way}' in refused(run, source, '--long=error')
    (answer,) = run(source, f'--long={way}')
    assert answer == 'Fine.' if way == 'drop' else {*answer} == {'x'}


@error_line('the files mix conversations and preference pairs')
def test_conversations_and_pairs_become_two_datasets(tmp_path):
    assert 'a dataset of each' in refused(run, lines(tmp_path / 'rows.jsonl', [FINE, BETTER]))
    assert run(lines(tmp_path / 'talks.jsonl', [FINE, GOOD])) == {'Seven.'}
    assert run(lines(tmp_path / 'pairs.jsonl', [BETTER, PAIR])) == {'Seven.', 'Six.'}


# -----------------------------------------------------------------------------
# files

ROWS = [json.dumps(row) for row in (FINE, GOOD, FINE)]
JSON_LINES, ARRAY = '\n'.join(ROWS), f'[{", ".join(ROWS)}]'
NOT_A_NUMBER = GOOD | {'weight': float('nan')}


@pytest.mark.parametrize(
    ('name', 'content', 'other_name', 'good'),
    [
        case('not UTF-8; save', 'a.jsonl', JSON_LINES.encode('utf-16'), 'a.jsonl', JSON_LINES),
        case('per line, or one array', 'a.jsonl', JSON_LINES[:-1], 'a.jsonl', JSON_LINES),
        case('per line, or one array', 'a.jsonl', '[\n' + ARRAY[1:], 'a.json', ARRAY),
        case('write one array, or one', 'a.json', ARRAY[:-1], 'a.json', ARRAY),
        case(
            'write one array, or one',
            'a.json',
            f'[{JSON_LINES}]',
            'a.json',
            JSON_LINES,
        ),
        case('is an array of conversations', 'a.jsonl', ARRAY, 'a.jsonl', JSON_LINES),
        case('is an array of conversations', 'a.jsonl', ARRAY, 'a.json', ARRAY),
        case(
            '{} is not valid JSON',
            'a.json',
            json.dumps([FINE, NOT_A_NUMBER, FINE]),
            'a.json',
            json.dumps([FINE, NOT_A_NUMBER | {'weight': None}, FINE]),
        ),
        case('duplicate key', 'a.json', ARRAY.replace('{', '{"id": 1, "id": 2,'), 'a.json', ARRAY),
    ],
)
def test_a_file_is_read_once_its_advice_is_followed(tmp_path, name, content, other_name, good):
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refused(run, source).startswith(str(source))
    source = source.rename(tmp_path / other_name)
    source.write_text(good)
    assert run(source) == {'Seven.'}


@pytest.mark.parametrize(
    ('rows', 'advice'),
    [
        case('{}: no samples for {}: {}', ['', ' '], 'add FILES'),
        case('{}: no samples for {}: {}', [json.dumps(talk('a', ''))], 'add FILES'),
        case('{}: no samples for {}: {}', [json.dumps(talk('x', 'y' * 99))] * 2, '--long=cut'),
        case('a single sample', ROWS[:1], '--val=FILE'),
    ],
)
def test_a_split_has_samples_once_its_advice_is_followed(tmp_path, rows, advice):
    source = tmp_path / 'rows.jsonl'
    source.write_text('\n'.join(rows))
    assert advice in refused(run, source)
    more = lines(tmp_path / 'more.jsonl', [FINE, GOOD])
    flag = {'add FILES': str(more), '--val=FILE': f'--val={more}'}.get(advice, advice)
    (answer,) = run(source, flag)
    assert answer in ('Seven.', 'Fine.') or {*answer} == {'y'}


@error_line('{}: no samples for {}: {}', 'all FILES are also given as --val')
def test_files_for_training_and_for_validation_are_added_where_there_are_none(tmp_path):
    source, more = (lines(tmp_path / f'{name}.jsonl', [GOOD]) for name in 'ab')
    assert 'add other files' in refused(run, source, f'--val={source}')
    assert run(more, str(source), f'--val={source}') == {'Seven.'}
    blank = tmp_path / 'blank.jsonl'
    blank.write_text('\n')
    assert 'for val: the files are blank; add --val files' in refused(run, source, f'--val={blank}')
    assert run(source, f'--val={blank}', f'--val={more}') == {'Seven.'}


# -----------------------------------------------------------------------------
# templates


@pytest.mark.parametrize(
    ('content', 'advice'),
    [
        case('it has no text after', '{"assistant": ["a", ""]}', 'choose another'),
        case('{}: {}; choose another with', '{"user": ["a", "b"]}', 'choose another'),
        case('{}; it must look like', '{', 'it must look like'),
        case('it must be a JSON object', '[]', 'it must look like'),
        case('{}; it must look like', '[' * 100_000, 'it must look like'),
    ],
)
def test_a_template_is_read_once_its_advice_is_followed(tmp_path, content, advice):
    source = lines(tmp_path / 'rows.jsonl', [FINE, GOOD])
    template = tmp_path / 'template.json'
    template.write_text(content)
    message = refused(run, source, f'--template={template}')
    assert advice in message
    template.write_text(message.partition('look like ')[2] or json.dumps(prepare.TEMPLATE))
    assert run(source, f'--template={template}') == {'Seven.'}


@error_line("the assistant's message contains {}", '{}: {}; choose another with')
def test_a_template_is_chosen_that_suits_the_tokenizer_and_the_answers(tmp_path):
    char_tokenizer('How?Fine. many?Svn\n').save(tmp_path / 'letters.json')
    tokenizer = f'--tokenizer={tmp_path / "letters.json"}'
    template = tmp_path / 'template.json'
    source = lines(tmp_path / 'rows.jsonl', [FINE, reply(content='Seven.\nSeven.')])
    message = refused(run, source, tokenizer)
    assert "character 's'" in message
    assert 'choose another with --template=FILE' in message  # the default needs other letters
    template.write_text(json.dumps({'user': ['', '\n'], 'assistant': ['', '\n']}))
    message = refused(run, source, tokenizer, f'--template={template}')
    assert "line 2: messages[1]: the assistant's message contains '\\n'" in message
    assert 'choose another end with --template=FILE' in message
    template.write_text(json.dumps({'user': ['', '\n'], 'assistant': ['', '???']}))
    assert run(source, tokenizer, f'--template={template}') == {'Seven.\nSeven.???'}


# -----------------------------------------------------------------------------
# commands


def prepare_in(tmp_path, monkeypatch, *flags):
    """Prepare rows.jsonl of the current folder, with data/ there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, 'DATA', tmp_path / 'data')
    lines(tmp_path / 'rows.jsonl', [FINE, GOOD])
    prepare.main(['--tokenizer=byte', *flags])
    return trained_on(tmp_path / 'data' / 'talks')


@pytest.mark.parametrize(
    'flags',
    [
        case('no name for the dataset', []),
        case('use letters, digits', ['--name=a/b']),
        case('use letters, digits', ['--name=.a']),
        case('both set the output folder', ['--name=talks', '--out_dir=o']),
    ],
)
def test_a_dataset_with_one_valid_name_is_prepared(tmp_path, monkeypatch, flags):
    assert '--name=' in refused(prepare_in, tmp_path, monkeypatch, 'rows.jsonl', *flags)
    assert prepare_in(tmp_path, monkeypatch, 'rows.jsonl', '--name=talks') == {'Seven.'}


@error_line('no FILES; run')
def test_the_command_in_an_error_line_works(tmp_path, monkeypatch):
    message = refused(prepare_in, tmp_path, monkeypatch, '--block_size=64')
    command = re.search(rf'{prepare.COMMAND} (\S+ --name=\S+)', message)[1]
    command = command.replace('FILES', 'rows.jsonl').split()
    assert prepare_in(tmp_path, monkeypatch, *command) == {'Seven.'}


@pytest.mark.parametrize('size', [1, 2**20 + 1])
@error_line('--block_size={}: must be between')
def test_a_block_size_within_the_bounds_works(tmp_path, monkeypatch, size):
    command = ['rows.jsonl', '--name=talks', '--long=error']
    message = refused(prepare_in, tmp_path, monkeypatch, *command, f'--block_size={size}')
    low, high = map(int, re.search(r'between (\d+) and (\d+)', message).groups())
    assert low == 2
    flags = [*command, f'--block_size={64 if size == 1 else high}']
    assert prepare_in(tmp_path, monkeypatch, *flags) == {'Seven.'}


# -----------------------------------------------------------------------------
# messages of a request to the server


@error_line('unknown role {}; use one of')
def test_a_role_that_the_line_lists_is_taken():
    template = {'user': ['', ''], 'assistant': ['', '']}
    message = refused(template_role, 'critic', template)
    for role in message.partition('use one of ')[2].split(', '):
        assert template_role(role, template) == role


@error_line('it must be an object like')
def test_the_part_in_an_error_line_is_taken():
    message = refused(content_text, ['Hi'])
    assert content_text([json.loads(message.partition('like ')[2])]) == 'Hi'
