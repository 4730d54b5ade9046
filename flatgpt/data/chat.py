"""
Prepare conversations or preference pairs: rows of one context each, of which the assistant's words
are learned.

$ python data/chat/prepare.py talks.jsonl --name=talks --tokenizer=out/base --block_size=256
$ python train.py train_chat --dataset=talks --init_from=out/base --out_dir=out/chat
$ python data/chat/prepare.py pairs.jsonl --name=pairs --tokenizer=out/chat --block_size=256

Each line is a conversation or, in files of their own, a preference pair:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}

For "messages" a bare list will do, a "prompt" with its "completion", or an "instruction" with its
"output" and perhaps an "input"; "prompt", "chosen" and "rejected" can be lists of messages. What
the assistant says is learned, and the mark that ends its turn: not what others say, of a pair not
what was asked. A conversation lies whole in a row, beside others that still fit; a pair is two rows
of its own. The marks around the messages are plain text, and the end of text after an answer, so
that the vocabulary stays the base's; --template takes others.
"""

import argparse
import bisect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import DATA, FIRST, LEARNED, PADDING, SPLITS, Writer
from flatgpt.data.hf_tokenizer import find_tokenizer
from flatgpt.data.sources import bytes_of, find_files, identity, without_bom
from flatgpt.data.text import check_fraction, own_folder
from flatgpt.data.tokenizer import ASSISTANT, EOT, Tokenizer
from flatgpt.errors import UserError

COMMAND = 'python data/chat/prepare.py'
# A mark is encoded by itself. With a line end on either side of a message, and no more than one,
# GPT-2's tokenizer gives the same ids as for the whole text at once, which a base model knows.
TEMPLATE = {
    'system': ['System:\n', '\n'],
    'user': ['User:\n', '\n'],
    ASSISTANT: ['Assistant:\n', EOT],
}
BLANK_LINE = '\n\n'  # what ends an answer where the tokenizer has no end of text
Sequence = tuple[np.ndarray, np.ndarray]  # ids, and whether each is to be learned


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    folder = output_folder(args)
    tokenizer = with_template(find_tokenizer(args.tokenizer), args.template)
    try:
        files, val_files = find_files(args.files), find_files(args.val)
        own = {identity(path) for path in val_files}
        files = [path for path in files if identity(path) not in own]
        if not files:
            raise UserError('nothing is left to train on: all the files are given with --val')
        sources = {'train': read(files, args, tokenizer), 'val': read(val_files, args, tokenizer)}
        write(args, folder, tokenizer, sources)
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror or error}') from error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('files', nargs='*', help='JSON-lines files, folders and patterns')
    add('--name', help='what to call the dataset; it goes to data/NAME')
    add('--out_dir', type=lambda text: Path(text) if text else None, help='write here instead')
    add(
        '--tokenizer',
        default='gpt2',
        help='that of the model to tune: the folder of its run or a tokenizer.json; or gpt2 '
        '(default), byte, a tiktoken name',
    )
    add(
        '--template',
        type=Path,
        help='a JSON file {"user": ["before a message", "after it"], "assistant": [...]}; default: '
        f"the tokenizer's own, or else {json.dumps(TEMPLATE)}",
    )
    add('--block_size', type=int, default=1024, help='tokens per row, default %(default)s')
    add(
        '--long',
        choices=('drop', 'cut', 'error'),
        default='drop',
        help='what to do with a conversation that is longer: leave it out (default), keep its '
        'beginning, or stop; either is counted',
    )
    add('--val', action='append', default=[], help='take these files for validation')
    add('--val_fraction', type=float, default=0.1, help='part for validation, default %(default)s')
    args = parser.parse_args(argv)
    if not args.files:
        raise UserError(f'say which conversations: {COMMAND} FILES --name=talks (see --help)')
    check_fraction(args)
    if args.block_size < 2:
        raise UserError(f'--block_size={args.block_size}: needs at least 2')
    if args.block_size > 2**20:
        raise UserError(f'--block_size={args.block_size}: no model here reads as far')
    return args


