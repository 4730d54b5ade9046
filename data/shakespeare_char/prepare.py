"""
Prepare the works of Shakespeare (1.1 MB) one character at a time, split as nanoGPT does.

$ python data/shakespeare_char/prepare.py

An existing input.txt in this folder or in data/shakespeare is used unchanged.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.shakespeare import prepare
from flatgpt.data.tokenizer import char_tokenizer
from flatgpt.errors import one_line_errors


def main(argv: list[str] | None = None) -> None:
    prepare(argv, __doc__, Path(__file__).parent, lambda text: char_tokenizer(sorted(set(text))))


if __name__ == '__main__':
    one_line_errors()
    main()
