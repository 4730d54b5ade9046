"""Tokenizers of `transformers`: ids, stop ids, and a line for each unsupported option."""

import json
import random
import time

import numpy as np
import pytest
import tokenizers
import torch
from conftest import refused
from tokenizers import AddedToken

from flatgpt.checkpoint.convert import export_transformers
from flatgpt.checkpoint.gguf import export_gguf
from flatgpt.checkpoint.load import load_model
from flatgpt.data import tokenizer as tokenizer_module
from flatgpt.data.bpe import train_bpe
from flatgpt.data.hf_options import GPT2_PATTERN, check_regex
from flatgpt.data.hf_tokenizer import PATTERNS, added_tokens, find_tokenizer, tokenizer_json
from flatgpt.data.tokenizer import (
    EOT,
    WHITESPACE,
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    is_word_character,
    self_check_text,
)
from flatgpt.data.tokenizer import (
    load as load_tokenizer,
)
from flatgpt.inference.engine import complete
from flatgpt.inference.sampling import SamplingParams
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers', reason='transformers is not installed')
TEXT = 'A hare and a tortoise ran; the hare slept, and 12 frogs saw it. They went on.\n' * 20


def trained(special=('[start]', '[end]', '[blank]')) -> tokenizers.ByteLevelBPETokenizer:
    """Special tokens first, as `tokenizers` counts them, then bytes and merges."""
    own = tokenizers.ByteLevelBPETokenizer()
    size = 320 + len(special)
    own.train_from_iterator([TEXT], size, special_tokens=list(special), show_progress=False)
    return own


def saved(folder, eos='[end]', words=(), specials=None, **config):
    """A folder with a tokenizer, and the config.json and generation_config.json that are given."""
    folder.mkdir(exist_ok=True)
    trained().save(str(folder / 'tokenizer.json'))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / 'tokenizer.json'), **({'eos_token': eos} if eos else {})
    )
    theirs.add_tokens(list(words))
    theirs.add_special_tokens(specials or {})
    theirs.save_pretrained(folder)
    for name, value in config.items():
        (folder / f'{name}.json').write_text(json.dumps(value))
    return theirs


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -----------------------------------------------------------------------------
# stop ids


@pytest.mark.parametrize(
    ('eos', 'config', 'generation', 'ends'),
    [
        ('[end]', {}, {}, {1}),
        ('[end]', {'eos_token_id': 2}, {}, {2}),
        ('[end]', {'eos_token_id': 2}, {'eos_token_id': 0}, {0}),
        ('[end]', {'eos_token_id': 2}, {'eos_token_id': [1, 40]}, {1, 40}),
        ('[end]', {'eos_token_id': [0, 2]}, {'temperature': 0.5}, {0, 2}),
        (None, {'eos_token_id': 1}, None, {1}),
        (None, {'eos_token_id': None}, None, set()),
        ('[end]', {'eos_token_id': 50256}, {'eos_token_id': 50256}, {1}),  # GPT2Config's own
    ],
)
def test_every_eos_token_id_is_a_stop_id_and_generation_config_has_precedence(
    tmp_path, eos, config, generation, ends
):
    files = {'config': config} | ({} if generation is None else {'generation_config': generation})
    saved(tmp_path / 'x', eos, **files)
    tokenizer = find_tokenizer(str(tmp_path / 'x'))
    assert tokenizer.stop_ids == ends
    special = {'[start]': 0, '[end]': 1, '[blank]': 2}
    assert tokenizer.special == special
    assert tokenizer.eot == next((i for i in tokenizer.end_ids or [] if i < 3), None)
    assert set(np.flatnonzero(~tokenizer.writable)) == {0, 1, 2} - ends
    tokenizer.save(tmp_path / 'own.json')
    again = load_tokenizer(tmp_path / 'own.json')
    assert (again, again.stop_ids, again.eot) == (tokenizer, ends, tokenizer.eot)


@pytest.mark.parametrize('name', ['byte', './byte'])
def test_a_tokenizer_name_has_precedence_over_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / 'byte', '[end]')
    assert (find_tokenizer(name) == byte_tokenizer()) == (name == 'byte')


