"""
Prepare the works of Edgar Allan Poe, five books of Project Gutenberg, with GPT-2's tokenizer.

$ python data/poe/prepare.py

The same as `python data/gutenberg/prepare.py poe`, which has the options.
"""

import sys

from configurator import one_line_errors
from data.gutenberg import prepare as gutenberg

# The Raven Edition alone: the collections of his poems would bring what volume 5 has a second time,
# perhaps once to train on and once to validate on.
BOOKS = {
    2147: 'The Works of Edgar Allan Poe, Volume 1',
    2148: 'The Works of Edgar Allan Poe, Volume 2',
    2149: 'The Works of Edgar Allan Poe, Volume 3',
    2150: 'The Works of Edgar Allan Poe, Volume 4',
    2151: 'The Works of Edgar Allan Poe, Volume 5',
}


def main(argv: list[str] | None = None) -> None:
    gutenberg.main(['poe', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    one_line_errors()
    main()
