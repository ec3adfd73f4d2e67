# SPDX-License-Identifier: Apache-2.0
"""Conversations to token ids by the model's own chat template, and which of them the assistant wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from heapr_vllm.errors import HeaprError, first_line
from heapr_vllm.prune.text.documents import Conversation

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
MARK = "\ue000"  # in no text and no template: a character for private use
_TEMPLATE_ERRORS = (
    TemplateError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
    OverflowError,
)


def set_chat_template(tokenizer: Any, path: str) -> None:
    """Gives `tokenizer` the chat template in a file. Raises HeaprError if there is none."""
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeaprError(
            f"chat template {path} cannot be read: {first_line(error)}; correct --chat-template"
        ) from error


class ChatRenderer:
    """Renders conversations as `tokenizer.apply_chat_template` does.

    With `assistant_only` the counted tokens are those that the assistant wrote: the template's {% generation %} blocks,
    or where it has none, what follows the generation prompt, or a turn's words, until the turn ends.
    """

    def __init__(self, tokenizer: Any, *, assistant_only: bool) -> None:
        """Raises HeaprError if the tokenizer has no chat template."""
        if tokenizer.chat_template is None:
            raise HeaprError(
                "the model has no chat template, so conversations cannot be rendered; give one with --chat-template "
                "FILE, or calibrate on text"
            )
        if assistant_only and not tokenizer.is_fast:
            raise HeaprError(
                "the model's tokenizer does not tell where its tokens stand in the text, so the assistant's cannot be "
                "found; use --loss all"
            )
        self.tokenizer = tokenizer
        self.assistant_only = assistant_only

    def render(self, chat: Conversation) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes token ids int64 [L], and bool [L]: True where a token's prediction counts.

        Raises HeaprError, with the place of the conversation, if the template refuses it or its turns cannot be told.
        """
        try:
            if not self.assistant_only:
                ids = self._apply(chat.messages, chat.tools)["input_ids"]
                return torch.tensor(ids, dtype=torch.int64), torch.ones(len(ids), dtype=torch.bool)
            if _GENERATION.search(self.tokenizer.get_chat_template(None, chat.tools)):
                found = self._apply(chat.messages, chat.tools, return_assistant_tokens_mask=True)
                return torch.tensor(found["input_ids"], dtype=torch.int64), torch.tensor(
                    found["assistant_masks"]
                ).bool()
            return self._by_turns(chat)
        except HeaprError:
            raise
        except _TEMPLATE_ERRORS as error:
            raise HeaprError(
                f"{chat.place} cannot be rendered by the chat template: {first_line(error)}; correct or remove the "
                "conversation, or give another template with --chat-template FILE"
            ) from error

    def _apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> Any:
        how = {"verbose": False, "return_offsets_mapping": self.assistant_only}  # it would warn about long ones
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, tokenizer_kwargs=how, **options
        )

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    def _by_turns(self, chat: Conversation) -> tuple[torch.Tensor, torch.Tensor]:
        """Does `render` for templates that do not mark what the assistant wrote."""
        turns = [
            self._turn(chat, index) for index, message in enumerate(chat.messages) if message["role"] == "assistant"
        ]
        found = self._apply(chat.messages, chat.tools)
        ids = torch.tensor(found["input_ids"], dtype=torch.int64)
        starts = torch.tensor([start for start, _ in found["offset_mapping"]], dtype=torch.int64)
        counted = torch.zeros(len(ids), dtype=torch.bool)
        for begin, end in turns:
            counted |= (starts >= begin) & (starts < end)
        return ids, counted

    def _turn(self, chat: Conversation, index: int) -> tuple[int, int]:
        """Finds the characters of the rendered text that message `index` gave, its end-of-turn token included.

        Raises HeaprError if neither of two ways tells them.
        """
        text = self._text(chat.messages, chat.tools)
        found = self._after_prompt(chat, index, text) or self._around_mark(chat, index, text)
        if found is None:
            raise HeaprError(
                f"{chat.place}: what the assistant wrote in message {index + 1} cannot be told from what the chat "
                "template added; give a template with {% generation %} blocks with --chat-template FILE, or use "
                "--loss all"
            )
        return found

    def _after_prompt(self, chat: Conversation, index: int, text: str) -> tuple[int, int] | None:
        """Takes what follows the generation prompt, as if the message were the last one.

        Of earlier turns some templates drop the reasoning and leave the end. None if the text does not go on so.
        """
        if index == 0:
            return None  # no template renders a conversation without a message
        prompt = self._text(chat.messages[:index], chat.tools, prompt=True)
        last = self._text(chat.messages[: index + 1], chat.tools)
        if not last.startswith(prompt) or not text.startswith(prompt):
            return None
        start, end = len(prompt), self.tokenizer.eos_token
        turn = last[start:]
        if end and end in turn:
            turn = turn[: turn.rindex(end) + len(end)]
        if text.startswith(turn, start):
            return start, start + len(turn)
        stop = text.find(end, start) if end else -1
        is_tail = stop >= 0 and turn.endswith(text[start : stop + len(end)])
        return (start, stop + len(end)) if is_tail else None

    def _around_mark(self, chat: Conversation, index: int, text: str) -> tuple[int, int] | None:
        """Renders a mark in the place of the message's words: they are between what is around it.

        It is for templates whose generation prompt begins a reasoning that they drop. None if the message has more than
        words, or the mark changes what is around it.
        """
        message = chat.messages[index]
        if message.keys() != {"role", "content"} or not isinstance(message["content"], str) or MARK in text:
            return None
        marked = [*chat.messages[:index], {**message, "content": MARK}, *chat.messages[index + 1 :]]
        before, _, after = self._text(marked, chat.tools).partition(MARK)
        start, stop, end = len(before), len(text) - len(after), self.tokenizer.eos_token
        if stop < start or MARK in after or not text.startswith(before) or not text.endswith(after):
            return None
        return start, stop + (len(end) if end and after.startswith(end) else 0)
