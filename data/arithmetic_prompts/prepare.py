"""
Prepare sums without their results, such as 347+58=, for reinforcement learning.

$ python data/arithmetic_prompts/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.arithmetic import prepare
from flatgpt.errors import one_line_errors


def main(argv: list[str] | None = None) -> None:
    prepare(argv, __doc__, Path(__file__).parent, solved=False)


if __name__ == '__main__':
    one_line_errors()
    main()
