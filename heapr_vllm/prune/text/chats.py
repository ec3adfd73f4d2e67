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
    or where it has none, what follows the generation prompt until the turn ends.
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

        They begin where the generation prompt for them ends. They end as the turn does if it is the last one; templates
        that drop an earlier turn's reasoning leave the end of that. Raises HeaprError if the text is not so.
        """
        text = self._text(chat.messages, chat.tools)
        prompt = self._text(chat.messages[:index], chat.tools, prompt=True)
        last = self._text(chat.messages[: index + 1], chat.tools)
        turn = last[len(prompt) :]
        end = self.tokenizer.eos_token
        if end and end in turn:
            turn = turn[: turn.rindex(end) + len(end)]
        if last.startswith(prompt) and text.startswith(prompt):
            if text.startswith(turn, len(prompt)):
                return len(prompt), len(prompt) + len(turn)
            stop = text.find(end, len(prompt)) if end else -1
            if stop >= 0 and turn.endswith(text[len(prompt) : stop + len(end)]):
                return len(prompt), stop + len(end)
        raise HeaprError(
            f"{chat.place}: what the assistant wrote in message {index + 1} cannot be told from what the chat template "
            "added; give a template with {% generation %} blocks with --chat-template FILE, or use --loss all"
        )
