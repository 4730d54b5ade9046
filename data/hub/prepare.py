"""
Prepare any text dataset of the Hugging Face Hub by its name.

$ python data/hub/prepare.py roneneldan/TinyStories --field=text --name=tinystories
$ python train.py config/auto.py --dataset=tinystories
$ python data/hub/prepare.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.hub import main
from flatgpt.errors import one_line_errors

if __name__ == '__main__':
    one_line_errors()
    main()
