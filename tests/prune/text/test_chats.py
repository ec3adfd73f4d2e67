# SPDX-License-Identifier: Apache-2.0
"""Conversations are rendered as the model's template does it, and what the assistant wrote is found exactly."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.text.chats import ChatRenderer
from heapr_vllm.prune.text.documents import Conversation
from tests.tiny_models import END, tokenizer

PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHATML = (
    """{% for message in messages %}{{ '<' + message.role + '>' + message.content | trim + eos_token + '\n' }}
{%- endfor %}"""
    + PROMPT
)
TOOLS = "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}" + CHATML
MARKED = (
    """{% for message in messages %}{{ '<' + message.role + '>' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}
{%- else %}{{ message.content | trim + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"""
    + PROMPT
)
# as Qwen3's: reasoning stays in the last turn only, which has some even if it is empty
FORGETS = (
    """{% for message in messages %}{% set parts = message.content.split('</think>') %}{{ '<' + message.role + '>' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>' + parts[:-1] | join + '</think>' }}{% endif %}
{{- parts[-1] + eos_token + '\n' }}{% endfor %}"""
    + PROMPT
)
REFUSES = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must\\nalternate') }}{% endif %}" + CHATML
TWICE = "{% for message in messages %}{{ message.content + message.content }}{% endfor %}" + PROMPT
# as those of Qwen3.5 and DeepSeek-R1: the prompt begins a reasoning, which is in the last turn only, or in none
BEGINS = FORGETS.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
NEVER = CHATML.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = [
    {"role": "system", "content": "Be kind."},
    user("Hello <assistant>"),
    assistant(" Good day "),
    user("é?"),
    assistant("Yes"),
]


def write_chats(path: Path, count: int, more: list[Any] | None = None) -> str:
    """Writes conversations of one or two turns, then `more` records."""
    rng = random.Random(0)
    records = list(more or [])
    for number in range(count):
        turns = [user(f"Question {number}"), assistant("ab " * rng.randint(1, 30))] * rng.randint(1, 2)
        records.append({"messages": turns})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def renderer(template: str | None, *, assistant_only: bool = False) -> ChatRenderer:
    ours = tokenizer()
    ours.chat_template = template
    return ChatRenderer(ours, assistant_only=assistant_only)


def written(template: str, messages: list[dict], tools: list | None = None) -> list[str]:
    """What the counted tokens say, piece by piece."""
    ours = renderer(template, assistant_only=True)
    ids, counted = ours.render(Conversation("c.jsonl:7", messages, tools))
    assert ids.tolist() == ours.tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    pieces: list[list[int]] = []
    for position, (token, counts) in enumerate(zip(ids.tolist(), counted.tolist(), strict=True)):
        if counts and (position == 0 or not counted[position - 1]):
            pieces.append([])
        if counts:
            pieces[-1].append(token)
    return [ours.tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("tools", [None, [{"name": "f", "parameters": {}}]])
@pytest.mark.parametrize("template", [CHATML, TOOLS, MARKED, FORGETS, BEGINS])
def test_ids_are_those_of_the_template(template: str, tools: list | None) -> None:
    ours = renderer(template)
    ids, counted = ours.render(Conversation("", CHAT, tools))
    assert ids.tolist() == ours.tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=True)["input_ids"]
    assert counted.all() and len(counted) == len(ids)
    assert ("tools" in ours.tokenizer.decode(ids)) == (template == TOOLS and tools is not None)


@pytest.mark.parametrize("template", [CHATML, TOOLS, MARKED])
def test_only_what_the_assistant_wrote_counts(template: str) -> None:
    assert written(template, CHAT, [{"name": "f"}]) == [f"Good day{END}", f"Yes{END}"]
    assert written(template, CHAT[:2]) == []


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_conversations_that_the_assistant_opens(template: str) -> None:
    tokens = tokenizer()
    tokens.chat_template = template
    renderer = ChatRenderer(tokens, assistant_only=True)
    ids, counted = renderer.render(Conversation("file:1", [assistant("Welcome"), user("Hi"), assistant("Ask")], None))
    assert tokens.decode(ids[counted]).split(END) == ["Welcome", "Ask", ""]


@pytest.mark.parametrize("template", [FORGETS, BEGINS])
def test_a_template_that_forgets_reasoning(template: str) -> None:
    messages = [
        user("a"),
        assistant("<think>hm</think>One"),
        user("b"),
        assistant("Two"),
        user("c"),
        assistant("no</think>3"),
    ]
    begun = "" if template == BEGINS else "<think>"
    assert written(template, messages) == [f"One{END}", f"Two{END}", f"{begun}no</think>3{END}"]


def test_a_prompt_that_begins_what_is_never_there() -> None:
    assert written(NEVER, CHAT) == [f"Good day{END}", f"Yes{END}"]


def test_turns_that_cannot_be_told() -> None:
    with pytest.raises(
        HeaprError, match=r"c.jsonl:7: what the assistant wrote in message 3 cannot be told .*--loss all"
    ):
        written(TWICE, CHAT)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (REFUSES, CHAT, "c.jsonl:7 cannot be rendered by the chat template: roles must; correct or remove"),
        ("{{ nothing.at.all }}", CHAT, "c.jsonl:7 cannot be rendered by the chat template: 'nothing' is undefined"),
        ("{% if", CHAT, "c.jsonl:7 cannot be rendered by the chat template"),
        ("{{ messages.__class__.__mro__ }}", CHAT, "c.jsonl:7 cannot be rendered .* unsafe"),
        (CHATML, [{"role": 5, "content": "x"}], "c.jsonl:7 cannot be rendered"),
    ],
)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_what_a_template_refuses(template: str, messages: list, message: str, assistant_only: bool) -> None:
    with pytest.raises(HeaprError, match=message) as refused:
        renderer(template, assistant_only=assistant_only).render(Conversation("c.jsonl:7", messages))
    assert "\n" not in str(refused.value)


def test_no_template() -> None:
    with pytest.raises(
        HeaprError, match="no chat template, .*; give one with --chat-template FILE, or calibrate on text"
    ):
        renderer(None)
