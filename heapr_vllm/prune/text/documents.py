# SPDX-License-Identifier: Apache-2.0
"""A dataset spec (file.txt, file.jsonl, name[subset](split)) to documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError, first_line

PASSAGE_CHARACTERS = 20_000
_SPEC = re.compile(r"(?P<name>[^\[\](){}]+)(\[(?P<subset>[^\]]+)\])?(\((?P<split>[^)]+)\))?")


def read_documents(spec: str) -> list[str]:
    """Reads documents of `file.txt` (one), `file.jsonl` (field `text`), or `name[subset](split)` through `datasets`.

    Raises HeaprError if the spec names nothing readable or there is no text.
    """
    path = Path(spec)
    if path.suffix in (".txt", ".jsonl"):
        if not path.is_file():
            raise HeaprError(f"dataset file {spec} does not exist")
        documents = [path.read_text(encoding="utf-8")] if path.suffix == ".txt" else list(_read_jsonl(path))
    else:
        documents = _read_hub_dataset(spec)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise HeaprError(f"dataset {spec} holds no text")
    return documents


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield _text_of(line, f"{path}:{number}")


def _text_of(line: str, place: str) -> str:
    """Returns the text of one line of JSON; `place` names it in errors. Raises HeaprError if it has none."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise HeaprError(f"{place} is not a JSON object with a `text` field") from error
    if not isinstance(record, dict):
        raise HeaprError(f"{place} is not a JSON object with a `text` field")
    if "text" not in record:
        raise HeaprError(
            f"{place} has no `text` field, only {', '.join(record) or 'none at all'}; one document per line is "
            'expected, {"text": "..."}, so write conversations as text first, with the model\'s chat template'
        )
    if not isinstance(record["text"], str):
        raise HeaprError(f"{place} has a `text` field that is no string")
    return record["text"]


def _read_hub_dataset(spec: str) -> list[str]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise HeaprError(f"dataset spec {spec!r} is not file.txt, file.jsonl or name[subset](split)")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HeaprError(
            f"dataset {spec} needs the `datasets` package; pass a .txt or .jsonl file, or {install_command('prune')}"
        ) from error
    try:
        rows = load_dataset(match["name"], match["subset"], split=match["split"] or "train")
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise HeaprError(f"dataset {spec} cannot be loaded: {first_line(error)}") from error
    if "text" not in rows.column_names:
        raise HeaprError(f"dataset {spec} has no `text` column, only {', '.join(rows.column_names)}")
    return list(_passages(rows["text"]))


def _passages(rows: Iterable[str]) -> Iterator[str]:
    """Joins consecutive rows by blank lines into passages: rows of WikiText are single lines, not documents."""
    passage: list[str] = []
    for row in rows:
        passage.append(row)
        if sum(map(len, passage)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(passage)
            passage = []
    yield "\n\n".join(passage)
