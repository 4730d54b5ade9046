"""
Prepare the beginnings of IMDB's 50,000 film reviews, as prompts for reinforcement learning.

$ pip install pyarrow
$ python data/imdb_prompts/prepare.py                    # downloads 84 MB
$ python data/imdb_prompts/prepare.py --source=parquet/  # uses existing .parquet files

Each prompt has the first two to eight tokens of a review of more than 200 characters.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data import prompts
from flatgpt.data.parquet import SourceFile, hub_files, local_files, read_documents
from flatgpt.data.tokenizer import Tokenizer, get_tokenizer
from flatgpt.errors import ArgumentParser, UserError, one_line_errors

REPOSITORY = 'stanfordnlp/imdb'
HELD_OUT = 1024


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--out_dir', type=Path, default=Path(__file__).parent, help='default: %(default)s')
    add('--source', type=Path, help='a folder with the .parquet files, instead of downloading')
    args = parser.parse_args(argv)
    files = local_files(args.source) if args.source else hub_files(REPOSITORY)
    files = [file for file in files if 'unsupervised' not in file.name]
    lines = list(beginnings(files, get_tokenizer('gpt2')))
    if len(lines) <= HELD_OUT:
        raise UserError(f'{len(lines)} reviews: too few; give a folder with all of them')
    random.Random(0).shuffle(lines)
    with tempfile.TemporaryDirectory() as folder:
        train, val = Path(folder, 'train.jsonl'), Path(folder, 'val.jsonl')
        train.write_text('\n'.join(lines[HELD_OUT:]), encoding='utf-8')
        val.write_text('\n'.join(lines[:HELD_OUT]), encoding='utf-8')
        argv = [str(train), f'--val={val}', '--plain', '--tokenizer=gpt2']
        prompts.prepare(prompts.arguments([*argv, f'--out_dir={args.out_dir}']), args.out_dir)


def beginnings(files: list[SourceFile], tokenizer: Tokenizer) -> Iterator[str]:
    """The records, as JSON."""
    lengths = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            for review in read_documents(file.get(Path(folder))):
                if len(review) > 200:
                    ids = tokenizer.encode(review[:100])[: lengths.randint(2, 8)]
                    yield json.dumps({'prompt': tokenizer.decode(ids.tolist())})


if __name__ == '__main__':
    one_line_errors()
    main()
