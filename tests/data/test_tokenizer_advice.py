"""The error lines of tokenizers: each is provoked, and its advice followed."""

import json
import pickle
from pathlib import Path

import pytest
import requests
import tiktoken
import tiktoken.load
from error_lines import case, error_line
from test_tokenizer import Trap

from flatgpt.data import text
from flatgpt.data.dataset import Dataset
from flatgpt.data.hf_tokenizer import find_tokenizer
from flatgpt.data.tokenizer import (
    EOT,
    byte_tokenizer,
    char_tokenizer,
    from_nanogpt_meta,
    get_tokenizer,
    load,
    train_bpe,
)
from flatgpt.errors import UserError

WORDS = 'The cat sat on the mat, and the dog ran off. '
URL = 'https://example.org/bytes.tiktoken'


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


@error_line('not in the vocabulary; use only')
def test_a_text_with_only_the_characters_of_the_line_is_encoded():
    message = refused(char_tokenizer('abc').encode, 'abcd')
    known = message.partition("use only '")[2].rstrip("'")
    assert char_tokenizer('abc').encode(known).tolist() == [0, 1, 2]


@error_line('unknown role')
def test_the_roles_of_the_line_are_rendered():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'user': ['u', '\n'], 'assistant': ['a', EOT]}
    message = refused(tokenizer.encode_chat, [{'role': 'tool', 'content': ''}])
    for role in message.partition('; use ')[2].split(', '):
        assert len(tokenizer.encode_chat([{'role': role, 'content': ''}])) > 1


@error_line('must be made from text')
def test_the_command_of_the_line_makes_a_char_or_bpe_tokenizer(monkeypatch):
    for name in ('flatgpt.data.dataset.DATA', 'flatgpt.data.text.DATA'):
        monkeypatch.setattr(name, Path('data'))
    Path('a.txt').write_text(WORDS * 20)
    for name in ('char', 'bpe'):
        message = refused(get_tokenizer, name)
        command, _, flag = message.partition('; run ')[2].partition(', and use --tokenizer=')
        text.main(command.replace('FILES', 'a.txt').split()[2:])
        assert find_tokenizer(flag).kind == name


@error_line('or the path of a run, a tokenizer.json')
def test_the_names_and_paths_of_the_line_are_found():
    assert 'did you mean byte? use byte, char, bpe, ' in refused(get_tokenizer, 'bytes')
    assert get_tokenizer('byte') == byte_tokenizer()
    byte_tokenizer().save('tokenizer.json')
    assert find_tokenizer('tokenizer.json') == byte_tokenizer()


@error_line('no such file; prepare the dataset again')
def test_a_dataset_prepared_again_has_a_tokenizer():
    Path('a.txt').write_text(WORDS * 20)
    argv = ['a.txt', '--out_dir=out', '--tokenizer=byte']
    text.main(argv)
    Path('out/tokenizer.json').unlink()
    refused(lambda: Dataset('out', 1).tokenizer)
    text.main(argv)
    assert Dataset('out', 1).tokenizer == byte_tokenizer()


CHAT = {'user': ['', ''], 'assistant': ['', '']}
ADDED = {'text': 'cat', 'id': 5}


@error_line('create or copy the file again')
@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('special_tokens: an id', {'special_tokens': {EOT: 257}}, {'special_tokens': {EOT: 256}}),
        case('each role needs two texts', {'chat_template': CHAT | {'user': ['']}},
             {'chat_template': CHAT}),
        case('needs the role assistant', {'chat_template': {'user': ['', '']}},
             {'chat_template': CHAT}),
        case('added_tokens or end_ids', {'end_ids': [257]}, {'end_ids': [256]}),
        case('added_tokens: one has no', {'added_tokens': [ADDED | {'text': ''}]},
             {'added_tokens': [ADDED]}),
        case('not a tokenizer of flatGPT', {'tokens': None}, {}),
    ],
)  # fmt: skip
def test_a_tokenizer_file_without_the_mistake_of_the_line_is_read(bad, good):
    fields, path = byte_tokenizer().to_dict(), Path('tokenizer.json')
    path.write_text(json.dumps(fields | bad))
    assert str(path) in refused(load, path)
    path.write_text(json.dumps(fields | good))
    assert load(path).encode('a').tolist() == [97]


@error_line('not the meta.pkl of a character dataset')
@pytest.mark.parametrize(
    'bad',
    [
        case('which could run code', {'itos': {0: 'a'}, 'x': Trap('proof')}),
        case('its tokens are not single characters', {'itos': {0: 'two'}}),
    ],
)
def test_a_meta_of_nanogpts_prepare_is_read(bad):
    path = Path('meta.pkl')
    path.write_bytes(pickle.dumps(bad))
    refused(from_nanogpt_meta, path)
    itos = dict(enumerate('abc'))
    meta = {'vocab_size': 3, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}
    path.write_bytes(pickle.dumps(meta))
    assert from_nanogpt_meta(path) == char_tokenizer('abc')


@pytest.fixture
def vocabulary(monkeypatch):
    """tiktoken has one encoding, whose vocabulary is not cached -> the file's content."""
    byte_tokenizer().write_ranks('bytes')

    def encoding():
        ranks = tiktoken.load.load_tiktoken_bpe(URL)
        special = {EOT: 256}
        return dict(name='b', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens=special)

    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setattr(tiktoken.registry, 'ENCODING_CONSTRUCTORS', {'b': encoding})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', 'cache')
    return Path('bytes').read_bytes()


@error_line('is not cached and cannot be downloaded')
@pytest.mark.parametrize('way', ['save', 'set'])
def test_a_vocabulary_saved_where_the_line_says_is_used(vocabulary, monkeypatch, way):
    def get(url, **_):
        raise requests.ConnectionError('no route to host')

    monkeypatch.setattr(requests, 'get', get)
    message = refused(get_tokenizer, 'b')
    path = Path(message.partition('save it as ')[2].partition(', or set')[0])
    if way == 'set':
        path = Path('other') / path.name
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', 'other')
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(vocabulary)
    assert get_tokenizer('b').encode('a').tolist() == [97]


@error_line('that can be written, and try again')
def test_a_cache_folder_that_can_be_written_is_used(vocabulary, monkeypatch):
    class Reply:
        content = vocabulary

        def raise_for_status(self):
            pass

    monkeypatch.setattr(requests, 'get', lambda url, **_: Reply())
    Path('cache').write_text('no folder')
    refused(get_tokenizer, 'b')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', 'writable')
    assert get_tokenizer('b').encode('a').tolist() == [97]


@error_line('must be at least 258')
def test_a_bpe_of_258_tokens_has_one_merge():
    assert '--vocab_size=257' in refused(train_bpe, [WORDS], 257)
    assert train_bpe([WORDS], 258).vocab_size == 258
