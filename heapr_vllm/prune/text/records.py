# SPDX-License-Identifier: Apache-2.0
"""Records of a dataset: files of several kinds, plain or gzipped, and datasets of the Hub."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from heapr_vllm.environment import install_command
from heapr_vllm.errors import HeaprError, first_line

_SPEC = re.compile(r"(?P<name>[^\[\](){}]+)(\[(?P<subset>[^\]]+)\])?(\((?P<split>[^)]+)\))?")
_KINDS = ".txt, .md, .jsonl, .json or .parquet, each also with .gz"
_AS_UTF8 = "save the file as UTF-8"


@dataclass(frozen=True)
class Record:
    """Named values; `place` says where they stand, for errors."""

    place: str
    fields: dict[str, Any]


class HubRecords(Sequence[Record]):
    """Rows of a dataset of the Hub, read when they are asked for."""

    def __init__(self, spec: str, rows: Any) -> None:
        self.spec = spec
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        return Record(f"{self.spec}:{index + 1}", self.rows[index])

    def column(self, name: str) -> list[Any]:
        """Reads one field of every row."""
        return list(self.rows[name])


def stem(spec: str) -> str:
    """Names a source after its file without endings, or after its dataset; other characters become underscores."""
    match = _SPEC.fullmatch(spec)
    name = (match["name"] if match and not _kind(Path(spec)) else spec).rstrip("/").rpartition("/")[2]
    kind = _kind(Path(name))
    name = name.removesuffix(".gz").removesuffix(kind) if kind else name
    return re.sub(r"[^\w.-]+", "_", name) or "text"


def is_file(spec: str) -> bool:
    """Tells a file, which may not be there, from a dataset of the Hub."""
    return _kind(Path(spec)) is not None


def read_records(spec: str) -> Sequence[Record]:
    """Reads the records of a file by its ending, or of `name[subset](split)` through `datasets`.

    A .txt or .md is one record with the field `text`, a .json a list of records. Raises HeaprError, with file and line,
    if there is no such text or it is damaged.
    """
    path = Path(spec)
    if path.is_dir():
        raise HeaprError(f"dataset {spec} is a directory; name a file in it")
    kind = _kind(path)
    if kind is None:
        if path.is_file():
            raise HeaprError(f"dataset file {spec} is no {_KINDS}; convert or rename it")
        return _read_hub(spec)
    if not path.is_file():
        raise HeaprError(f"dataset file {spec} does not exist; correct its name")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return list(_READERS[kind](spec, file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise HeaprError(f"{spec} is damaged ({first_line(error)}); compress or download it again") from error


def _kind(path: Path) -> str | None:
    """Finds the ending that says how a file is read; None if there is none."""
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return kind if kind in _READERS else None


def _read_text(spec: str, file: Any) -> Iterator[Record]:
    text = _decoded(file.read(), spec, 1)
    yield Record(spec, {"text": text.replace("\r\n", "\n").replace("\r", "\n")})


def _read_jsonl(spec: str, file: Any) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        text = _decoded(line, spec, number)
        if text.strip():
            place = f"{spec}:{number}"
            yield _record(parse(text, place), place)


def _read_json(spec: str, file: Any) -> Iterator[Record]:
    entries = parse(_decoded(file.read(), spec, 1), spec)
    if not isinstance(entries, list):
        raise HeaprError(f"{spec} is no list of records; write [{{...}}, ...], or one record per line as .jsonl")
    for number, entry in enumerate(entries, 1):
        yield _record(entry, f"{spec}, record {number}")


def _read_parquet(spec: str, file: Any) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise HeaprError(f"{spec} needs pyarrow; {install_command('prune')}, or pass a .jsonl file") from error
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise HeaprError(f"{spec} is damaged ({first_line(error)}); write or download it again") from error
    for number, row in enumerate(rows, 1):
        yield Record(f"{spec}:{number}", without_absent(row))


_READERS: dict[str, Callable[[str, Any], Iterator[Record]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _decoded(data: bytes, spec: str, line: int) -> str:
    """Decodes UTF-8, with or without a byte order mark; `line`: that of the first byte."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place = line + data.count(b"\n", 0, error.start)
        raise HeaprError(f"{spec}:{place} is not UTF-8 ({error.reason}); {_AS_UTF8}") from error


def parse(text: str, place: str) -> Any:
    """Parses JSON. Raises HeaprError if it is none, is nested too deeply, or holds text that is no Unicode."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise HeaprError(f"{place} holds half of a character (a lone surrogate); write the text as UTF-8") from error
    except RecursionError as error:
        raise HeaprError(f"{place} is nested too deeply; one record is a JSON object with text or messages") from error
    except ValueError as error:
        raise HeaprError(
            f"{place} is not a JSON object with text or messages ({first_line(error)}); correct it"
        ) from error
    return value


def _record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise HeaprError(f'{place} is not a JSON object with text or messages; write {{"text": "..."}}')
    return Record(place, value)


def without_absent(value: Any) -> Any:
    """Drops fields that are None, at any depth: columnar files give every record the fields of all others."""
    if isinstance(value, dict):
        return {key: without_absent(entry) for key, entry in value.items() if entry is not None}
    return [without_absent(entry) for entry in value] if isinstance(value, list) else value


def _read_hub(spec: str) -> HubRecords:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise HeaprError(f"dataset spec {spec!r} is no file ({_KINDS}) and not name[subset](split); correct it")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise HeaprError(
            f"dataset {spec} needs the `datasets` package; pass a .txt or .jsonl file, or {install_command('prune')}"
        ) from error
    try:
        rows = load_dataset(match["name"], match["subset"], split=match["split"] or "train")
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        raise HeaprError(f"dataset {spec} cannot be loaded: {first_line(error)}; check its name and split") from error
    return HubRecords(spec, rows)
