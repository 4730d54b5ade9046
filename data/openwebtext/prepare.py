"""
Prepare OpenWebText, GPT-2's kind of training data: 8 million documents, 9 billion tokens, 18 GB.

$ pip install pyarrow
$ python data/openwebtext/prepare.py                     # fetches 24 GB in 80 files
$ python data/openwebtext/prepare.py --dev               # 10,000 documents, 30 MB: openwebtext_dev
$ python data/openwebtext/prepare.py --source=parquet/   # .parquet files that are here already
$ python data/openwebtext/prepare.py --part=3/64         # the third of 64 jobs, anywhere ...
$ python data/openwebtext/prepare.py --merge             # ... and when all their files are here

Each file is fetched, encoded and deleted in turn, so that little more than the dataset is needed on
the disk; what the hub's cache has (`hf download`) is not fetched again. Stopped or killed, the same
command goes on with the first file that is missing. What it writes depends neither on that nor on
the number of processes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.dataset import DATA
from flatgpt.data.parquet import hub_files, local_files, merge, plan_parts, write_parts
from flatgpt.data.tokenizer import get_tokenizer
from flatgpt.errors import UserError, one_line_errors

DOWNLOAD_GB = 24
FULL, DEV = 'Skylion007/openwebtext', 'stas/openwebtext-10k'
VAL_EVERY = 2000  # one document of so many is for validation: nanoGPT's 0.0005
# Of 10,000 documents that would be 5. These are 500, about half a million tokens, as the mean is
# 1,100. (Some may be among the full set's training documents.)
DEV_VAL_EVERY = 20


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = args.out_dir or DATA / ('openwebtext_dev' if args.dev else 'openwebtext')
    if not args.merge:
        files = local_files(args.source) if args.source else hub_files(DEV if args.dev else FULL)
        parts = plan_parts(folder, files, DEV_VAL_EVERY if args.dev else VAL_EVERY)
        job, jobs = args.part
        write_parts(parts[job - 1 :: jobs], get_tokenizer('gpt2'), args.workers)
        if jobs > 1:
            print(f'{folder}: job {job} of {jobs} is done; once all are: --merge')
            return
    print(merge(folder))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--dev', action='store_true', help='a small sample, to try things out')
    add('--out_dir', type=Path, help='default: data/openwebtext, or data/openwebtext_dev')
    add('--source', type=Path, help='folder of parquet files, instead of fetching them')
    add('--workers', type=int, help='processes; default: one on each core')
    add('--part', type=share, default=(1, 1), metavar='K/N', help='write only what job K of N has')
    add('--merge', action='store_true', help='only make one dataset of what such jobs wrote')
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f'--workers={args.workers}: needs at least 1')
    unused = {'--source': args.source, '--part': args.part[1] > 1}
    given = [option for option, value in unused.items() if value]
    if args.merge and given:
        raise UserError(f'--merge only joins what is written; leave out {" and ".join(given)}')
    return args


def share(text: str) -> tuple[int, int]:
    job, _, jobs = text.partition('/')
    if not (job.isdecimal() and jobs.isdecimal() and 1 <= int(job) <= int(jobs)):
        raise UserError(f'--part={text}: needs a job and how many there are, as in --part=3/64')
    return int(job), int(jobs)


if __name__ == '__main__':
    one_line_errors()
    main()
