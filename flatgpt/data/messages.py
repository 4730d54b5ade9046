"""
What a row of chat data means, and what a message says, there and in a request to the server.

    content_text([{'type': 'text', 'text': 'Hi'}])    # 'Hi'
    template_role('human', tokenizer.chat_template)   # 'user'
    prompt, answers = RowReader(tokenizer.chat_template).read({'prompt': 'Hi', 'response': 'Yo'})

What is understood is listed here. Whatever else could change the meaning is refused by name.
"""

import re
from dataclasses import dataclass, field
from itertools import takewhile

from flatgpt.data.tokenizer import ASSISTANT
from flatgpt.errors import UserError

ROLES = {  # other names for a role, in lower case
    'human': 'user',
    'gpt': ASSISTANT,
    'chatgpt': ASSISTANT,
    'bing': ASSISTANT,
    'bard': ASSISTANT,
    'model': ASSISTANT,
    'bot': ASSISTANT,
    'developer': 'system',  # what OpenAI calls it since o1
}
PART_FIELDS = {'type', 'text'}
CONVERSATION = ('messages', 'conversations', 'conversation')
ASKED = ('prompt', 'instruction', 'question', 'query', 'input')
EXTRA = ('input', 'context')  # of an instruction; of another question the last alone
ANSWERED = ('completion', 'response', 'output', 'answer')
PAIR = ('chosen', 'rejected')
SYSTEM = ('system', 'system_prompt')
# Whether a message or a row is to be learned: for OpenAI and Mistral, for axolotl, for others
LEARNED = ('weight', 'train', 'loss_mask')
COLUMNS = {*CONVERSATION, *ASKED, *EXTRA, *ANSWERED, *PAIR, *SYSTEM, 'history'}
HARMLESS = """id idx index uid uuid hash row_id prompt_id question_id message_id conversation_id
source src origin url dataset dataset_name subset category topic subject domain task tags difficulty
lang language license author date timestamp created_at model model_name generator version metadata
meta num_turns num_tokens""".split()  # of a row or a message: where it is from, what it is about
TURN = re.compile(r'\n\n(Human|Assistant):')  # of a dialogue in one text, as in hh-rlhf
EMPTY = 'with an empty text'
UNLEARNED = 'marked as not to be learned'


class LeftOut(Exception):
    """A row that is fine and has nothing to learn; its text says why."""


@dataclass
class Message:
    role: str  # one of the chat template
    content: str
    learned: bool = field(default=True, compare=False)


# -----------------------------------------------------------------------------
# one message


def content_text(content: object) -> str:
    """The text of a message's content: a text, or a list of text parts, a line each.

    The line end is what vLLM and llama.cpp put between parts. UserError for anything else.
    """
    if isinstance(content, list) and content:
        return '\n'.join(map(part_text, content))
    if not isinstance(content, str):
        raise UserError(f'the content is {short(content)}; it must be a text or a list of parts')
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError('the content has half a surrogate pair; write the character out') from error
    return content


def part_text(part: object) -> str:
    if not isinstance(part, dict):
        raise UserError(f'a part of the content is {short(part)}; it must be an object')
    if part.get('type') != 'text':
        raise UserError(
            f'a part of the content has type {short(part.get("type"))}; only text is read'
        )
    if unknown := sorted(key for key in part.keys() - PART_FIELDS if part[key] is not None):
        raise UserError(f'a part of the content has {quoted(unknown)}, which is not understood')
    if not isinstance(part.get('text'), str):
        raise UserError(f'the text of a part is {short(part.get("text"))}; it must be a text')
    return content_text(part['text'])


def template_role(role: object, template: dict) -> str:
    """The role of the chat template that a role means; UserError where it has none."""
    if isinstance(role, str):
        for name in (role, role.lower(), ROLES.get(role.lower())):
            if name in template:
                return name
    raise UserError(f'no role {short(role)}; there are {", ".join(template)}')


def short(value: object) -> str:
    """A value as a line of an error shows it."""
    text = repr(value[:41] if isinstance(value, str) else value)
    return text if len(text) <= 43 else f'{text[:40]}...'


def plain(name: str) -> str:
    return short(name)[1:-1]


