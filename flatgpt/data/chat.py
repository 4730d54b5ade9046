"""
Prepare conversations or preference pairs: rows of one context each, of which the assistant's words
are learned.

$ python data/chat/prepare.py talks.jsonl --name=talks --tokenizer=out/base --block_size=256
$ python train.py train_chat --dataset=talks --init_from=out/base --out_dir=out/chat
$ python data/chat/prepare.py pairs.jsonl --name=pairs --tokenizer=out/chat --block_size=256

Each line is a conversation or, in files of their own, a preference pair; a .json file can be one
array of them. These are read as they are:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"prompt": "Hi", "completion": "Hello!"}      # or question, query; response, output, answer
    {"instruction": "Add", "input": "1 2", "output": "3"}      # or context; input may be lacking
    {"question": "Who?", "context": "Ada wrote", "answer": "Ada"}
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}  # or whole conversations in both

A text can be a list of messages instead, their content a list of text parts (a line each), and a
dialogue one text, "\\n\\nHuman: Hi\\n\\nAssistant: Hello!". First come a "system" text and a
"history", a list of [question, answer]. A row that fits two formats is refused.

What the assistant says is learned, and the mark that ends its turn: not what others say, of a pair
not what was asked, and no message with "weight": 0, "train": false or "loss_mask": 0. A row marked
so, or "label": false, or with an empty question or answer is left out and counted. Any other field
of a row or a message is refused by name, because it might change what is to be learned: --ignore
leaves it out, and --bad=drop leaves out, and counts, rows that cannot be used.

A conversation lies whole in a row, beside others that still fit; a pair is two rows of its own. The
marks around the messages are plain text, and the end of text after an answer, so that the
vocabulary stays the base's; --template takes others.
"""

import argparse
import bisect
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flatgpt.data.dataset import DATA, FIRST, PADDING, SPLITS, TARGET, Writer
from flatgpt.data.hf_tokenizer import find_tokenizer
from flatgpt.data.messages import HARMLESS, LeftOut, Message, RowReader, short
from flatgpt.data.sources import bytes_of, find_files, identity, without_bom
from flatgpt.data.text import check_fraction, own_folder
from flatgpt.data.tokenizer import ASSISTANT, EOT, Tokenizer
from flatgpt.errors import UserError
from flatgpt.files import strict_json

