"""The error lines of tokenizers: each is provoked, and its advice followed."""

import json
import pickle
from pathlib import Path

import pytest
import requests
import tiktoken
import tiktoken.load
import tokenizers
from conftest import refused
from error_lines import case, error_line
from test_tokenizer import Trap

from flatgpt.data import text
from flatgpt.data.bpe import train_bpe
from flatgpt.data.dataset import Dataset
from flatgpt.data.hf_options import CHARACTER_SPLIT, regex_split
from flatgpt.data.hf_tokenizer import (
    CHAT_TEMPLATE_FILE,
    find_tokenizer,
    tokenizer_json,
    vocabulary_and_merges,
)
from flatgpt.data.tokenizer import (
    EOT,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    from_nanogpt_meta,
    get_tokenizer,
)
from flatgpt.data.tokenizer import (
    load as load_tokenizer,
)

WORDS = 'The cat sat on the mat, and the dog ran off. '
URL = 'https://example.org/bytes.tiktoken'
pytestmark = pytest.mark.usefixtures('in_empty_folder')


@error_line('not in the vocabulary; use only')
def test_a_text_with_only_the_characters_of_the_line_is_encoded():
    message = refused(char_tokenizer('abc').encode, 'abcd')
    known = message.partition("use only '")[2].rstrip("'")
    assert char_tokenizer('abc').encode(known).tolist() == [0, 1, 2]


@error_line('messages[{}]: unknown role')
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
        case('special_tokens: an id', {'special_tokens': {EOT: 257}},
             {'special_tokens': {EOT: 256}}),
        case('chat_template: each role', {'chat_template': CHAT | {'user': ['']}},
             {'chat_template': CHAT}),
        case('chat_template: needs the', {'chat_template': {'user': ['', '']}},
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
    assert str(path) in refused(load_tokenizer, path)
    path.write_text(json.dumps(fields | good))
    assert load_tokenizer(path).encode('a').tolist() == [97]


@error_line('not the meta.pkl of a character dataset')
@pytest.mark.parametrize(
    'bad',
    [
        case('it refers to {}.{}, which could run code', {'itos': {0: 'a'}, 'x': Trap('proof')}),
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


# --- tokenizer.json of `tokenizers`

BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
TEMPLATE = {
    'type': 'TemplateProcessing',
    'single': [
        {'SpecialToken': {'id': EOT, 'type_id': 0}},
        {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
    'special_tokens': {EOT: {'id': EOT, 'ids': [0], 'tokens': [EOT]}},
}


@pytest.fixture(scope='module')
def bpe_json():
    return json.dumps(tokenizer_json(train_bpe([WORDS], 270)))


def splits(*parts):
    return {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [*parts, BYTES]}}


@error_line('unsupported tokenizer')
@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('for a new model, set it to null', {'normalizer': {'type': 'NFC'}},
             {'normalizer': None}),
        case('its decoder is', {'decoder': {'type': 'Fuse'}},
             {'decoder': json.loads(tokenizers.decoders.ByteLevel().__getstate__())}),
        case('adds tokens to each text', {'post_processor': TEMPLATE}, {'post_processor': None}),
        case('={}, which is not supported; set it', {'model': {'dropout': 0.1}},
             {'model': {'dropout': None}}),
        case('use ByteLevel without', splits(regex_split(' ') | {'behavior': 'Removed'}),
             {'pre_tokenizer': BYTES | {'use_regex': True}}),
        case('use ByteLevel without', splits(regex_split(' ') | {'behavior': 'Removed'}),
             splits(regex_split(r'\S+|\s'))),
        case('use one without', splits(regex_split(r'\S++|\s+$')), splits(regex_split(r'\S+|\s'))),
        case('match all characters', splits(regex_split(r'\p{L}+')),
             splits(regex_split(r'\p{L}+|\S|\s'))),
        case('does not split text; set its use_regex', {'pre_tokenizer': BYTES},
             {'pre_tokenizer': BYTES | {'use_regex': True}}),
    ],
)  # fmt: skip
def test_a_tokenizer_json_with_the_option_of_the_line_is_read(bpe_json, bad, good):
    content, path = json.loads(bpe_json), Path('tokenizer.json')
    for change in (bad, good):
        model = content['model'] | change.get('model', {})
        path.write_text(json.dumps(content | change | {'model': model}))
        if change is bad:
            refused(find_tokenizer, path)
    assert find_tokenizer(str(path)).decode(find_tokenizer(str(path)).encode(WORDS)) == WORDS


def add_token(content, text, i, *merges):
    content['model']['vocab'][text] = i
    content['model']['merges'] += merges


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('its ids are not unique', lambda c: add_token(c, 'ZQ', 10**6),
             lambda c: add_token(c, 'ZQ', 270)),
        case('has no merge, which', lambda c: (add_token(c, 'ZQ', 270),
             c['model'].update(ignore_merges=True)), lambda c: add_token(c, 'ZQ', 270)),
        case('of the 256 bytes; train it', lambda c: c['model']['vocab'].pop('Z'), lambda c: None),
        case('are not in the order of its ids', lambda c: c['model']['merges'].reverse(),
             lambda c: c['model']['merges'].sort(
                 key=lambda pair: c['model']['vocab'][''.join(pair)])),
        case('is not what its merges make', lambda c: (
             add_token(c, 'ZQ', 270, ['Z', 'Q']), add_token(c, 'QX', 271, ['Q', 'X']),
             add_token(c, 'ZQX', 272, ['Z', 'QX'])), lambda c: (
             add_token(c, 'ZQ', 270, ['Z', 'Q']), add_token(c, 'QX', 271, ['Q', 'X']))),
        case('its model has the type', lambda c: c.update(
             model={'type': 'WordPiece', 'vocab': {'a': 0}}), lambda c: None),
    ],
)  # fmt: skip
def test_a_tokenizer_json_with_the_vocabulary_of_the_line_is_read(bpe_json, bad, good):
    path = Path('tokenizer.json')
    for change in (bad, good):
        content = json.loads(bpe_json)
        change(content)
        path.write_text(json.dumps(content))
        if change is bad:
            refused(find_tokenizer, path)
    tokenizer = find_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS


