r"""
The supported options of a tokenizer.json, the format of the library `tokenizers`.

    check_supported(content, settings)     # UserError for any other option
    split_pattern(content['pre_tokenizer'])  # r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|..."

Options are checked, not only tried on text: an option may change a single character.
"""

import functools
import json
import re

import regex

from flatgpt.errors import UserError, short_repr

# how GPT-2 splits text before merging, https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
short_json = functools.partial(short_repr, show=functools.partial(json.dumps, ensure_ascii=False))
EMPTY = (None, False, '', [], {})
# supported values of each field, the default first; None: any value, since it has no effect
MODELS = {
    'BPE': {
        'dropout': (None, 0.0),
        'continuing_subword_prefix': (None, ''),
        'end_of_word_suffix': (None, ''),
        # for characters without a token; all 256 have one
        **dict.fromkeys(('unk_token', 'fuse_unk', 'byte_fallback')),
        # looks up whole words first; merging gives the same tokens, see parse_tokenizer()
        'ignore_merges': None,
        **dict.fromkeys(('type', 'vocab', 'merges')),
    },
    'WordLevel': dict.fromkeys(('type', 'vocab', 'unk_token')),
}
DECODERS = {'BPE': 'ByteLevel', 'WordLevel': 'Fuse'}
# the fields of tokenizer_config.json that change ids
SETTINGS = dict.fromkeys(('add_prefix_space', 'add_bos_token', 'add_eos_token'), (False, None))
# The syntax of regular expressions that the engines of both libraries read alike: no ^ and $ (ends
# of lines in one of them), no {1,3}+ (possessive in the other), no \w, no classes but by category,
# no case-insensitive groups but GPT-4's.
PORTABLE_REGEX = re.compile(
    r"""(?: \\p\{[LMNPSZC][a-z]?\} | \\[sSrnt'/.()?*+|\[\]-] | [\ \w'/,_"!:;<>=@%#-]
    | \[\^?(?!:) | \] | \| | \) | \((?!\?) | \(\?[:=!] | [?*+][?+]? | \{\d+(?:,\d*)?\}(?![?+])
    | \(\?i:(?:'s\|'t\|'re\|'ve\|'m\|'ll\|'d|\[sdmt\]\|ll\|ve\|re)\) )*""",
    re.VERBOSE | re.ASCII,
)


def regex_split(pattern: str) -> dict:
    """The pre-tokenizer that makes a word of each match, and of the text between matches."""
    return {
        'type': 'Split',
        'pattern': {'Regex': pattern},
        'behavior': 'Isolated',
        'invert': False,
    }


CHARACTER_SPLIT = regex_split(r'[\s\S]')


def check_supported(content: dict, settings: dict) -> None:
    """UserError for the first option that changes ids or text and is not supported.

    content: of tokenizer.json, settings: of tokenizer_config.json. Truncation and padding are
    ignored: in `transformers`, too, they are off by default.
    """
    kind, decoder = content['model']['type'], content['decoder']
    if content['normalizer']:
        text = short_json(content['normalizer'])
        raise UserError(f'normalizer {text} is not supported; for a new model, set it to null')
    if kind == 'BPE':
        split_pattern(content['pre_tokenizer'])
    elif content['pre_tokenizer'] != CHARACTER_SPLIT:
        raise UserError(
            f'pre_tokenizer {short_json(content["pre_tokenizer"])} does not split text into '
            f'characters; set it to {short_json(CHARACTER_SPLIT)}'
        )
    known = {key: value for key, value in settings.items() if key in SETTINGS}
    check_fields('its tokenizer_config.json has', SETTINGS, known)
    if (decoder or {}).get('type') != DECODERS[kind]:
        raise UserError(
            f'its decoder is {short_json(decoder)}; set it to that of '
            f'tokenizers.decoders.{DECODERS[kind]}()'
        )
    check_post_processor(content['post_processor'])


def check_model(model: dict) -> None:
    """UserError for an unsupported model; the library itself panics at some of them."""
    kind = model.get('type', 'BPE' if 'merges' in model else None)  # older files have none
    if kind not in MODELS:
        raise UserError(f'its model has the type {kind}; use a tokenizer with byte-level BPE')
    check_fields('its model has', MODELS[kind], model)


def check_fields(where: str, known: dict, fields: dict) -> None:
    for key, value in fields.items():
        values = known.get(key, EMPTY)
        if values is not None and value not in values:
            raise UserError(
                f'{where} {key}={short_json(value)}, which is not supported; set it to '
                f'{short_json(values[0])}'
            )


def check_post_processor(processor: dict | None) -> None:
    """UserError for a post-processor that adds tokens; ByteLevel's changes offsets only."""
    for part in (processor or {}).get('processors', [processor] if processor else []):
        template = part.get('single') if part['type'] == 'TemplateProcessing' else []
        if part['type'] != 'ByteLevel' and [list(piece) for piece in template] != [['Sequence']]:
            raise UserError(
                f'its post_processor {short_json(part)} adds tokens to each text; set it to null, '
                'and write the tokens in the text'
            )


def split_pattern(split: dict | None) -> str:
    """The regular expression that a pre-tokenizer splits text with; '' for none."""
    *first, level = (split or {}).get('pretokenizers') or [split or {}]
    if level.get('type') == 'ByteLevel' and level['add_prefix_space'] is False:
        if not first:
            return GPT2_PATTERN if level['use_regex'] else ''
        pattern = (first[0].get('pattern') or {}).get('Regex') or ''
        if first == [regex_split(pattern)] and not level['use_regex']:
            return check_regex(pattern)
    raise UserError(
        f'pre_tokenizer {short_json(split)} is not supported; use ByteLevel without '
        'add_prefix_space, alone or, without use_regex, after a Split of a regular expression with '
        'the behavior Isolated'
    )


@functools.cache
def check_regex(pattern: str) -> str:
    """The same regular expression; UserError unless it matches all characters and is portable."""
    if not PORTABLE_REGEX.fullmatch(pattern) or '--' in pattern:
        raise UserError(
            f'the regular expression {short_json(pattern)} is not supported; use one without ^, $, '
            '\\w, possessive quantifiers and case-insensitive groups'
        )
    every = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    if left := regex.sub(pattern, '', every):
        raise UserError(
            f'the regular expression {short_json(pattern)} does not match {left[0]!r}; match all '
            r'characters, for example with |\S|\s at its end'
        )
    return pattern