def output_folder(args: argparse.Namespace) -> Path:
    if not args.out_dir and not re.fullmatch(r'\w[\w.-]*', args.name or ''):
        raise UserError(
            f'say what to call it, with letters, digits, _, - and .: {COMMAND} {args.files[0]} '
            '--name=talks'
        )
    return own_folder(args)


# --- the tokenizer


def with_template(tokenizer: Tokenizer, path: Path | None) -> Tokenizer:
    """The tokenizer with the template in the file, or with its own, or with TEMPLATE."""
    template = tokenizer.chat_template or TEMPLATE
    if path:
        try:
            template = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: not a chat template: {error}') from error
        if not isinstance(template, dict):
            raise UserError(f'{path}: not a chat template, which is {json.dumps(TEMPLATE)} or so')
    elif not tokenizer.chat_template and tokenizer.eot is None:
        template = TEMPLATE | {ASSISTANT: [TEMPLATE[ASSISTANT][0], BLANK_LINE]}
    try:
        tokenizer = Tokenizer.from_dict(tokenizer.to_dict() | {'chat_template': template})
        if not template or not tokenizer.chat_template[ASSISTANT][1]:
            raise UserError('it has nothing that ends what the assistant says')
        for before, after in tokenizer.chat_template.values():
            tokenizer.encode_mark(before), tokenizer.encode_mark(after)  # letters may be lacking
    except UserError as error:
        raise UserError(
            f'{path or f"the chat template for {tokenizer.name}"}: {error}; --template=FILE takes '
            'another'
        ) from error
    return tokenizer


# --- reading


@dataclass
class Samples:
    """What fits into a row, in the order of the files: of pairs the better answer, then the worse.
    Memory holds all of it."""

    sequences: list[Sequence] = field(default_factory=list)
    pairs: bool | None = None  # not known before the first line
    cut: int = 0
    dropped: int = 0

    @property
    def count(self) -> int:
        return len(self.sequences) // (2 if self.pairs else 1)


def read(files: list[Path], args: argparse.Namespace, tokenizer: Tokenizer) -> Samples:
    samples = Samples()
    with tqdm(
        total=bytes_of(files), unit='B', unit_scale=True, desc='reading', disable=None
    ) as bar:
        for path in files:
            for where, record, size in read_records(path):
                try:
                    add(samples, record, args, tokenizer)
                except UserError as error:
                    raise UserError(f'{where}: {error}') from error
                bar.update(size)
    return samples


def read_records(path: Path) -> Iterator[tuple[str, dict, int]]:
    """Where each line is, what it says, and how many bytes it has."""
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            where = f'{path}, line {number}'
            block = without_bom(line)[0] if number == 1 else line
            if not block.strip():
                raise UserError(f'{where}: is empty')
            try:
                record = json.loads(block.decode())
            except UnicodeDecodeError as error:
                raise UserError(f'{where}: not UTF-8; save the file as UTF-8') from error
            except (ValueError, RecursionError) as error:
                raise UserError(f'{where}: not JSON, which each line has to be: {error}') from error
            if isinstance(record, list):
                if any(isinstance(part, dict) and 'role' not in part for part in record):
                    raise UserError(f'{where}: is an array of records; give each a line of its own')
                record = {'messages': record}
            if not isinstance(record, dict):
                raise UserError(f'{where}: is no object with "messages", but {str(record)[:40]!r}')
            yield where, record, len(line)


