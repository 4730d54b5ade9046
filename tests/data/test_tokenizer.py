import json
import os
import pickle
import re
import sys
import types

import numpy as np
import pytest
import requests
import tiktoken
import tiktoken_ext.openai_public

from flatgpt.data import encode as encode_module
from flatgpt.data.bpe import train_bpe
from flatgpt.data.dataset import Writer
from flatgpt.data.tokenizer import (
    EOT,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    from_nanogpt_meta,
    get_tokenizer,
    self_check_text,
    tiktoken_tokenizer,
)
from flatgpt.data.tokenizer import (
    load as load_tokenizer,
)
from flatgpt.errors import UserError

TEXT = 'To be, or not to be: that is the question. Whether tis nobler in the mind to suffer\n' * 40
needs_gpt2 = pytest.mark.skipif(
    'TIKTOKEN_CACHE_DIR' not in os.environ, reason='TIKTOKEN_CACHE_DIR has the gpt2 vocabulary'
)


@pytest.fixture(scope='module')
def bpe():
    return train_bpe([TEXT], 300)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(url, **_):
        raise requests.ConnectionError('no route to host')

    monkeypatch.setattr(requests, 'get', refuse)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'cache'))


def every_kind(bpe):
    return [char_tokenizer(sorted(set(TEXT + EOT)), eot=True), byte_tokenizer(), bpe]


def one_line(error) -> str:
    assert '\n' not in str(error.value)
    return str(error.value)


def test_every_kind_decodes_to_the_same_text(bpe):
    for tokenizer in every_kind(bpe):
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT
        assert ids.dtype == np.uint16
        assert ids.max() < tokenizer.vocab_size


def test_end_of_text_is_an_id_only_if_allowed(bpe):
    for tokenizer in every_kind(bpe):
        text = f'be{EOT}not{EOT}'
        plain, marked = tokenizer.encode(text), tokenizer.encode(text, allow_eot=True)
        assert tokenizer.eot not in plain
        assert list(marked).count(tokenizer.eot) == 2
        assert marked[-1] == tokenizer.eot
        assert tokenizer.decode(plain) == tokenizer.decode(marked) == text


def test_empty_text_has_no_ids(bpe):
    for tokenizer in every_kind(bpe):
        assert len(tokenizer.encode('')) == 0
        assert tokenizer.decode([]) == ''


def test_char_ids_follow_the_given_order():
    tokenizer = char_tokenizer('zaé')
    assert tokenizer.encode('aézz').tolist() == [1, 2, 0, 0]
    assert tokenizer.vocab_size == 3
    assert tokenizer.eot is None


def test_an_unknown_character_is_reported_with_its_position():
    with pytest.raises(UserError) as error:
        char_tokenizer('abc').encode('abcaéb')
    assert re.search(r"'é' \(U\+00E9\) at position 4\b", one_line(error))


def test_the_position_of_an_unknown_character_includes_end_of_text_tokens():
    with pytest.raises(UserError, match=f'at position {2 + len(EOT)}:'):
        char_tokenizer('ab', eot=True).encode(f'ab{EOT}z', allow_eot=True)


def test_a_character_above_all_known_ones_is_unknown_too():
    with pytest.raises(UserError, match='position 1'):
        char_tokenizer('abc').encode('a\U0001f600')


def test_the_byte_tokenizer_encodes_any_text():
    tokenizer = byte_tokenizer()
    text = 'é字\U0001f600\0\r\n'
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)


def test_half_a_character_becomes_the_replacement_character():
    assert byte_tokenizer().decode('é'.encode()[:1]) == '\ufffd'


def test_half_a_surrogate_pair_does_not_stop_encoding(bpe):
    for tokenizer in (byte_tokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode('a\ud83db')) == 'a?b'


def test_byte_lengths_add_up_to_the_bytes_of_the_text(bpe):
    for tokenizer in every_kind(bpe):
        ids = tokenizer.encode(TEXT + EOT, allow_eot=True)
        assert tokenizer.byte_lengths()[ids].sum() == len(TEXT.encode())


def test_bpe_has_the_requested_size_and_shortens_the_text(bpe):
    assert bpe.vocab_size == 300
    assert bpe.eot == 299
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2


