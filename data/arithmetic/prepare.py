"""
Prepare solved sums, such as 347+58=405, for fine-tuning.

$ python data/arithmetic/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.arithmetic import prepare
from flatgpt.errors import one_line_errors


def main(argv: list[str] | None = None) -> None:
    prepare(argv, __doc__, Path(__file__).parent, solved=True)


if __name__ == '__main__':
    one_line_errors()
    main()