def add(samples: Samples, record: dict, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    record = {key: value for key, value in record.items() if value is not None}  # as tables have
    pairs = 'chosen' in record or 'rejected' in record
    if samples.pairs not in (None, pairs):
        raise UserError('conversations and preference pairs in one dataset; prepare two')
    samples.pairs, size = pairs, args.block_size
    sequences = pair(record, tokenizer) if pairs else [conversation(record, tokenizer)]
    longest = max(len(ids) for ids, _ in sequences)
    if longest > size and args.long == 'error':
        raise UserError(
            f'{longest} tokens, and a row holds {size}; --long=drop leaves such out, --long=cut '
            'keeps their beginning'
        )
    cut = [(ids[:size], learned[:size]) for ids, learned in sequences]
    useless = not all(learned.any() for _, learned in cut)
    useless = useless or (pairs and np.array_equal(cut[0][0], cut[1][0]))
    if longest > size and (args.long == 'drop' or useless):  # a cut can leave nothing to learn
        samples.dropped += 1
        return
    samples.cut += longest > size
    samples.sequences += cut


def conversation(record: dict, tokenizer: Tokenizer) -> Sequence:
    if 'messages' in record:
        messages = messages_of(record, 'messages')
    elif 'instruction' in record:
        asked = [record['instruction'], record.get('input') or '']
        if not all(isinstance(text, str) for text in asked):
            raise UserError("'instruction' and 'input' are not both text")
        prompt = {'instruction': '\n\n'.join(text for text in asked if text)}
        messages = messages_of(prompt, 'instruction') + messages_of(record, 'output', ASSISTANT)
    else:
        messages = messages_of(record, 'prompt') + messages_of(record, 'completion', ASSISTANT)
    ids, learned = render(messages, tokenizer)
    learned[:1] = False  # what stands before it in a row has nothing to do with it
    if not learned.any():
        raise UserError('the assistant says nothing, so that there is nothing to learn')
    return ids, learned


def pair(record: dict, tokenizer: Tokenizer) -> list[Sequence]:
    """What was asked with each of the answers, which alone are learned."""
    answers = [messages_of(record, key, ASSISTANT) for key in ('chosen', 'rejected')]
    if answers[0] == answers[1]:
        raise UserError('chosen and rejected are the same answer, so that neither is better')
    asked = 'messages' if 'messages' in record else 'prompt'
    if asked in record:
        prompt = messages_of(record, asked)
    else:  # both tell the whole conversation
        alike = takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False))
        prompt = [message for message, _ in alike]
    if all(answer[: len(prompt)] == prompt for answer in answers):
        answers = [answer[len(prompt) :] for answer in answers]
    if not prompt or any(not answer or answer[0]['role'] != ASSISTANT for answer in answers):
        raise UserError('chosen and rejected are no two answers of the assistant to one prompt')
    start = len(render(prompt, tokenizer)[0])
    sequences = [render(prompt + answer, tokenizer) for answer in answers]
    for _, learned in sequences:
        learned[:start] = False
    return sequences


def messages_of(record: dict, key: str, role: str = 'user') -> list[dict]:
    """The messages under a key: a list of them, or a text, which is one of that role."""
    messages = record.get(key)
    if messages is None:
        raise UserError(f'no {key!r}; it has {", ".join(record) or "no fields"}')
    if isinstance(messages, str):
        messages = [{'role': role, 'content': messages}]
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{key!r} is neither a text nor a list of messages')
    for number, message in enumerate(messages):
        for name in ('role', 'content'):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise UserError(f'{key}[{number}]: has no text as its {name!r}')
    return [{'role': message['role'], 'content': message['content']} for message in messages]


def render(messages: list[dict], tokenizer: Tokenizer) -> Sequence:
    end = tokenizer.chat_template[ASSISTANT][1]
    if end not in tokenizer.special:
        for number, message in enumerate(messages):
            if message['role'] == ASSISTANT and end in message['content']:
                raise UserError(
                    f'messages[{number}]: the answer has {end!r} in it, which ends a turn; '
                    '--template=FILE takes another mark'
                )
    return tokenizer.render(messages)


# --- writing