@pytest.mark.parametrize(
    ('bad', 'good'),
    [
        case('does not split text into', {'pre_tokenizer': regex_split(' ')},
             {'pre_tokenizer': CHARACTER_SPLIT}),
        case('its tokens are not all single', {'model': {'vocab': {'a': 0, 'bc': 1}}},
             {'model': {'vocab': {'a': 0, 'b': 1}}}),
    ],
)  # fmt: skip
def test_a_tokenizer_json_of_characters_as_the_line_says_is_read(bad, good):
    content, path = tokenizer_json(char_tokenizer('ab')), Path('tokenizer.json')
    for change in (bad, good):
        model = content['model'] | change.get('model', {})
        path.write_text(json.dumps(content | change | {'model': model}))
        if change is bad:
            refused(find_tokenizer, path)
    assert find_tokenizer(str(path)).encode('ba').tolist() == [1, 0]


@error_line('no such folder or file; give a path')
def test_a_path_that_exists_or_a_name_is_found(bpe_json):
    refused(find_tokenizer, 'run/x.json')
    assert find_tokenizer('byte') == byte_tokenizer()
    Path('run').mkdir()
    Path('run/x.json').write_text(bpe_json)
    assert find_tokenizer('run/x.json').kind == 'bpe'


@error_line('the folder has no tokenizer and no checkpoint')
def test_a_folder_with_a_tokenizer_json_is_found(bpe_json):
    Path('run').mkdir()
    refused(find_tokenizer, 'run')
    Path('run/tokenizer.json').write_text(bpe_json)
    assert find_tokenizer('run').kind == 'bpe'


@pytest.mark.parametrize(
    ('name', 'bad', 'good'),
    [
        case('give it the same id in both', 'tokenizer_config.json',
             {'added_tokens_decoder': {'9': {'content': EOT}}},
             {'added_tokens_decoder': {'269': {'content': EOT}}}),
        case('give an id or a list of ids', 'config.json', {'eos_token_id': EOT},
             {'eos_token_id': 269}),
        case('give an id or a list of ids', 'config.json', {'eos_token_id': EOT},
             {'eos_token_id': [269]}),
        case('invalid chat template: {}; fix or', CHAT_TEMPLATE_FILE, {'assistant': 3},
             {'assistant': ['', '']}),
    ],
)  # fmt: skip
def test_a_file_beside_the_tokenizer_as_the_line_says_is_read(bpe_json, name, bad, good):
    Path('run').mkdir()
    Path('run/tokenizer.json').write_text(bpe_json)
    Path('run', name).write_text(json.dumps(bad))
    assert name in refused(find_tokenizer, 'run') or 'added token' in refused(find_tokenizer, 'run')
    Path('run', name).write_text(json.dumps(good))
    assert find_tokenizer('run').eot == 269


@error_line('is also a plain token')
def test_a_special_token_with_another_name_is_exported():
    own = byte_tokenizer()
    own.special = {'a': 256}
    refused(tokenizer_json, own)
    own.special = {'[a]': 256}
    assert tokenizer_json(own)['added_tokens'][0]['content'] == '[a]'


@error_line('is not a merge of two earlier')
def test_another_tokenizer_is_exported():
    tokens = [*byte_tokenizer().token_bytes[:256], b'the', EOT.encode()]
    refused(vocabulary_and_merges, Tokenizer('bpe', 'bpe', tokens, {EOT: 257}, r'\S+|\s'))
    assert vocabulary_and_merges(train_bpe([WORDS], 260))[1]