def quoted(names: list[str]) -> str:
    """Names in quotes, the first ten of them."""
    more = f' and {len(names) - 10} more' if len(names) > 10 else ''
    return ', '.join(map(short, names[:10])) + more


def is_blank(value: object) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and not value.strip())


# -----------------------------------------------------------------------------
# rows


class Row:
    """The columns of a row that say something, and which of them were used."""

    def __init__(self, columns: dict):
        self.columns = columns
        self.used: list[str] = []

    def find(self, *names: str) -> str | None:
        """The first of the columns that is there and not blank."""
        return next((name for name in names if not is_blank(self.columns.get(name))), None)

    def take(self, *names: str) -> str | None:
        """The same, which is used now."""
        name = self.find(*names)
        self.used += [name] if name else []
        return name

    def has(self, *names: str) -> bool:
        """Whether one of the columns is there, blank or not."""
        return any(name in self.columns for name in names)

    def names(self) -> str:
        return ', '.join(map(plain, list(self.columns)[:10])) or 'no fields'

    def check_all_used(self) -> None:
        """UserError for a column that says something and was not used."""
        left = [n for n in self.columns if n not in self.used and self.find(n)]
        if rivals := [name for name in left if name in COLUMNS]:
            raise UserError(
                f'fits two formats, that of {self.used[0]!r} and that of {rivals[0]!r}; '
                + (
                    f'put the text of {rivals[0]!r} into a message'
                    if rivals[0] in EXTRA
                    else f'--ignore={rivals[0]} leaves the second out'
                )
            )
        check_understood(left)


def check_understood(unknown: list[str]) -> None:
    if unknown:
        raise UserError(
            f'not understood, and might change what is to be learned: {quoted(unknown)}; '
            f'if not, --ignore={",".join(map(plain, unknown[:10]))} leaves it out'
        )


def flag(fields: dict, names: tuple = LEARNED, values: str = '0 or 1') -> bool | None:
    """What the fields say, which must agree; None where there are none."""
    given = {name: fields[name] for name in names if not is_blank(fields.get(name))}
    for name, value in given.items():
        numbers = (bool, int, float) if values == '0 or 1' else bool
        if not isinstance(value, numbers) or value not in (0, 1):
            raise UserError(
                f'{name!r} is {short(value)}; only {values} is understood; --ignore={name} learns '
                'all the same'
            )
    if len(set(given.values())) > 1:
        raise UserError(f'{quoted(list(given))} contradict each other; --ignore=... leaves one out')
    return bool(next(iter(given.values()))) if given else None