def test_the_eos_token_id_of_a_char_tokenizer_is_read(tmp_path):
    """A line feed, or a special token after the letters."""
    letters = sorted('\nabc ')
    content = tokenizer_json(char_tokenizer(letters))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': 0}))
    assert find_tokenizer(str(tmp_path)).stop_ids == {letters.index('\n')}
    content['added_tokens'] = added_tokens(byte_tokenizer())
    content['added_tokens'][0] |= {'content': '[end]', 'id': len(letters)}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': len(letters)}))
    tokenizer = find_tokenizer(str(tmp_path))
    assert (tokenizer.stop_ids, tokenizer.eot_text) == ({len(letters)}, '[end]')
    assert tokenizer.encode('a[end]b', allow_eot=True).tolist() == [2, 5, 3]
    assert tokenizer_json(tokenizer)['added_tokens'] == content['added_tokens']


@pytest.mark.parametrize('value', ['[end]', True, [1, None], {'id': 1}, 1.0])
def test_an_eos_token_id_that_is_not_an_id_is_one_line(tmp_path, value):
    saved(tmp_path / 'x', config={'eos_token_id': value})
    assert f'config.json has eos_token_id={value!r}' in refused(find_tokenizer, tmp_path / 'x')


def ending_model(folder, end: int):
    """A GPT-2 that likes one token best after any other."""
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    config = transformers.GPT2Config(
        vocab_size=size, n_positions=32, n_embd=32, n_layer=1, n_head=2, eos_token_id=[1, 2]
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[end] *= 0
        model.transformer.wte.weight[end, 0] = 30.0
        model.transformer.ln_f.bias[0] = 5.0
    model.save_pretrained(folder)


@pytest.mark.parametrize('end', [1, 2])
def test_a_completion_stops_at_each_eos_token_here_and_after_an_export(tmp_path, end):
    saved(tmp_path / 'theirs')
    ending_model(tmp_path / 'theirs', end)
    model, tokenizer, _ = load_model(tmp_path / 'theirs')
    params = SamplingParams(20, temperature=0.0)
    assert complete(model, tokenizer, ['a hare'], params) == ['']
    export_transformers(model, tokenizer, {}, tmp_path / 'ours')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ours')
    assert theirs.eos_token == '[end]'
    ids = theirs('a hare', return_tensors='pt')['input_ids']
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
    out = written.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert out[0, ids.size(1) :].tolist() == [end]
    model, again, _ = load_model(tmp_path / 'ours')
    assert (again, again.stop_ids) == (tokenizer, {1, 2})
    assert complete(model, again, ['a hare'], params) == ['']


def test_a_gguf_file_has_all_stop_ids_and_added_words(tmp_path):
    gguf = pytest.importorskip('gguf', reason='gguf is not installed')
    saved(tmp_path / 'x', words=['zebra'], generation_config={'eos_token_id': [1, 40, 2]})
    tokenizer = find_tokenizer(str(tmp_path / 'x'))
    model = GPT(GPTConfig(8, tokenizer.vocab_size, 1, 2, 32))
    export_gguf(model, tokenizer, {}, tmp_path / 'x.gguf')
    fields = gguf.GGUFReader(tmp_path / 'x.gguf').fields
    names = ('eos', 'eot', 'eom')
    ids = {fields[f'tokenizer.ggml.{name}_token_id'].contents() for name in names}
    assert ids == {1, 2, 40}
    assert fields['tokenizer.ggml.tokens'].contents()[-1] == 'zebra'
    kinds = fields['tokenizer.ggml.token_type'].contents()
    assert (kinds[-1], kinds[1]) == (gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL)
    saved(tmp_path / 'y', words=[AddedToken('zebra', lstrip=True)])
    flagged = find_tokenizer(str(tmp_path / 'y'))
    assert "'zebra'" in refused(export_gguf, model, flagged, {}, tmp_path / 'y.gguf')


# -----------------------------------------------------------------------------
# added tokens

WORDS = [
    'zebra',
    'zebra crossing',  # the longest counts
    'hare',  # of the vocabulary or not, merged or not
    'Ünïcode',
    AddedToken('alone', single_word=True),
    AddedToken('left', lstrip=True, normalized=False),
    AddedToken('right', rstrip=True),
    AddedToken('[mask]', lstrip=True, rstrip=True),
    '  ',
    '!',
]
SAID = [
    'a zebra crossing, no zebra\ncrossing; zebrazebra',
    'alone, notalone alone_ alone1 alone² aloneⅧ aloneя alone\u0301 alone\u200d ²alone Ⓐalone',
    'to the  \t left and \n right \u00a0\u3000 on leftleft rightright left  right  left\x1c right',
    'hares and hare!! [mask] [mask]  [end] [start]x[blank]',
    'Ünïcode Ünïcodes   \n',
    '',
]


@pytest.mark.parametrize('special', [True, False], ids=['allowed', 'text'])
def test_words_and_special_tokens_have_the_ids_of_transformers(tmp_path, special):
    more = {'pad_token': '[pad]', 'additional_special_tokens': [AddedToken('[cut]', rstrip=True)]}
    theirs = saved(tmp_path / 'x', words=WORDS, specials=more)
    ours = find_tokenizer(str(tmp_path / 'x'))
    export_transformers(GPT(GPTConfig(8, ours.vocab_size, 1, 1, 8)), ours, {}, tmp_path / 'back')
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
    assert find_tokenizer(str(tmp_path / 'back')) == ours
    rng = random.Random(0)
    parts = [*SAID, *map(str, WORDS), ' ', '  ', '\n', 'x', '²', '[pad]', '[cut] ', '[end]']
    mixed = [''.join(rng.choices(parts, k=12)) for _ in range(300)]
    for text in [*SAID, *mixed, self_check_text()]:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=not special)
        ids = ours.encode(text, allow_eot=special).tolist()
        assert ids == expected['input_ids'], text
        assert ids == again(text, split_special_tokens=not special)['input_ids'], text
        gone = str.maketrans('', '', WHITESPACE)  # which lstrip and rstrip take
        assert ours.decode(ids).translate(gone) == text.translate(gone)