def test_bpe_encodes_text_it_never_saw(bpe):
    text = "Ünïcode 字 \U0001f600 don't  \t\r\n 12345"
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_training_is_reproducible():
    again = train_bpe(iter(TEXT.splitlines(keepends=True)), 300)
    assert train_bpe(iter(TEXT.splitlines(keepends=True)), 300) == again


def test_bpe_stops_where_nothing_is_left_to_merge():
    tokenizer = train_bpe(['abab'], 5000)
    assert tokenizer.vocab_size < 300
    assert tokenizer.decode(tokenizer.encode('abab')) == 'abab'


def test_bpe_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match='258'):
        train_bpe([TEXT], 200)


def test_ids_above_65535_are_uint32():
    characters = [chr(c) for c in range(0x20000) if not 0xD800 <= c < 0xE000][:70000]
    tokenizer = char_tokenizer(characters)
    ids = tokenizer.encode(characters[-1] + 'a')
    assert ids.dtype == np.uint32
    assert ids[0] == 69999
    assert tokenizer.decode(ids) == characters[-1] + 'a'
    assert char_tokenizer(characters[:65536]).dtype == np.uint16


def test_a_saved_tokenizer_needs_no_network(bpe, tmp_path, no_network):
    for tokenizer in every_kind(bpe):
        tokenizer.save(tmp_path / 'tokenizer.json')
        loaded = load_tokenizer(tmp_path / 'tokenizer.json')
        assert loaded == tokenizer
        assert loaded.to_dict() == tokenizer.to_dict()
        assert loaded.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.json']


def test_a_failed_save_keeps_the_old_file(bpe, tmp_path, monkeypatch):
    path = tmp_path / 'tokenizer.json'
    bpe.save(path)

    def full(*_):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='full'):
        byte_tokenizer().save(path)
    assert load_tokenizer(path) == bpe


def test_tokenizers_that_encode_alike_are_equal(bpe):
    assert char_tokenizer('abc') == char_tokenizer('abc')
    assert char_tokenizer('abc') != char_tokenizer('acb')
    assert char_tokenizer('abc') != char_tokenizer('abc', eot=True)
    assert byte_tokenizer() != bpe
    assert Tokenizer.from_dict({**bpe.to_dict(), 'name': 'mine'}) == bpe
    assert byte_tokenizer() != 'byte'


def test_unused_ids_have_no_bytes(monkeypatch):
    ranks = {bytes([b]): b for b in range(256)}
    special = {EOT: 260, '<|pad|>': 261}
    encoding = tiktoken.Encoding(
        'gappy', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: encoding)
    tokenizer = tiktoken_tokenizer('gappy')
    assert tokenizer.vocab_size == 262
    assert tokenizer.token_bytes[256:260] == [None] * 4
    assert tokenizer.byte_lengths()[256:].tolist() == [0] * 6
    assert tokenizer.decode([97, 258, 260]) == f'a{EOT}'
    loaded = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert loaded == tokenizer
    assert loaded.encode(f'a{EOT}<|pad|>', allow_eot=True).max() == 260


@needs_gpt2
def test_gpt2_ids_are_those_of_tiktoken():
    tokenizer = get_tokenizer('gpt2')
    reference = tiktoken.get_encoding('gpt2')
    text = TEXT + "  don't 字 \U0001f600\n\n\t" + EOT
    assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
    assert tokenizer.encode(text, allow_eot=True)[-1] == tokenizer.eot == 50256
    assert tokenizer.vocab_size == 50257
    assert Tokenizer.from_dict(tokenizer.to_dict()).encode(text).tolist() == list(
        tokenizer.encode(text)
    )


@needs_gpt2
def test_the_two_names_of_gpt2s_vocabulary_are_equal():
    assert get_tokenizer('gpt2') == get_tokenizer('r50k_base')


def test_offline_the_line_has_the_url_and_where_to_save_it(no_network, tmp_path):
    with pytest.raises(UserError) as error:
        get_tokenizer('cl100k_base')
    message = one_line(error)
    assert 'https://' in message
    assert str(tmp_path / 'cache') in message
    assert 'TIKTOKEN_CACHE_DIR' in message


