"""
Prepare conversations or preference pairs from JSON Lines files.

$ python data/chat/prepare.py talks.jsonl --name=talks --tokenizer=out/base
$ python train.py train_chat --dataset=talks --init_from=out/base --out_dir=out/chat
$ python data/chat/prepare.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.chat import main
from flatgpt.errors import one_line_errors

if __name__ == '__main__':
    one_line_errors()
    main()
