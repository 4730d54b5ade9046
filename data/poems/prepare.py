"""
Prepare poems in English, six books of Project Gutenberg, with GPT-2's tokenizer.

$ python data/poems/prepare.py

The same as `python data/gutenberg/prepare.py poems`, which has the options.
"""

import sys

from configurator import one_line_errors
from data.gutenberg import prepare as gutenberg

BOOKS = {
    1041: "Shakespeare's Sonnets",
    1934: 'Songs of Innocence and of Experience, by William Blake',
    23684: 'Poems Published in 1820, by John Keats',
    10031: "Edgar Allan Poe's Complete Poetical Works",
    1322: 'Leaves of Grass, by Walt Whitman',
    12242: 'Poems: Three Series, Complete, by Emily Dickinson',
}


def main(argv: list[str] | None = None) -> None:
    gutenberg.main(['poems', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    one_line_errors()
    main()