def test_a_mistyped_tokenizer_gets_a_suggestion():
    with pytest.raises(UserError, match=r'did you mean gpt2\?'):
        get_tokenizer('gtp2')
    with pytest.raises(UserError, match='use byte'):
        get_tokenizer('zzzzzz')


def test_tokenizers_made_from_text_are_not_found_by_name():
    for name in ('char', 'bpe'):
        with pytest.raises(UserError, match=r'data/text/prepare\.py'):
            get_tokenizer(name)


@pytest.mark.parametrize('content', ['', '{', '[]', '{"kind": "char"}', '{"tokens": 3}'])
def test_a_damaged_tokenizer_file_is_refused(tmp_path, content):
    path = tmp_path / 'tokenizer.json'
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert str(path) in one_line(error)


def test_a_missing_tokenizer_file_is_reported(tmp_path):
    with pytest.raises(UserError, match='no such file; prepare'):
        load_tokenizer(tmp_path / 'tokenizer.json')


def test_nanogpts_characters_are_read(tmp_path):
    path = tmp_path / 'meta.pkl'
    itos = dict(enumerate('\n abc'))
    meta = {'vocab_size': 5, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}
    path.write_bytes(pickle.dumps(meta))
    tokenizer = from_nanogpt_meta(path)
    assert tokenizer == char_tokenizer('\n abc')
    assert tokenizer.encode('cab').tolist() == [4, 2, 3]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, 'w'))


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_a_pickle_runs(tmp_path, protocol):
    path, proof = tmp_path / 'meta.pkl', tmp_path / 'proof'
    path.write_bytes(pickle.dumps({'itos': {0: 'a'}, 'x': Trap(str(proof))}, protocol))
    with pytest.raises(UserError) as error:
        from_nanogpt_meta(path)
    assert 'could run code' in one_line(error)
    assert not proof.exists()


@pytest.mark.parametrize(
    'content', [b'', b'not a pickle', pickle.dumps(3), pickle.dumps({'itos': {0: 'two'}})]
)
def test_a_pickle_without_characters_is_refused(tmp_path, content):
    path = tmp_path / 'meta.pkl'
    path.write_bytes(content)
    with pytest.raises(UserError, match='not the meta'):
        from_nanogpt_meta(path)


# --- gigatoken


def small_gpt2():
    """GPT-2's way of splitting text, over a vocabulary that needs no download."""
    merges = ['th', 'the', 'in', 'ing', 'er', ' t', ' th', ' the', 're', ' w', 'nd', 'and', '12']
    merges += ['123', '..', '...', '  ', '    ', '\n\n', "'l", "'ll", 'é']
    tokens = [bytes([b]) for b in range(256)] + [merge.encode() for merge in dict.fromkeys(merges)]
    special = {EOT: len(tokens)}
    tokens.append(EOT.encode())
    pattern = tiktoken_ext.openai_public.r50k_pat_str
    return Tokenizer('tiktoken', 'gpt2', tokens, special, pattern)


def test_gigatoken_gives_tiktokens_ids_for_the_self_check_text():
    pytest.importorskip('gigatoken', reason='gigatoken is not installed')
    slow, fast = small_gpt2(), small_gpt2()
    assert fast.accelerate() == ''
    for seed in range(20):
        text = self_check_text(seed, pieces=1000)
        assert np.array_equal(fast.encode(text), slow.encode(text))
        assert np.array_equal(fast.encode(text, allow_eot=True), slow.encode(text, allow_eot=True))
    assert fast.encode('').tolist() == []
    assert fast.encode('\ud800').tolist() == slow.encode('\ud800').tolist()


@needs_gpt2
def test_gigatoken_gives_gpt2s_ids():
    pytest.importorskip('gigatoken', reason='gigatoken is not installed')
    slow, fast = get_tokenizer('gpt2'), get_tokenizer('gpt2')
    assert fast.accelerate() == ''
    text = ''.join(self_check_text(seed) for seed in range(5))
    assert np.array_equal(fast.encode(text), slow.encode(text))


