"""
Prepare OpenWebText, GPT-2's kind of training data: 8 million documents, 9 billion tokens, 18 GB.

$ pip install pyarrow
$ python data/openwebtext/prepare.py                     # downloads 24 GB in 80 files
$ python data/openwebtext/prepare.py --dev               # 10,000 documents, 30 MB: openwebtext_dev
$ python data/openwebtext/prepare.py --source=parquet/   # uses existing .parquet files
$ python data/openwebtext/prepare.py --part=3/64         # job 3 of 64, on any machine ...
$ python data/openwebtext/prepare.py --merge             # ... once all parts are in the folder

Each file is fetched, encoded and deleted in turn, so the disk needs little more than the dataset;
files in the cache of the Hugging Face Hub (`hf download`) are not fetched again. After an
interruption, run the same command to resume with the first missing file. The output depends neither
on interruptions nor on the number of processes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this clone's flatgpt comes first

from flatgpt.data.dataset import DATA
from flatgpt.data.parquet import hub_files, local_files, merge, plan_parts, write_parts
from flatgpt.data.tokenizer import get_tokenizer
from flatgpt.errors import ArgumentParser, UserError, one_line_errors

DOWNLOAD_GB = 24
FULL, DEV = 'Skylion007/openwebtext', 'stas/openwebtext-10k'
VAL_EVERY = 2000  # one in so many documents is for validation: nanoGPT's 0.0005
# 500 of the sample's 10,000 documents, about half a million tokens; VAL_EVERY would give 5. Some
# may be training documents of the full set.
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
            print(f'{folder}: job {job} of {jobs} is done; after the last job run --merge')
            return
    print(merge(folder))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--dev', action='store_true', help='prepare only a small sample')
    add('--out_dir', type=Path, help='default: data/openwebtext, or data/openwebtext_dev')
    add('--source', type=Path, help='a folder with the .parquet files, instead of downloading')
    add('--workers', type=int, help='number of processes; default: one per core')
    add('--part', type=job_of, default=(1, 1), metavar='K/N', help='write only parts of job K of N')
    add('--merge', action='store_true', help='only combine the parts that jobs wrote')
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f'--workers={args.workers}: must be at least 1')
    unused = {'--source': args.source, '--part': args.part[1] > 1}
    given = [option for option, value in unused.items() if value]
    if args.merge and given:
        raise UserError(f'--merge only combines finished parts; omit {" and ".join(given)}')
    return args


def job_of(text: str) -> tuple[int, int]:
    """'3/64' -> (3, 64): the job and the number of jobs."""
    job, _, jobs = text.partition('/')
    if not (job.isdecimal() and jobs.isdecimal() and 1 <= int(job) <= int(jobs)):
        raise UserError(f'--part={text}: give the job and the number of jobs: --part=3/64')
    return int(job), int(jobs)


if __name__ == '__main__':
    one_line_errors()
    main()