class RowReader:
    """Reads rows into messages with the roles of a chat template.

    `ignored` names fields of rows and messages that are left out, besides the HARMLESS.
    """

    def __init__(self, template: dict, ignored: tuple | list = ()):
        self.template = template
        self.ignored = {*HARMLESS, *ignored}

    def read(self, row: dict) -> tuple[list[Message], list[list[Message]]]:
        """-> (messages before the answer, answers): two for a preference pair, the better first;
        for a conversation one, which is all of it.

        UserError for what cannot be used, LeftOut for what has nothing to learn.
        """
        row = Row(self.without_ignored(row))
        pair = row.find(*PAIR) or (row.has(*PAIR) and not row.find(*CONVERSATION, *ANSWERED))
        learned = [flag(row.columns)]
        if not pair:
            learned.append(flag(row.columns, ('label',), 'true or false'))
        if False in learned:
            raise LeftOut(UNLEARNED)
        read = self.pair(row) if pair else ([], [self.conversation(row)])
        row.used += [*LEARNED, *([] if pair else ['label'])]
        row.check_all_used()
        if not all(any(message.learned for message in answer) for answer in read[1]):
            raise LeftOut(UNLEARNED)
        return read

    def without_ignored(self, fields: dict) -> dict:
        return {name: value for name, value in fields.items() if name not in self.ignored}

    # --- conversations

    def conversation(self, row: Row) -> list[Message]:
        if talk := row.take(*CONVERSATION):
            messages = self.messages(row.columns[talk], talk)
            if (asked := row.find(*ASKED)) and asked != 'instruction':  # UltraChat repeats it
                prompt = self.messages(row.columns[asked], asked)
                if prompt in (m[: len(prompt)] for m in (messages, after_system(messages))):
                    row.take(asked)
        elif asked := self.question(row):
            answered = row.take(*ANSWERED)
            if not answered:
                raise missing(row, ANSWERED, f"{row.used[0]!r} has no 'completion' or 'response'")
            messages = asked + self.messages(row.columns[answered], answered, ASSISTANT)
        else:
            names = (*CONVERSATION, *ASKED)
            raise missing(row, names, "no 'messages', no 'conversations', no 'prompt'")
        messages = self.with_system(row, messages)
        if not any(message.role == ASSISTANT for message in messages):
            raise UserError('the assistant says nothing, so that there is nothing to learn')
        return messages

    def question(self, row: Row) -> list[Message]:
        """What came before and what was asked, or nothing where no column asks."""
        asked = row.take(*ASKED)
        if asked is None:
            return []
        value = row.columns[asked]
        if extra := row.take(*(EXTRA if asked == 'instruction' else EXTRA[1:])):
            value = [value, row.columns[extra]]
            if not all(isinstance(text, str) and not dialogue(text, False) for text in value):
                raise UserError(f'{asked!r} and {extra!r} are not both text')
            value = '\n\n'.join(value)
        elif asked == 'instruction' and not isinstance(value, str):
            raise UserError(f"'instruction' and 'input' are not both text: {short(value)}")
        return self.history(row) + self.messages(value, asked, ends=False)

    def history(self, row: Row) -> list[Message]:
        """Earlier turns: a list of [what was asked, what was answered], or of messages."""
        if not row.columns.get(row.take('history')):
            return []
        turns = row.columns['history']
        if not isinstance(turns, list):
            raise UserError(f"'history' is {short(turns)}; it must be a list of [question, answer]")
        if not any(isinstance(turn, list) for turn in turns):
            return self.messages(turns, 'history')
        messages = []
        for number, turn in enumerate(turns):
            if not isinstance(turn, list) or len(turn) != 2:
                raise UserError(f'history[{number}]: is no [question, answer]')
            for text, role in zip(turn, ('user', ASSISTANT), strict=True):
                messages += self.messages([{'role': role, 'content': text}], f'history[{number}]')
        return messages

    def system(self, row: Row) -> list[Message]:
        name = row.take(*SYSTEM)
        if not name:
            return []
        if not isinstance(row.columns[name], str):
            raise UserError(f'{name!r} is {short(row.columns[name])}; it must be a text')
        return self.messages([{'role': 'system', 'content': row.columns[name]}], name)

    def with_system(self, row: Row, messages: list[Message]) -> list[Message]:
        """The messages after the system text of a row, where they do not begin with the same."""
        system, first = self.system(row), messages[:1]
        if not system or first == system:
            return messages
        if first and first[0].role == 'system':
            name = row.find(*SYSTEM)
            raise UserError(
                f'fits two system texts, {short(system[0].content)} of {name!r} and '
                f'{short(first[0].content)} of the first message; --ignore={name} leaves the first '
                'out'
            )
        return system + messages

    # --- preference pairs

    def pair(self, row: Row) -> tuple[list[Message], list[list[Message]]]:
        for key in PAIR:
            if key not in row.columns:
                raise UserError(f'no {key!r}; it has {row.names()}; a pair needs both')
            if not row.take(key):
                raise LeftOut(EMPTY)
        answers = [self.messages(row.columns[key], key, ASSISTANT) for key in PAIR]
        if answers[0] == answers[1]:
            raise UserError(
                'chosen and rejected are the same answer, so that neither is better; '
                '--bad=drop leaves such rows out'
            )
        self.check_scores(row)
        talk = row.find(*CONVERSATION)
        if talk and self.messages(row.columns[talk], talk) == answers[0]:  # as in UltraFeedback
            row.take(talk)
            talk = None
        prompt = self.question(row)
        if talk and not prompt:
            prompt = self.messages(row.columns[row.take(talk)], talk)
        return divide_pair(self.with_system(row, prompt), answers)

    def check_scores(self, row: Row) -> None:
        scores = [row.columns.get(row.take(f'score_{key}')) for key in PAIR]
        if all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:
            raise UserError(
                f"'score_chosen' is below 'score_rejected' ({scores[0]} < {scores[1]}); "
                '--ignore=score_chosen,score_rejected leaves both out'
            )

    # --- messages

    def messages(
        self, value: object, key: str, role: str = 'user', ends: bool = True
    ) -> list[Message]:
        """The messages under a key: of a list, of one object, of a dialogue in one text, or a
        text, which is one of that role. One that does not end may break off at the answer."""
        if isinstance(value, str):
            value = dialogue(value, ends) or [{'role': role, 'content': value}]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list) or not value:
            raise UserError(f'{key!r} is neither a text nor a list of messages')
        messages = []
        for number, message in enumerate(value):
            try:
                messages += self.message(message)
            except UserError as error:
                raise UserError(f'{key}[{number}]: {error}') from error
        return messages

    def message(self, message: object) -> list[Message]:
        """It, or nothing for a system message without a word."""
        fields = self.without_ignored(message) if isinstance(message, dict) else {}
        known = ('role', 'from', 'content', 'value', *LEARNED)
        left = [name for name in fields if name not in known]
        check_understood([name for name in left if fields[name] not in (None, '', [], {})])
        role, content = one_key(fields, 'role', 'from'), one_key(fields, 'content', 'value')
        try:
            role = template_role(role, self.template)
        except UserError as error:
            raise UserError(f'{error}; --template=FILE can add one') from error
        learned = flag(fields)
        if learned and role != ASSISTANT:
            raise UserError(
                f'{quoted([n for n in LEARNED if fields.get(n)])} is set for a message of '
                f"{role!r}; only the assistant's words can be learned: remove it there"
            )
        text = '' if content is None else content_text(content)
        if is_blank(text):
            if role == 'system':
                return []
            raise LeftOut(EMPTY)
        return [Message(role, text, role == ASSISTANT and learned is not False)]


