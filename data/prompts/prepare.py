"""
Prepare prompts for reinforcement learning from JSON Lines files.

$ python data/prompts/prepare.py sums.jsonl --name=sums --tokenizer=out/chat
$ python train.py train_rl --dataset=sums --init_from=out/chat --reward=exact
$ python data/prompts/prepare.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.prompts import main
from flatgpt.errors import one_line_errors

if __name__ == '__main__':
    one_line_errors()
    main()
