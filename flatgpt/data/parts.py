"""
A dataset in parts, part-00000/, part-00001/ ..., which an interrupted run keeps.

    if not is_finished(folder / part_name(0), source):
        ...                                            # write it
    combine(folder, [part_name(0), part_name(1)])      # one dataset; no file is moved
"""

import contextlib
from pathlib import Path

from flatgpt.data.dataset import Writer, check_files, is_prepared, read_meta
from flatgpt.data.tokenizer import load as load_tokenizer
from flatgpt.errors import UserError


def part_name(number: int) -> str:
    return f'part-{number:05d}'


def is_finished(part: Path, source: dict) -> bool:
    """Whether a part is complete. UserError if it was made from another source.

    source: what identifies the data; the part's meta.json may have more about it.
    """
    if not is_prepared(part):
        return False
    meta = read_meta(part)
    recorded = meta.get('source') or {}
    found = {key: recorded[key] for key in source if key in recorded}
    if found != source:
        before, now = describe_source(found), describe_source(source)
        raise UserError(
            f'{part} was made from {before}, not from {now}; choose another --out_dir, '
            'or delete the part-* folders'
        )
    with contextlib.suppress(UserError):
        check_files(part, meta)
        return True
    return False


def describe_source(source: dict | None) -> str:
    return ', '.join(f'{key} {value}' for key, value in (source or {}).items()) or 'something else'


def combine(folder: Path, names: list[str]) -> str:
    """Make the dataset in `folder` of its parts, without moving them -> its summary"""
    with Writer(folder, load_tokenizer(folder / names[0] / 'tokenizer.json')) as writer:
        for name in names:
            writer.include(name)
    return writer.summary()