def test_added_words_can_be_generated_and_special_tokens_cannot(tmp_path):
    saved(tmp_path / 'x', words=['zebra'], specials={'pad_token': '[pad]'})
    tokenizer = find_tokenizer(str(tmp_path / 'x'))
    word, pad = tokenizer.encode('zebra[pad]', allow_eot=True)
    assert tokenizer.writable[[word, pad, 1]].tolist() == [True, False, True]
    assert tokenizer.byte_lengths()[[word, pad, 1]].tolist() == [5, 0, 0]
    assert len(tokenizer.encode('[end]')) > 1
    other = find_tokenizer(str(tmp_path / 'x'))
    other.added = [token for token in other.added if token.text != 'zebra']
    assert other != tokenizer


def test_a_special_token_that_is_also_plain_text_stays_text(tmp_path):
    """GPT-2's users take '!' for padding."""
    theirs = saved(tmp_path / 'x', specials={'pad_token': '!'})
    ours = find_tokenizer(str(tmp_path / 'x'))
    ids = ours.encode('a hare!').tolist()
    assert ids == theirs('a hare!')['input_ids']
    assert ours.decode(ids) == 'a hare!'
    assert ours.writable[ids[-1]]


def test_word_characters_and_white_space_are_those_of_tokenizers():
    """A sample of all; newer characters are in one of the two libraries' tables only."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.add_tokens([AddedToken('alone', single_word=True), AddedToken('r', rstrip=True)])
    rng = random.Random(0)
    codes = [*range(0x3000), *rng.sample(range(0x3000, 0xD800), 3000)]
    codes += [*range(0x1F100, 0x1F200), 0x10348, 0x20000, *range(0xFE00, 0xFFF0)]
    wrong = []
    for character in map(chr, codes):
        alone = any(t == 'alone' for t in words.encode(f'alone{character}').tokens)
        space = words.encode(f'r{character}').offsets[-1] == (0, 2)
        if (alone, space) != (not is_word_character(character), character in WHITESPACE):
            wrong.append(character)
    assert len(wrong) < 30, wrong
    assert all(ord(character) > 0x800 for character in wrong), wrong


@pytest.mark.parametrize('way', ['map', 'config', 'decoder'])
def test_vocab_and_merges_with_other_files_in_the_folder(tmp_path, way):
    """As save_model() writes it: the special tokens are in the vocabulary, and nothing says so."""
    folder = tmp_path / 'x'
    folder.mkdir()
    own = trained(special=('<s>', '</s>', EOT))
    own.save_model(str(folder))
    size = own.get_vocab_size()
    named = {'eos_token': '</s>', 'bos_token': '<s>', 'unk_token': EOT, 'pad_token': '<pad>'}
    words = {'<pad>': size, 'zebra': size + 1}
    if way == 'decoder':
        flags = dict.fromkeys(('lstrip', 'rstrip', 'normalized', 'single_word'), False)
        decoder = {i: {'content': w, 'special': w != 'zebra', **flags} for w, i in words.items()}
        named['added_tokens_decoder'] = decoder
    else:
        (folder / 'added_tokens.json').write_text(json.dumps(words))
    name = 'special_tokens_map.json' if way == 'map' else 'tokenizer_config.json'
    (folder / name).write_text(json.dumps(named))
    (folder / 'config.json').write_text(json.dumps({'model_type': 'gpt2', 'eos_token_id': 1}))
    ours = find_tokenizer(str(folder))
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    for text in ('a hare</s><s> zebras <pad>', f'{EOT}a{EOT}', self_check_text(), *SAID):
        assert ours.encode(text, allow_eot=True).tolist() == theirs(text)['input_ids']
    assert (ours.stop_ids, ours.eot, ours.vocab_size) == ({1}, 1, size + 2)
    assert ours.writable[[0, 1, 2, size, size + 1]].tolist() == [
        False,
        True,
        False,
        False,
        True,
    ]


def test_a_vocabulary_alone_has_special_tokens_that_no_text_makes(tmp_path):
    trained().save_model(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': 1}))
    ours = find_tokenizer(str(tmp_path))
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.encode('[end] a', allow_eot=True).tolist() == theirs('[end] a')['input_ids']
    assert (ours.stop_ids, ours.eot) == ({1}, 1)
    assert not ours.writable[[0, 2]].any()


def test_an_added_token_with_another_id_in_another_file_is_one_line(tmp_path):
    saved(tmp_path / 'x')
    decoder = {999: {'content': 'zebra'}}
    rewrite(tmp_path / 'x/tokenizer_config.json', lambda c: c.update(added_tokens_decoder=decoder))
    assert "added token 'zebra' has the id 999" in refused(find_tokenizer, tmp_path / 'x')


# -----------------------------------------------------------------------------
# options

SEQUENCE = {'Sequence': {'id': 'A', 'type_id': 0}}
TEMPLATE = {
    'type': 'TemplateProcessing',
    'single': [{'SpecialToken': {'id': '[start]', 'type_id': 0}}, SEQUENCE],
    'pair': [SEQUENCE, {'Sequence': {'id': 'B', 'type_id': 1}}],
    'special_tokens': {'[start]': {'id': '[start]', 'ids': [0], 'tokens': ['[start]']}},
}
NO_TEMPLATE = TEMPLATE | {'single': TEMPLATE['single'][1:], 'special_tokens': {}}
METASPACE = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always', 'split': True}
SPLIT = {'type': 'Split', 'pattern': {'Regex': r'\S+|\s+'}, 'behavior': 'Isolated', 'invert': False}
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}


def two(split):
    return {'type': 'Sequence', 'pretokenizers': [split, BYTES]}


@pytest.mark.parametrize(
    ('change', 'line'),
    [
        ({'normalizer': {'type': 'NFC'}}, 'normalizer {"type": "NFC"}'),
        ({'normalizer': {'type': 'Prepend', 'prepend': '▁'}}, 'normalizer {"type": "Prepend"'),
        ({'normalizer': {'type': 'Strip', 'strip_left': False, 'strip_right': True}}, 'Strip'),
        ({'pre_tokenizer': METASPACE, 'decoder': METASPACE}, 'pre_tokenizer {"type": "Metaspace"'),
        ({'pre_tokenizer': None}, 'pre_tokenizer null'),
        ({'pre_tokenizer': BYTES | {'add_prefix_space': True}}, 'without add_prefix_space'),
        ({'pre_tokenizer': BYTES}, 'does not split text'),
        ({'pre_tokenizer': two(SPLIT | {'behavior': 'MergedWithNext'})}, 'use ByteLevel'),
        ({'pre_tokenizer': two(SPLIT | {'pattern': {'String': ' '}})}, 'use ByteLevel'),
        ({'pre_tokenizer': two(SPLIT | {'pattern': {'Regex': r'\w+|\W'}})}, r'"\\w+|\\W"'),
        ({'pre_tokenizer': two(SPLIT | {'pattern': {'Regex': r'\S+|\s+$'}})}, 'is not supported'),
        ({'pre_tokenizer': two(SPLIT | {'pattern': {'Regex': r'\S{1,3}+|\s'}})}, 'not supported'),
        ({'pre_tokenizer': two(SPLIT | {'pattern': {'Regex': r'\S+'}})}, 'does not match'),
        ({'decoder': None}, 'decoder is null; set it to'),
        ({'decoder': {'type': 'Fuse'}}, 'decoder is {"type": "Fuse"}'),
        ({'post_processor': TEMPLATE}, 'post_processor {"type": "TemplateProcessing"'),
        ({'post_processor': {'type': 'Sequence', 'processors': [BYTES, TEMPLATE]}}, 'adds tokens'),
        ({'post_processor': NO_TEMPLATE}, None),
        ({'post_processor': BYTES | {'add_prefix_space': True}}, None),
        ({'truncation': {'max_length': 4, 'strategy': 'LongestFirst', 'stride': 0,
                         'direction': 'Right'}}, None),
        ({'model': {'dropout': 0.1}}, 'model has dropout=0.1'),
        ({'model': {'continuing_subword_prefix': '##'}}, 'continuing_subword_prefix="##"'),
        ({'model': {'end_of_word_suffix': '</w>'}}, 'end_of_word_suffix="</w>"'),
        ({'model': {'unk_token': '[blank]', 'fuse_unk': True, 'byte_fallback': True}}, None),
        ({'model': {'ignore_merges': True}}, None),
    ],
    ids=lambda value: None if value is None else str(value)[:60],
)  # fmt: skip
def test_an_option_is_supported_or_refused_by_name(tmp_path, change, line):
    theirs = saved(tmp_path / 'x')
    path = tmp_path / 'x/tokenizer.json'

    def apply(content):
        content['model'] |= change.get('model', {})
        content.update({key: value for key, value in change.items() if key != 'model'})

    rewrite(path, apply)
    if line:
        message = refused(find_tokenizer, tmp_path / 'x')
        assert str(path) in message
        assert line in message
        return
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'x')
    for text in (TEXT, self_check_text(3)):
        assert find_tokenizer(str(path)).encode(text).tolist() == theirs(text)['input_ids']


def test_a_post_processor_is_set_to_null_as_the_line_says(tmp_path):
    saved(tmp_path / 'x')
    rewrite(tmp_path / 'x/tokenizer.json', lambda c: c.update(post_processor=TEMPLATE))
    assert 'set it to null' in refused(find_tokenizer, tmp_path / 'x')
    rewrite(tmp_path / 'x/tokenizer.json', lambda c: c.update(post_processor=None))
    assert find_tokenizer(str(tmp_path / 'x')).encode('[start]a', allow_eot=True)[0] == 0


@pytest.mark.parametrize('key', ['add_prefix_space', 'add_bos_token', 'add_eos_token'])
def test_an_option_of_tokenizer_config_that_adds_to_text_is_refused(tmp_path, key):
    saved(tmp_path / 'x')
    rewrite(tmp_path / 'x/tokenizer_config.json', lambda c: c.update({key: True}))
    assert f'tokenizer_config.json has {key}=true' in refused(find_tokenizer, tmp_path / 'x')


@pytest.mark.parametrize(
    'model',
    [
        tokenizers.models.Unigram([('<unk>', 0.0), ('▁a', -1.0), ('b', -2.0)], 0),
        tokenizers.models.WordPiece({'[UNK]': 0, 'a': 1, '##b': 2}, unk_token='[UNK]'),
        tokenizers.models.BPE({'▁': 0, 'a': 1, '▁a': 2}, [('▁', 'a')]),
    ],
    ids=['unigram', 'wordpiece', 'bpe of sentencepiece'],
)
def test_another_kind_of_tokenizer_is_one_line(tmp_path, model):
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    theirs.decoder = tokenizers.decoders.Metaspace()
    theirs.save(str(tmp_path / 'tokenizer.json'))
    message = refused(find_tokenizer, tmp_path / 'tokenizer.json')
    assert 'model has the type' in message or 'pre_tokenizer {"type": "Metaspace"' in message


def test_merges_that_differ_from_merging_by_rank_are_refused(tmp_path):
    """ZQX is merged from Z and QX, but Z Q X becomes ZQ X first."""
    saved(tmp_path / 'x')

    def change(content):
        vocab, merges = content['model']['vocab'], content['model']['merges']
        size = max(vocab.values()) + 1
        vocab |= {'ZQ': size, 'QX': size + 1, 'ZQX': size + 2}
        merges += [['Z', 'Q'], ['Q', 'X'], ['Z', 'QX']]

    rewrite(tmp_path / 'x/tokenizer.json', change)
    assert "its token 'ZQX' is not what its merges make" in refused(find_tokenizer, tmp_path / 'x')


def test_both_engines_split_text_alike():
    """By the patterns of GPT-4, GPT-2 and our own BPE, in difficult text."""
    gpt4 = PATTERNS['cl100k_base']
    own = train_bpe([TEXT, self_check_text()], 500)
    for pattern in (GPT2_PATTERN, gpt4, own.pattern):
        tokenizer = Tokenizer('bpe', 'mine', own.token_bytes, own.special, check_regex(pattern))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
        for seed in range(5):
            text = self_check_text(seed) + "I'\u017f we'LL'\u017ft'K x\x85\x0b"
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ids == tokenizer.encode(text, allow_eot=True).tolist()


def test_an_encoding_of_tiktoken_is_written_with_a_portable_pattern():
    """Its own regular expressions have syntax with another meaning for `tokenizers`."""
    import tiktoken_ext.openai_public as public

    own = train_bpe([TEXT, self_check_text()], 500)
    pattern = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    pattern += r' ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s'
    special = own.special | {'<|fim|>': own.vocab_size + 3}  # after ids that stand for nothing
    tokens = [*own.token_bytes, None, None, None, b'<|fim|>']
    tokenizer = Tokenizer('tiktoken', 'cl100k_base', tokens, special, pattern)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    for seed in range(5):
        text = self_check_text(seed).replace(EOT, '') + '1234567 \n  '
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
    assert theirs.token_to_id('<|fim|>') == special['<|fim|>']
    assert public.r50k_pat_str not in PATTERNS.values()
    unknown = Tokenizer('tiktoken', 'of_next_year', tokens, special, pattern)
    assert 'is not supported' in refused(tokenizer_json, unknown)


# -----------------------------------------------------------------------------
# long words


@pytest.mark.parametrize('kind', ['own', 'theirs'])
@pytest.mark.parametrize('make', [' ', 'a', '\n', 'ACGT', 'qwertz0 '], ids=repr)
def test_a_word_of_a_million_letters_is_encoded_in_a_time_like_its_length(tmp_path, kind, make):
    tokenizer = train_bpe([TEXT, ' ' * 64, 'ACGTTGCA' * 9], 400)
    if kind == 'theirs':
        saved(tmp_path / 'x', words=['zebra'])
        tokenizer = find_tokenizer(str(tmp_path / 'x'))
    rng = random.Random(0)
    seconds = []
    for size in (2**18, 2**20):
        text = 'the end ' + ''.join(rng.choices(make, k=size)) + 'x on.'
        seconds.append(min(timed(tokenizer, text) for _ in range(2)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert seconds[1] < 0.3 + 7 * seconds[0]  # 2.3 a doubling would be 5.3


def timed(tokenizer, text) -> float:
    start = time.process_time()
    tokenizer.encode(text)
    return time.process_time() - start


@pytest.mark.parametrize('letters', [' ', 'a', 'ab', 'ACGT', 'the hare slept', 'é字'], ids=repr)
def test_a_word_in_blocks_has_the_ids_of_all_of_it(monkeypatch, letters):
    tokenizer = train_bpe([TEXT, ' ' * 64, 'ACGTTGCA' * 99, 'aaaaaaabab' * 9, '字é' * 20], 420)
    rng = random.Random(0)
    whole = tokenizer._encoding._encode_single_piece
    for block in (24, 100):
        monkeypatch.setattr(tokenizer_module, 'MERGE_BLOCK_BYTES', block)
        for size in (1, 23, 24, 25, 99, 100, 101, 555, 2000):
            word = ''.join(rng.choices(letters, k=size)).encode()
            assert tokenizer._encode_long_word(word) == whole(word)


def test_long_words_have_the_ids_of_tokenizers():
    tokenizer = train_bpe([TEXT, ' ' * 64, 'ACGTTGCA' * 9], 400)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    text = TEXT + ' ' * 1_100_000 + 'x ' + 'ACGT' * 300_000 + self_check_text().replace(EOT, '')
    assert np.array_equal(tokenizer.encode(text), theirs.encode(text).ids)
