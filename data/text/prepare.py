"""
Prepare your own text: files, folders and glob patterns, with any tokenizer.

$ python data/text/prepare.py novel.txt more/ --name=mine --tokenizer=byte
$ python train.py config/auto.py --dataset=mine
$ python data/text/prepare.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.text import main
from flatgpt.errors import one_line_errors

if __name__ == '__main__':
    one_line_errors()
    main()
