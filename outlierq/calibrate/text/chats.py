"""Chats as data sets have them become messages of role and content, and these the text that the chat template makes.

A template asks for `role` and `content`, and renders whatever else a message holds as nothing, without a word. So other
shapes are mapped or refused here, and of every chat something must be found again in what was rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import Thread
from typing import Any

from outlierq.core.errors import StatsError
from outlierq.core.machine.threads import check_room, end
from outlierq.core.machine.untrusted import brief, json_value

SECONDS_PER_CHAT = 3.0
# SyntaxError: of the Python that a template becomes, such as a `continue` outside of a loop.
TEMPLATE_FAULTS = (
    TypeError,
    LookupError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    OSError,
    SyntaxError,
)

# Columns that hold a whole chat, and pairs of columns that are a question and its answer; the first that fits counts.
CHATS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
)
BEFORE = ("system", "system_prompt")  # what may stand beside a pair: the turn before it,
ADDED = ("input", "context")  # and what belongs to the question
SHAPES = (
    "messages, conversations, prompt and completion, instruction and output, question and answer, prompt and chosen, "
    "and text are understood; or set `column`"
)

PEOPLE = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES = PEOPLE | {name: name for name in ("system", "user", "assistant", "tool")}
ROLES |= {"bing": "assistant", "bard": "assistant", "model": "assistant", "function_call": "assistant"}
ROLES |= {"function": "tool", "observation": "tool"}
NEEDED = "messages need role and content (or tool_calls), or from and value; set `column` to the column that holds them"

Message = dict[str, Any]


def chat_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns that make a chat, with those that belong to them; empty when there are none."""
    for name in CHATS:
        if name in names:
            return (name,)
    for pair in PAIRS:
        if set(pair) <= set(names):
            return (*pair, *(name for name in (*BEFORE, *ADDED) if name in names))
    return ("chosen",) if "chosen" in names else ()


def messages_of(row: Mapping[str, Any], where: str, left_out: Counter[str]) -> list[Message]:
    """The messages of a row that holds the columns of a chat, or one of text; none when nothing is said in it.

    where: how the row is called. left_out: counts what is skipped: chats and turns without text, pictures.
    StatsError names the keys or the type that is not understood.
    """
    values = list(row.values())
    turns = _turns(values[0], where, "user") if len(row) == 1 else _pair(row, where)
    messages: list[Message] = []
    for turn in turns:
        message = _message(turn, where, left_out)
        if message["content"].strip() or message.get("tool_calls"):
            messages.append(message)
            continue
        left_out["turns without text"] += 1
        if message["role"] != "system":  # an answer to nothing says nothing, and templates want turns to alternate
            break
    if all(message["role"] == "system" for message in messages):
        left_out["rows without text"] += 1
        return []
    return messages


def rendered(tokenizer: Any, messages: list[Message], where: str) -> str:
    """One chat in the tokenizer's own template; StatsError when it cannot be rendered, or nothing of it is there.

    Templates of models that see want the content of a message as a list of parts, others as text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise StatsError("the tokenizer has no chat template", hint="leave chat_template out")
    try:
        return _rendered(tokenizer, messages, messages, where)
    except StatsError as error:
        try:
            return _rendered(tokenizer, [_in_parts(message) for message in messages], messages, where)
        except StatsError:
            raise error from None


def _in_parts(message: Message) -> Message:
    """A message whose content is a list of one part, its text."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _rendered(tokenizer: Any, shaped: list[Message], messages: list[Message], where: str) -> str:
    """The messages in the form of `shaped`, rendered."""
    from jinja2 import TemplateError

    try:
        text = within(SECONDS_PER_CHAT, lambda: tokenizer.apply_chat_template(shaped, tokenize=False))
    except (TemplateError, *TEMPLATE_FAULTS) as error:
        raise StatsError(f"the chat template does not accept the messages of {where}: {error}") from error
    said = [message["content"] for message in messages if message["content"]]
    if not text.strip() or (said and not any(word in text for content in said for word in content.split())):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise StatsError(
            f"the chat template writes nothing of the messages of {where}, whose roles are {brief(roles)}",
            hint="give chats with the roles that the template knows, or leave chat_template out",
        )
    return text


def within(seconds: float, call: Callable[[], str]) -> str:
    """What `call` returns; TimeoutError when it takes longer, and its thread is ended: a template is a program, and its
    sandbox knows no time.
    """
    results: list[str] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # raised again below, in the thread that asked
            faults.append(error)
        except SystemExit:
            return  # its time is up, and nobody waits for it

    check_room(1)
    thread = Thread(target=run, name="template", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        end(thread)
        raise TimeoutError(f"it takes more than {seconds:g} seconds")
    if faults:
        raise faults[0]
    return results[0]


def _pair(row: Mapping[str, Any], where: str) -> list[Any]:
    """The turns of a question and its answer, each a text or a list of messages, and of what belongs to them."""
    asked, answered = list(row)[:2]
    question = row[asked]
    for name in ADDED:
        if isinstance(question, str) and isinstance(row.get(name), str) and row[name].strip():
            question = f"{question}\n\n{row[name]}"
    answer = _turns(row[answered], where, "assistant")
    if answered == "chosen" and answer and isinstance(answer[0], Mapping) and answer[0].get("role") == "user":
        return answer  # preference data often repeats the prompt there
    before = [turn for name in BEFORE if row.get(name) for turn in _turns(row[name], where, "system")]
    return [*before, *_turns(question, where, "user"), *answer]


def _turns(value: Any, where: str, role: str) -> list[Any]:
    """The turns in one value: a list of messages, also as JSON or as an object of lists, or a text as one turn."""
    if isinstance(value, str) and value.lstrip().startswith('[{"'):
        value = json_value(value, f"the chat of {where}", StatsError)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if value is not None and not isinstance(value, list):
        raise StatsError(f"{where} holds {type(value).__name__} where text or messages are needed", hint=NEEDED)
    return value or []


def _message(turn: Any, where: str, left_out: Counter[str]) -> Message:
    """A turn with `role` and `content`; keys without a value are dropped, since templates ask whether there are any."""
    keys = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    named = next((key for key in ("role", "from") if isinstance(keys.get(key), str)), None)
    text = next((key for key in ("content", "value", "text") if key in keys), None)
    known = isinstance(turn, Mapping) and any(key in turn for key in ("content", "value", "text", "tool_calls"))
    if named is None or not known:
        keys_named = (
            f"the keys {brief(', '.join(map(str, turn)))}" if isinstance(turn, Mapping) else type(turn).__name__
        )
        raise StatsError(f"a message of {where} has {keys_named}", hint=NEEDED)
    rest = {key: value for key, value in keys.items() if key not in (named, text)}
    return {**rest, "role": _role(keys[named], named, where), "content": _content(keys.get(text, ""), where, left_out)}


def _role(name: str, key: str, where: str) -> str:
    """The role as templates call it. `role` may hold a name of the template's own, `from` only known ones."""
    if key == "role":
        return PEOPLE.get(name, name)
    if name not in ROLES:
        raise StatsError(f"a message of {where} is from {brief(name)!r}", hint=f"known are {', '.join(ROLES)}")
    return ROLES[name]


def _content(value: Any, where: str, left_out: Counter[str]) -> str:
    """The text of a message; of a list of parts, that of the parts that are text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise StatsError(f"a message of {where} has {type(value).__name__} for its content", hint="it must be text")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else None
            left_out[f"parts of kind {brief(kind or type(part).__name__, 40)}"] += 1
    return "".join(texts)
