"""
The Children's Book Test (Hill et al. 2016) as GPT-2 took it: each choice is put into the gap, and
what counts is the probability of the choice and of the rest of its sentence (Radford et al. 2019,
section 3.2).
"""

import re

# the text is tokenized for a parser; these rules rejoin it, like the detokenizers of the paper
DETOKENIZER = (
    (r'`` ?', '"'),
    (r" ?''", '"'),
    (r'` ', "'"),
    (r" '(?= |$)", "'"),
    (r'-L[RCS]B- ?', '('),
    (r' ?-R[RCS]B-', ')'),
    (r" (n't|'(?:s|m|d|re|ve|ll))\b", r'\1'),
    (r' ([.,;:!?])', r'\1'),
)
GAP = 'XXXXX'


def context(doc: dict) -> str:
    """Twenty sentences, and the next one up to its gap."""
    before, _, _ = doc['question'].partition(GAP)
    return as_written(' '.join([*doc['sentences'], before])).rstrip()


def choices(doc: dict) -> list[str]:
    """The rest of the sentence from its gap, for each of the ten words."""
    whole, begun = ' '.join([*doc['sentences'], doc['question']]), context(doc)
    return [as_written(whole.replace(GAP, word, 1))[len(begun) :] for word in doc['options']]


def answer(doc: dict) -> int:
    return doc['options'].index(doc['answer'])


def as_written(text: str) -> str:
    for pattern, replacement in DETOKENIZER:
        text = re.sub(pattern, replacement, text)
    return text
