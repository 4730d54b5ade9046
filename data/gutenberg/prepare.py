"""
Prepare books of Project Gutenberg by number, or a predefined set: poe, poems.

$ python data/gutenberg/prepare.py 1342 84 --name=novels
$ python data/gutenberg/prepare.py poe
$ python data/gutenberg/prepare.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data import gutenberg
from flatgpt.errors import one_line_errors

SETS = {  # {name: {book number: title}}; each set is a dataset with a config finetune_<set>
    # Only the Raven Edition: other collections would repeat the poems of volume 5, perhaps in the
    # other split.
    'poe': {n: f'The Works of Edgar Allan Poe, Volume {n - 2146}' for n in range(2147, 2152)},
    'poems': {
        1041: "Shakespeare's Sonnets",
        1934: 'Songs of Innocence and of Experience, by William Blake',
        23684: 'Poems Published in 1820, by John Keats',
        10031: "Edgar Allan Poe's Complete Poetical Works",
        1322: 'Leaves of Grass, by Walt Whitman',
        12242: 'Poems: Three Series, Complete, by Emily Dickinson',
    },
}


def main(argv: list[str] | None = None) -> None:
    gutenberg.main(argv, SETS)


if __name__ == '__main__':
    one_line_errors()
    main()
