"""Chats in the shapes that data sets have: all become messages of role and content, or are refused."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outlierq.calibrate.text import chats
from outlierq.calibrate.text.chats import chat_columns, messages_of, rendered
from outlierq.core.errors import StatsError

ASKED, ANSWERED = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
SYSTEM = {"role": "system", "content": "rules"}


class Template:
    """A tokenizer that only renders."""

    def __init__(self, template: str | None):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize):
        return ImmutableSandboxedEnvironment().from_string(self.chat_template).render(messages=messages)


LENIENT = Template("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}")
STRICT = Template("{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% endif %}{% endfor %}")


def read(row, left_out=None):
    """The messages of a row, by the columns that a chat is found in."""
    columns = chat_columns(list(row)) or ("text",)
    return messages_of({name: row[name] for name in columns}, "row 0", Counter() if left_out is None else left_out)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED], "text": "something else"},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"messages": {"role": ["user", "assistant"], "content": ["ask", "answer"]}},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]},
        {"conversations": {"from": ["human", "gpt"], "value": ["ask", "answer"]}},
        {"conversation": [{"role": "prompter", "text": "ask"}, {"role": "assistant", "text": "answer"}]},
        {"prompt": "ask", "completion": "answer"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"instruction": "ask", "input": "", "output": "answer"},
        {"instruction": "ask", "context": None, "response": "answer"},
        {"question": "ask", "answer": "answer", "id": 7},
        {"prompt": "ask", "chosen": "answer", "rejected": "no"},
        {"prompt": "ask", "chosen": [ASKED, ANSWERED], "rejected": [ASKED]},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED]},
    ],
)
def test_the_usual_shapes_give_the_same_messages(row):
    assert read(row) == [ASKED, ANSWERED]


def test_what_stands_beside_a_question_belongs_to_it():
    row = {"system_prompt": "rules", "instruction": "ask", "input": "with this", "output": "answer"}
    assert read(row) == [SYSTEM, {"role": "user", "content": "ask\n\nwith this"}, ANSWERED]


def test_plain_text_is_a_turn_of_the_user():
    assert read({"text": "ask"}) == [ASKED]


def test_calls_of_tools_are_kept_and_empty_keys_dropped():
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    turns = [
        {**ASKED, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    found = read({"messages": turns})
    assert found == [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, turns[2]]
    assert "tool_calls" not in found[0]


def test_parts_of_text_are_taken_and_others_counted():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "as"}, {"type": "text", "text": "k"}, "!"]
    left_out = Counter()
    assert read({"messages": [{"role": "user", "content": parts}]}, left_out) == [{"role": "user", "content": "ask!"}]
    assert left_out == {"parts of kind image": 1}


@pytest.mark.parametrize("value", [None, [], "", "  ", [{"role": "user", "content": ""}], [SYSTEM]])
def test_chats_in_which_nothing_is_said_are_skipped_and_counted(value):
    left_out = Counter()
    assert read({"messages": value}, left_out) == [] and left_out["rows without text"] == 1


def test_a_chat_ends_before_its_first_empty_turn():
    left_out, empty = Counter(), {"role": "assistant", "content": None}
    nothing = {"role": "system", "content": " "}
    assert read({"messages": [nothing, ASKED, empty, ASKED, ANSWERED]}, left_out) == [ASKED]
    assert left_out == {"turns without text": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"speaker": "A", "utterance": "ask"}]}, "a message of row 0 has the keys speaker, utterance"),
        ({"messages": [{"role": "user"}]}, "a message of row 0 has the keys role"),
        ({"messages": [{}]}, "a message of row 0 has the keys"),
        ({"messages": ["ask", "answer"]}, "a message of row 0 has str"),
        ({"messages": 5}, "row 0 holds int where text or messages are needed"),
        ({"question": "ask", "answer": 4}, "row 0 holds int where text or messages are needed"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator'"),
        ({"messages": [{"role": "user", "content": 5}]}, "has int for its content"),
    ],
)
def test_other_shapes_are_refused_with_what_was_found(row, message):
    with pytest.raises(StatsError, match=message) as caught:
        read(row)
    assert caught.value.hint


def test_a_template_that_writes_nothing_of_a_chat_is_refused():
    assert rendered(STRICT, [ASKED, ANSWERED], "row 0") == "<u>ask"
    with pytest.raises(StatsError, match="writes nothing of the messages of row 7, whose roles are w1"):
        rendered(STRICT, [{"role": "w1", "content": "ask"}], "row 7")
    silent = Template("{% for m in messages %}{{ m.body }} : {% endfor %}")
    with pytest.raises(StatsError, match="writes nothing"):
        rendered(silent, [ASKED], "row 0")
    assert rendered(LENIENT, [ASKED], "row 0") == "<s>user: ask</s>"


def test_a_template_that_does_not_end_is_refused_and_its_thread_does_not_go_on(monkeypatch):
    monkeypatch.setattr(chats, "SECONDS_PER_CHAT", 0.05)
    endless = Template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    before = set(threading.enumerate())
    with pytest.raises(StatsError, match=r"it takes more than 0\.05 seconds"):
        rendered(endless, [ASKED], "row 0")
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), f"{thread.name} goes on"
