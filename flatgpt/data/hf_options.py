r"""
All that is understood of a tokenizer.json, the format of the library `tokenizers`.

    refuse_unknown(content, settings)     # UserError for anything else, by its name
    pattern_of(content['pre_tokenizer'])  # r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|..."

A trial on example text would not show the rest: an option may act on a single character.
"""

import functools
import json
import re

import regex

from flatgpt.errors import UserError

# how GPT-2 splits text before merging, https://github.com/openai/gpt-2/blob/master/src/encoder.py
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EMPTY = (None, False, '', [], {})
# fields and the values that are understood, the usual one first; None: any, as it changes nothing
MODELS = {
    'BPE': {
        'dropout': (None, 0.0),
        'continuing_subword_prefix': (None, ''),
        'end_of_word_suffix': (None, ''),
        # what becomes of a letter without a token; all 256 have one
        **dict.fromkeys(('unk_token', 'fuse_unk', 'byte_fallback')),
        # whether the token of a whole word comes first; merging gives it too, see parse_tokenizer()
        'ignore_merges': None,
        **dict.fromkeys(('type', 'vocab', 'merges')),
    },
    'WordLevel': dict.fromkeys(('type', 'vocab', 'unk_token')),
}
DECODERS = {'BPE': 'ByteLevel', 'WordLevel': 'Fuse'}
# of tokenizer_config.json, what `transformers` gives to the tokenizer; the rest is for other uses
SETTINGS = dict.fromkeys(('add_prefix_space', 'add_bos_token', 'add_eos_token'), (False, None))
# Of a regular expression, what the engines of both libraries take alike: no ^ and $, which are the
# ends of a line for one of them, no {1,3}+, which is possessive for the other, no \w, no classes in
# brackets but by category, and nothing without regard to case but what GPT-4 has.
ALIKE = re.compile(
    r"""(?: \\p\{[LMNPSZC][a-z]?\} | \\[sSrnt'/.()?*+|\[\]-] | [\ \w'/,_"!:;<>=@%#-]
    | \[\^?(?!:) | \] | \| | \) | \((?!\?) | \(\?[:=!] | [?*+][?+]? | \{\d+(?:,\d*)?\}(?![?+])
    | \(\?i:(?:'s\|'t\|'re\|'ve\|'m\|'ll\|'d|\[sdmt\]\|ll\|ve\|re)\) )*""",
    re.VERBOSE | re.ASCII,
)


def split_by(pattern: str) -> dict:
    """The pre-tokenizer that makes each match a word, and what lies between, too."""
    return {
        'type': 'Split',
        'pattern': {'Regex': pattern},
        'behavior': 'Isolated',
        'invert': False,
    }


EVERY_CHARACTER = split_by(r'[\s\S]')


def refuse_unknown(content: dict, settings: dict) -> None:
    """UserError for the first thing that would change ids or text and is not understood.

    content: of tokenizer.json, settings: of tokenizer_config.json. Truncation and padding are for
    who asks for them, in `transformers` too.
    """
    kind, decoder = content['model']['type'], content['decoder']
    if content['normalizer']:
        text = short(content['normalizer'])
        raise UserError(f'it encodes text in a way that we do not: normalizer {text}; null is read')
    if kind == 'BPE':
        pattern_of(content['pre_tokenizer'])
    elif content['pre_tokenizer'] != EVERY_CHARACTER:
        raise UserError(f'its pre_tokenizer {short(content["pre_tokenizer"])} makes no characters')
    known = {key: value for key, value in settings.items() if key in SETTINGS}
    refuse_fields('its tokenizer_config.json has', SETTINGS, known)
    if (decoder or {}).get('type') != DECODERS[kind]:
        raise UserError(
            f'its decoder is {short(decoder)}; only {DECODERS[kind]} is read, which '
            f'tokenizers.decoders.{DECODERS[kind]}() makes'
        )
    refuse_added(content['post_processor'])


def refuse_model(model: dict) -> None:
    """UserError for a model that is not understood; the library itself panics at some of them."""
    kind = model.get('type', 'BPE' if 'merges' in model else None)  # older files have none
    if kind not in MODELS:
        raise UserError(f'it is of type {kind}; byte-level BPE is read')
    refuse_fields('its model has', MODELS[kind], model)


def refuse_fields(where: str, known: dict, fields: dict) -> None:
    for key, value in fields.items():
        values = known.get(key, EMPTY)
        if values is not None and value not in values:
            raise UserError(f'{where} {key}={short(value)}; only {short(values[0])} is read')


def refuse_added(processor: dict | None) -> None:
    """UserError for a post-processor that adds tokens; ByteLevel's says where in a text one is."""
    for part in (processor or {}).get('processors', [processor] if processor else []):
        template = part.get('single') if part['type'] == 'TemplateProcessing' else []
        if part['type'] != 'ByteLevel' and [list(piece) for piece in template] != [['Sequence']]:
            raise UserError(
                f'its post_processor {short(part)} adds tokens to each text; set it to null, and '
                'write them where they are meant'
            )


def pattern_of(split: dict | None) -> str:
    """The regular expression by which a pre-tokenizer splits text; '' if it does not."""
    *first, level = (split or {}).get('pretokenizers') or [split or {}]
    if level.get('type') == 'ByteLevel' and level['add_prefix_space'] is False:
        if not first:
            return GPT2_PATTERN if level['use_regex'] else ''
        pattern = (first[0].get('pattern') or {}).get('Regex') or ''
        if first == [split_by(pattern)] and not level['use_regex']:
            return understood(pattern)
    raise UserError(
        f'it splits text in a way that is not understood: pre_tokenizer {short(split)}; ByteLevel '
        'without add_prefix_space is read, alone or after a Split that isolates what a regular '
        'expression matches'
    )


@functools.cache
def understood(pattern: str) -> str:
    """The regular expression, if it leaves out no character, and both libraries read it alike."""
    if not ALIKE.fullmatch(pattern) or '--' in pattern:
        raise UserError(f'the regular expression {short(pattern)} is not understood')
    every = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    if left := regex.sub(pattern, '', every):
        raise UserError(f'the regular expression {short(pattern)} leaves out {left[0]!r}')
    return pattern


def short(value) -> str:
    """JSON of at most 100 characters, for an error."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 100 else text[:97] + '...'
