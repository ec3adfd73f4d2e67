# SPDX-License-Identifier: Apache-2.0
"""Records to what is calibrated on: documents of text, or conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.text.records import HubRecords, Record, parse, read_records, without_absent

PASSAGE_CHARACTERS = 20_000
COLUMNS = ("text", "messages", "conversations")  # in the order in which they are looked for
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
_EXPECTED = (
    'one document or one conversation per record is expected, {"text": "..."} or {"messages": [{"role": "user", '
    '"content": "..."}, ...]}; name another field with --text-column'
)


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and the tools that were offered; `place` for errors."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class Conversations(Sequence[Conversation]):
    """Conversations in the field `column` of records, taken out when they are asked for."""

    def __init__(self, records: Sequence[Record], column: str) -> None:
        self.records = records
        self.column = column

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        """Raises HeaprError if the record holds no conversation."""
        record = self.records[index]
        if isinstance(self.records, HubRecords):
            record = replace(record, fields=without_absent(record.fields))
        tools = record.fields.get("tools")
        if isinstance(tools, str):  # columns of one type only hold them as JSON
            tools = parse(tools, record.place) if tools.strip() else None
        if tools is not None and not isinstance(tools, list):
            raise HeaprError(f"{record.place} has `tools` that are no list; write the JSON schemas of functions")
        return Conversation(record.place, _messages(_value(record, self.column), record.place), tools or None)


def read_dataset(spec: str, column: str | None = None, *, is_alone: bool = True) -> list[str] | Conversations:
    """Reads the documents of a dataset, or its conversations.

    They are in the field `column`, or else the first of COLUMNS that the first record has, in place of a `column` only
    if the dataset is not alone: others of a mix may have it. A string is a document, a list a conversation. Rows of a
    dataset of the Hub are joined into passages. Raises HeaprError if there is nothing.
    """
    records = read_records(spec)
    if not records:
        raise HeaprError(f"dataset {spec} holds no text; name another")
    first = records[0]
    names = (column,) if column and is_alone else (column, *COLUMNS)
    chosen = next((name for name in names if name in first.fields), None) or column or COLUMNS[0]
    if isinstance(_value(first, chosen), list):
        return Conversations(records, chosen)
    if isinstance(records, HubRecords):
        documents = list(_passages(_strings(records.column(chosen), records, chosen)))
    else:
        documents = list(_strings((_value(record, chosen) for record in records), records, chosen))
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise HeaprError(f"dataset {spec} holds no text; name another")
    return documents


def read_documents(spec: str) -> list[str]:
    """Reads a dataset of documents. Raises HeaprError if it is one of conversations."""
    documents = read_dataset(spec)
    if isinstance(documents, Conversations):
        raise HeaprError(f"dataset {spec} is of conversations, and text is needed here; name another")
    return documents


def _value(record: Record, column: str) -> Any:
    if column not in record.fields:
        found = ", ".join(record.fields) or "none at all"
        raise HeaprError(f"{record.place} has no `{column}` field, only {found}; {_EXPECTED}")
    return record.fields[column]


def _strings(values: Iterable[Any], records: Sequence[Record], column: str) -> Iterator[str]:
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise HeaprError(f"{records[number].place} has a `{column}` field that is no string; {_EXPECTED}")
        yield value


def _messages(value: Any, place: str) -> list[dict[str, Any]]:
    """Checks messages, of which those of ShareGPT's form get the usual names."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise HeaprError(f"{place} holds no list of messages; {_EXPECTED}")
    if all("role" in message for message in value):
        return value
    roles = [SHAREGPT_ROLES.get(str(message.get("from"))) for message in value]
    if None in roles or not all("value" in message for message in value):
        raise HeaprError(
            f"{place} has messages with other fields than role and content, or from "
            f"({', '.join(SHAREGPT_ROLES)}) and value; rename them"
        )
    return [{"role": role, "content": message["value"]} for role, message in zip(roles, value, strict=True)]


def _passages(rows: Iterable[str]) -> Iterator[str]:
    """Joins consecutive rows by blank lines into passages: rows of WikiText are single lines, not documents."""
    passage: list[str] = []
    for row in rows:
        passage.append(row)
        if sum(map(len, passage)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(passage)
            passage = []
    yield "\n\n".join(passage)