def write(
    args: argparse.Namespace, folder: Path, tokenizer: Tokenizer, sources: dict[str, Samples]
) -> None:
    train, val = sources['train'], sources['val']
    if val.pairs not in (None, train.pairs):
        raise UserError('conversations and preference pairs in one dataset; prepare two')
    splits = {'train': train.sequences, 'val': val.sequences}
    if not args.val:
        splits = divide(train.sequences, args.val_fraction, 2 if train.pairs else 1)
    for split, purpose in (('train', 'train'), ('val', 'validate')):
        if not splits[split]:
            if train.count == 1 and not args.val:
                raise UserError('one sample cannot be divided; --val=FILE takes others')
            raise UserError(
                f'{folder}: no conversation is left to {purpose} on; {train.dropped + val.dropped} '
                f'were left out, longer than --block_size={args.block_size}'
            )
    length, learned = args.block_size, 0
    if train.pairs:  # which are not packed: no row need be longer than the longest, to the next 64
        longest = max(len(ids) for ids, _ in train.sequences + val.sequences)
        length = min(length, -(-longest // 64) * 64)
    rows = {'length': length, 'pairs': bool(train.pairs)}
    with Writer(folder, tokenizer, rows=rows) as writer:
        for split in SPLITS:
            each = [[s] for s in splits[split]] if train.pairs else pack(splits[split], args)
            for row in each:
                ids, flags = filled(row, length, tokenizer.eot or 0)
                writer.write(split, ids, flags)
                learned += int((flags & LEARNED > 0).sum())
    report(args, writer, train, val, learned)


def divide(sequences: list[Sequence], fraction: float, each: int) -> dict[str, list[Sequence]]:
    """The first sample for validation, and from there on evenly spaced ones."""
    parts = {split: [] for split in SPLITS}
    for number in range(len(sequences) // each):
        takes_one_more = math.ceil((number + 1) * fraction) > math.ceil(number * fraction)
        sample = sequences[number * each : (number + 1) * each]
        parts['val' if takes_one_more else 'train'] += sample
    return parts


def pack(sequences: list[Sequence], args: argparse.Namespace) -> list[list[Sequence]]:
    """Rows of whole sequences: each goes, the longest first, where the least room is left that
    holds it (best fit decreasing)."""
    rows: list[list[Sequence]] = []
    by_room: dict[int, list[int]] = {}  # room left -> numbers of rows
    rooms: list[int] = []  # the keys of by_room, sorted
    for sequence in sorted(sequences, key=lambda sequence: -len(sequence[0])):
        length = len(sequence[0])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            room, row = args.block_size, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(sequence)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(row)
    return rows


def filled(row: list[Sequence], size: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """-> the ids of a row, and their flags."""
    ids, flags = np.full(size, padding), np.full(size, PADDING, np.uint8)
    at = 0
    for sequence, learned in row:
        end = at + len(sequence)
        ids[at:end], flags[at:end] = sequence, learned * LEARNED
        flags[at] |= FIRST
        at = end
    flags[at : at + 1] |= FIRST
    return ids, flags


def report(
    args: argparse.Namespace, writer: Writer, train: Samples, val: Samples, learned: int
) -> None:
    tokens, length = sum(map(writer.tokens, SPLITS)), writer.rows['length']
    used = sum(len(ids) for ids, _ in train.sequences + val.sequences)
    what = 'preference pairs' if train.pairs else 'conversations'
    print(writer.summary())
    print(
        f'{train.count + val.count:,} {what} in {tokens // length:,} rows of '
        f'{length:,}, {1 - used / tokens:.1%} of them padding; {learned:,} tokens to learn'
    )
    cut, dropped = train.cut + val.cut, train.dropped + val.dropped
    print(f'longer than a row: {cut:,} cut, {dropped:,} left out')
    dataset = writer.folder.name if writer.folder.parent == DATA else writer.folder.resolve()
    config = 'train_dpo' if train.pairs else 'train_chat'
    base = args.tokenizer if Path(args.tokenizer).is_dir() or args.tokenizer == 'gpt2' else '...'
    print(f'Train on it: python train.py {config} --dataset={dataset} --init_from={base}')