COMMAND = 'python data/chat/prepare.py'
# A mark is encoded by itself. With a line end on either side of a message, and no more than one,
# GPT-2's tokenizer gives the same ids as for the whole text at once, which a base model knows.
TEMPLATE = {
    'system': ['System:\n', '\n'],
    'user': ['User:\n', '\n'],
    ASSISTANT: ['Assistant:\n', EOT],
}
BAD_SHOWN = 5  # rows that cannot be used, with their reasons
SPACE = re.compile(r'[ \t\r\n]*')  # of JSON
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
    add(
        '--ignore',
        type=lambda text: text.split(','),
        default=[],
        metavar='A,B',
        help='fields of rows and messages that mean nothing here, besides those that are never '
        f'asked about: {", ".join(HARMLESS)}',
    )
    add(
        '--bad',
        choices=('error', 'drop'),
        default='error',
        help='at a row that cannot be used: stop (default), or leave it out; counted, too',
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
            template = strict_json(path.read_text(encoding='utf-8'))
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
    dropped: int = 0  # longer than a row
    left_out: Counter = field(default_factory=Counter)  # why -> how many
    bad: list[str] = field(default_factory=list)  # what was wrong with the rows of --bad=drop

    @property
    def count(self) -> int:
        return len(self.sequences) // (2 if self.pairs else 1)


def read(files: list[Path], args: argparse.Namespace, tokenizer: Tokenizer) -> Samples:
    samples, reader = Samples(), RowReader(tokenizer.chat_template, args.ignore)
    with tqdm(
        total=bytes_of(files), unit='B', unit_scale=True, desc='reading', disable=None
    ) as bar:
        for path in files:
            for where, block, size in read_rows(path):
                try:
                    add(samples, reader, parse(block), args, tokenizer)
                except LeftOut as reason:
                    samples.left_out[str(reason)] += 1
                except UserError as error:
                    if args.bad == 'error':
                        raise UserError(f'{where}: {error}') from error
                    samples.bad.append(f'{where}: {error}')
                bar.update(size)
    return samples


# --- files


def read_rows(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Where each row is, its bytes, and how many were read for it."""
    if path.suffix.lower() == '.json' and not has_lines(path):
        yield from read_document(path)
        return
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            block = (without_bom(line)[0] if number == 1 else line).strip()
            if block:
                yield f'{path}, line {number}', block, len(line)


def has_lines(path: Path) -> bool:
    """Whether a .json file has a row on each line after all."""
    with path.open('rb') as file:
        lines = (block for line in file if (block := without_bom(line)[0].strip()))
        first, second = next(lines, b''), next(lines, b'')
    try:
        json.loads(first.decode())  # a whole value, be it a row or not: one document has no second
    except (ValueError, RecursionError):
        return False
    return bool(second)


def read_document(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """The rows of a file that is one array, or one row."""
    block = without_bom(path.read_bytes())[0]
    try:
        text = block.decode()
    except UnicodeDecodeError:
        yield str(path), block, len(block)  # which is refused where it is parsed
        return
    if not text.lstrip().startswith('['):
        yield f'{path}, row 1', block, len(block)
        return
    try:
        for number, (row, item, size) in enumerate(array_items(text), 1):
            if number == 1 and is_message(row):  # the whole is one conversation
                yield f'{path}, row 1', block, len(block)
                return
            yield f'{path}, row {number}', item, size
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON: {error}') from error


def array_items(text: str) -> Iterator[tuple[object, bytes, int]]:
    """The items of a JSON array, one at a time, the bytes of each, and how many were read."""
    decoder, end = json.JSONDecoder(), text.index('[')
    at = SPACE.match(text, end + 1).end()
    more = text[at : at + 1] != ']'
    while more:
        before = end + 1
        item, end = decoder.raw_decode(text, at)
        yield item, text[at:end].encode(), len(text[before:end].encode())
        end = SPACE.match(text, end).end()
        if text[end : end + 1] not in (',', ']'):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        more = text[end] == ','
        at = SPACE.match(text, end + 1).end() if more else end
    if rest := text[at + 1 :].strip():
        raise json.JSONDecodeError('Extra data', text, text.rindex(rest))


def parse(block: bytes) -> dict:
    """A row, from the bytes of its line."""
    try:
        row = strict_json(block.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            'not UTF-8; save the file as UTF-8, and a table or an archive as JSON lines'
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        hint = '; if the file is one array, call it .json' if block[:1] == b'[' else ''
        raise UserError(f'not JSON, which each line has to be: {error}{hint}') from error
    except ValueError as error:  # what Python would read and JSON has not
        raise UserError(str(error)) from error
    if isinstance(row, list):
        if any(isinstance(part, dict) and not is_message(part) for part in row):
            raise UserError(
                'is an array of records; give each a line of its own, or call the file .json'
            )
        row = {'messages': row}
    if not isinstance(row, dict):
        raise UserError(f'is no object with "messages", but {short(row)}')
    return row


def is_message(part: object) -> bool:
    return isinstance(part, dict) and ('role' in part or 'from' in part)


# --- samples


def add(
    samples: Samples,
    reader: RowReader,
    row: dict,
    args: argparse.Namespace,
    tokenizer: Tokenizer,
) -> None:
    prompt, answers = reader.read(row)
    pairs = len(answers) > 1
    if samples.pairs not in (None, pairs):
        raise UserError('conversations and preference pairs in one dataset; prepare two')
    samples.pairs, size = pairs, args.block_size
    sequences = [sequence(prompt, answer, tokenizer) for answer in answers]
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


def sequence(prompt: list[Message], answer: list[Message], tokenizer: Tokenizer) -> Sequence:
    """The ids of a conversation, and what of the answer is to be learned."""
    ids, learned = [], []
    for number, message in enumerate(prompt + answer):
        part, said = render(message, number, tokenizer)
        ids.append(part)
        learned.append(said & (message.learned and number >= len(prompt)))
    learned = np.concatenate(learned)
    learned[:1] = False  # what stands before it in a row has nothing to do with it
    return np.concatenate(ids), learned


def render(message: Message, number: int, tokenizer: Tokenizer) -> Sequence:
    end = tokenizer.chat_template[ASSISTANT][1]
    is_text = tokenizer.mark_id(end) is None
    if is_text and message.role == ASSISTANT and end in message.content:
        raise UserError(
            f'messages[{number}]: the answer has {end!r} in it, which ends a turn; '
            '--template=FILE takes another mark'
        )
    return tokenizer.render([{'role': message.role, 'content': message.content}])


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
            raise nothing_left(folder, purpose, args, train, val)
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
                learned += int((flags & TARGET > 0).sum())
    report(args, writer, train, val, learned)


def nothing_left(
    folder: Path, purpose: str, args: argparse.Namespace, train: Samples, val: Samples
) -> UserError:
    reasons, bad = left_out(train, val), train.bad + val.bad
    if longer := train.dropped + val.dropped:
        reasons[f'longer than --block_size={args.block_size} (--long=cut shortens)'] = longer
    why = '; the files have no rows'
    if reasons:
        each = ', '.join(f'{number:,} {reason}' for reason, number in reasons.items())
        why = f'; {reasons.total():,} were left out: {each}' + (f' ({bad[0]})' if bad else '')
    return UserError(f'{folder}: no conversation is left to {purpose} on{why}')


def left_out(train: Samples, val: Samples) -> Counter:
    """Why rows were left out that would have fitted -> how many."""
    bad = len(train.bad) + len(val.bad)
    return train.left_out + val.left_out + Counter({'that cannot be used': bad})


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
        ids[at:end], flags[at:end] = sequence, learned * TARGET
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
    for reason, number in left_out(train, val).items():
        print(f'left out: {number:,} {reason}')
    for line in (train.bad + val.bad)[:BAD_SHOWN]:
        print(f'    {line}')
    dataset = writer.folder.name if writer.folder.parent == DATA else writer.folder.resolve()
    config = 'train_dpo' if train.pairs else 'train_chat'
    base = args.tokenizer if Path(args.tokenizer).is_dir() or args.tokenizer == 'gpt2' else '...'
    print(f'Train on it: python train.py {config} --dataset={dataset} --init_from={base}')