def test_without_gigatoken_tiktoken_encodes_and_the_log_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'gigatoken.gigatoken_rs', None)
    monkeypatch.setattr(encode_module, 'MIN_PARALLEL_BYTES', 10)
    tokenizer = small_gpt2()
    with Writer(tmp_path, tokenizer) as writer:
        chunks = [(0, split, 'the end of the thing', 20) for split in ('train', 'val')]
        encode_module.write_chunks(writer, chunks, workers=1, total=40)
    assert 'encoding with tiktoken' in capsys.readouterr().out
    ids = np.fromfile(tmp_path / 'val.bin', np.uint16)
    assert tokenizer.decode(ids) == 'the end of the thing'


def test_a_gigatoken_that_encodes_differently_is_not_used(monkeypatch):
    class Other:
        def encode(self, text):
            return np.zeros(len(text), np.uint32)

    fake = types.SimpleNamespace(
        BPETokenizer=types.SimpleNamespace(from_tiktoken=lambda path, scheme: Other())
    )
    monkeypatch.setitem(sys.modules, 'gigatoken.gigatoken_rs', fake)
    tokenizer = small_gpt2()
    assert 'different ids' in tokenizer.accelerate()
    assert tokenizer.decode(tokenizer.encode('the end')) == 'the end'


def test_bpe_learned_from_text_uses_tiktoken(bpe):
    assert 'does not support bpe' in bpe.accelerate()


def test_a_chat_template_is_kept_and_a_broken_one_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {'user': ['u: ', '\n'], 'assistant': ['a: ', '<|endoftext|>']}
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.chat_template == tokenizer.chat_template
    ids = again.encode_chat([{'role': 'user', 'content': 'x<|endoftext|>'}]).tolist()
    assert bytes(ids) == b'u: x<|endoftext|>\na: '
    assert again.stop_ids == {256}
    with pytest.raises(UserError, match=r"messages\[0\]: unknown role 'tool'; use user, assistant"):
        again.encode_chat([{'role': 'tool', 'content': ''}])
    for broken in ({'user': ['', '']}, {'assistant': ['a']}, {'assistant': [1, 2]}, ['a']):
        with pytest.raises(UserError, match='not a tokenizer of flatGPT'):
            Tokenizer.from_dict({**tokenizer.to_dict(), 'chat_template': broken})


# --- found by path or name


def test_a_tokenizer_is_found_in_a_run_a_checkpoint_a_file_and_by_name(bpe, tmp_path, monkeypatch):
    from flatgpt.data.hf_tokenizer import find_tokenizer, tokenizer_json

    for step, tokenizer in ((2, byte_tokenizer()), (10, bpe)):
        (tmp_path / f'run/checkpoints/step-{step:08d}').mkdir(parents=True)
        tokenizer.save(tmp_path / f'run/checkpoints/step-{step:08d}/tokenizer.json')
    (tmp_path / 'theirs').mkdir()
    (tmp_path / 'theirs/tokenizer.json').write_text(json.dumps(tokenizer_json(bpe)))
    (tmp_path / 'nano').mkdir()
    (tmp_path / 'nano/meta.pkl').write_bytes(pickle.dumps({'itos': dict(enumerate('ab'))}))
    monkeypatch.chdir(tmp_path)
    for where in ('run', 'run/checkpoints/step-00000010', 'theirs', 'theirs/tokenizer.json'):
        assert find_tokenizer(where) == bpe
    assert find_tokenizer('run/checkpoints/step-00000002/tokenizer.json') == byte_tokenizer()
    assert find_tokenizer('byte') == byte_tokenizer()
    assert find_tokenizer('nano') == find_tokenizer('nano/meta.pkl') == char_tokenizer('ab')
    (tmp_path / 'empty').mkdir()
    for where in ('empty', 'no/such', 'no.json', 'no.pkl', ''):
        with pytest.raises(UserError) as error:
            find_tokenizer(where)
        assert f'--tokenizer={where}: ' in one_line(error)


@pytest.mark.parametrize('letter', ['a', ' ', '-'])
def test_a_word_of_a_million_letters_is_encoded(bpe, letter):
    text = f'To be {letter * 1_000_000} or not'
    _, ids = encode_module.encode_job((0, [('train', False, text)]), bpe)
    assert bpe.decode(ids['train'].tolist()) == text
