"""Datasets of prompts for reinforcement learning."""

import json

import pytest
from conftest import saved
from error_lines import case, error_line

from flatgpt.data import prompts
from flatgpt.data.cache import copy_to_cache
from flatgpt.data.dataset import Dataset
from flatgpt.data.tokenizer import byte_tokenizer
from flatgpt.errors import UserError

RECORDS = [{'prompt': f'{a}+{b}', 'answer': str(a + b)} for a in range(4) for b in range(5)]


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
    return str(path)


def prepared(tmp_path, records, *flags):
    folder = tmp_path / 'prompts'
    file = write(tmp_path / 'records.jsonl', records)
    prompts.main([file, f'--out_dir={folder}', '--tokenizer=byte', *flags])
    return Dataset(folder, 128, objective='rl')


def text_of(data, prompt):
    return data.tokenizer.decode(prompt.ids)


def test_a_prompt_is_the_users_message_and_the_start_of_the_reply(tmp_path):
    data = prepared(tmp_path, RECORDS)
    (first,) = data.prompts('val', [0])
    assert text_of(data, first) == 'User:\n0+0\nAssistant:\n'
    assert first.record == RECORDS[0]


def test_a_plain_prompt_is_its_text_alone(tmp_path):
    data = prepared(tmp_path, RECORDS, '--plain')
    assert text_of(data, data.prompts('val', [0])[0]) == '0+0'
    assert data.tokenizer.chat_template is None


def test_messages_and_a_system_message_are_rendered(tmp_path):
    records = [{'messages': [{'role': 'user', 'content': 'Hé'}], 'system': 'Be brief.', 'n': [1]}]
    data = prepared(tmp_path, records * 2)
    (first,) = data.prompts('train', [0])
    assert text_of(data, first) == 'System:\nBe brief.\nUser:\nHé\nAssistant:\n'
    assert first.record == records[0]


def test_a_dialogue_in_one_string_ends_where_the_reply_begins(tmp_path):
    data = prepared(tmp_path, [{'prompt': '\n\nHuman: Hi\n\nAssistant:'}] * 2)
    assert text_of(data, data.prompts('train', [0])[0]) == 'User:\nHi\nAssistant:\n'


def test_the_next_command_names_a_run_that_exists(tmp_path, capsys):
    prepared(tmp_path, RECORDS)
    assert '--init_from=RUN' in capsys.readouterr().out
    run = saved(tmp_path / 'run', byte_tokenizer(), block_size=64)
    prepared(tmp_path, RECORDS, f'--tokenizer={run}')
    assert f'--init_from={run}' in capsys.readouterr().out


def test_each_epoch_has_every_prompt_once(tmp_path):
    data = prepared(tmp_path, RECORDS)
    windows = data.windows(0, 2 * data.n_windows)
    asked = [prompt.record['prompt'] for prompt in data.prompts('train', windows)]
    assert len({*asked}) == data.n_windows == 18
    assert sorted(asked[:18]) == sorted(asked[18:]) != asked[:18]


def test_a_cached_copy_has_the_records(tmp_path):
    data = prepared(tmp_path, RECORDS)
    copied = Dataset(copy_to_cache(str(data.folder), str(tmp_path / 'cache')), 128, 1337, 'rl')
    assert copied.prompts('val', [1]) == data.prompts('val', [1])


def test_damaged_records_are_refused(tmp_path):
    data = prepared(tmp_path, RECORDS)
    path = data.folder / 'train.records.jsonl'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match='prepare the dataset again'):
        Dataset(data.folder, 128, objective='rl')


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('its fields are', {'question': 'Hi'}, {'prompt': 'Hi', 'question': 'Hi'}),
        case(
            "gives both 'messages' and 'prompt'",
            {'prompt': 'Hi', 'messages': [{'role': 'user', 'content': 'Hi'}]},
            {'messages': [{'role': 'user', 'content': 'Hi'}]},
        ),
        case(
            'ends with a message of the assistant',
            {'messages': [{'role': 'assistant', 'content': 'Hi'}]},
            {'messages': [{'role': 'user', 'content': 'Hi'}], 'reply': 'Hi'},
        ),
        case(
            "'history' is no part of a prompt",
            {'prompt': 'Hi', 'history': [['a', 'b']]},
            {'prompt': 'Hi'},
        ),
        case('a message is empty', {'prompt': ' '}, {'prompt': 'Hi'}),
        case(
            'a message is empty',
            {'messages': [{'role': 'user', 'content': ''}]},
            {'messages': [{'role': 'user', 'content': 'Hi'}]},
        ),
    ],
)
def test_an_invalid_record_is_one_line_with_its_place(tmp_path, bad, good):
    with pytest.raises(UserError, match='line 1'):
        prepared(tmp_path, [bad, bad])
    assert not (tmp_path / 'prompts' / 'meta.json').exists()
    prepared(tmp_path, [good, good])


@error_line('its prompt has {} tokens, and the context of', 'no prompts for {}; add more')
def test_prompts_must_fit_and_be_enough(tmp_path):
    run = saved(tmp_path / 'run', byte_tokenizer(), block_size=16)
    flags = ('--plain', f'--tokenizer={run}')
    with pytest.raises(UserError, match='line 2: its prompt has 16 tokens'):
        prepared(tmp_path, [{'prompt': 'a' * 15}, {'prompt': 'a' * 16}], *flags)
    with pytest.raises(UserError, match='no prompts for train'):
        prepared(tmp_path, [{'prompt': 'a' * 15}], *flags)
    assert prepared(tmp_path, [{'prompt': 'a' * 15}] * 2, *flags).n_windows == 1


@error_line('no FILES with prompts', '--plain uses no chat template')
def test_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'prepare\.py FILES'):
        prompts.main(['--name=sums'])
    template = tmp_path / 'template.json'
    template.write_text(json.dumps({'user': ['', '='], 'assistant': ['', '<|endoftext|>']}))
    with pytest.raises(UserError, match='omit it or'):
        prepared(tmp_path, RECORDS, '--plain', f'--template={template}')
    data = prepared(tmp_path, RECORDS, f'--template={template}')
    assert text_of(data, data.prompts('val', [0])[0]) == '0+0='


def test_conversations_are_no_prompts(tmp_path):
    data = prepared(tmp_path, RECORDS)
    for objective in ('lm', 'sft', 'dpo'):
        with pytest.raises(UserError, match='contains prompts, for --objective=rl'):
            Dataset(data.folder, 128, objective=objective)