def missing(row: Row, names: tuple, what: str) -> Exception:
    """What to raise where none of the columns says anything."""
    if row.has(*names):
        return LeftOut(EMPTY)
    return UserError(f'{what}; it has {row.names()}; --help shows the formats')


def one_key(fields: dict, *names: str) -> object:
    """The value of a message's field that goes by either name."""
    there = [name for name in names if fields.get(name) is not None]
    if len(there) > 1:
        raise UserError(f'fits two formats, by {quoted(there)}; --ignore=... leaves one out')
    if not there and not any(name in fields for name in names):
        raise UserError(f'has no text as its {names[0]!r}')
    return fields[there[0]] if there else None


def dialogue(text: str, ends: bool) -> list[dict]:
    """The turns of a dialogue written into one text, or nothing where it is none."""
    if not text.startswith('\n\nHuman:'):
        return []
    _, *parts = TURN.split(text)
    turns = [
        {'role': 'user' if who == 'Human' else ASSISTANT, 'content': said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    breaks_off = not ends and turns[-1] == {'role': ASSISTANT, 'content': ''}
    return turns[:-1] if breaks_off else turns


def after_system(messages: list[Message]) -> list[Message]:
    """Without the system messages at the beginning."""
    first = next((i for i, message in enumerate(messages) if message.role != 'system'), None)
    return [] if first is None else messages[first:]


def divide_pair(
    prompt: list[Message], answers: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """The prompt and the answers, which may tell the whole conversation themselves."""
    if all(answer and answer[0].role != ASSISTANT for answer in answers):
        alike = takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False))
        common = [message for message, _ in alike]
        asked, told = after_system(prompt), after_system(common)
        system, same = prompt[: len(prompt) - len(asked)], common[: len(common) - len(told)]
        asked = asked or told
        if told[: len(asked)] == asked and (system == same or not system or not same):
            prompt = (system or same) + asked
            answers = [answer[len(same) + len(asked) :] for answer in answers]
    if not after_system(prompt) or any(
        not answer or answer[0].role != ASSISTANT for answer in answers
    ):
        raise UserError(
            'chosen and rejected are no two answers of the assistant to one prompt; give what was '
            "asked as 'prompt', or in both the whole conversation"
        )
    return prompt, answers
