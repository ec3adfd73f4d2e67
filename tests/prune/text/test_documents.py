# SPDX-License-Identifier: Apache-2.0
"""Files of every kind to documents and conversations, and every way in which they can be wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.text import documents
from heapr_vllm.prune.text.documents import Conversation, Conversations, read_dataset, read_documents

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
DEEP = b'{"text": ' + b"[" * 100_000


def write(path: Path, content: bytes) -> str:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def jsonl(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(**columns: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", "first\r\n\nsecond é".encode(), ["first\n\nsecond é"]),
        ("a.md", b"# Title\n\ntext", ["# Title\n\ntext"]),
        ("a.jsonl", jsonl({"text": "a", "more": 1}, {"text": " "}, {"text": "b"}) + b"\n", ["a", "b"]),
        ("a.json", json.dumps([{"text": "a"}, {"text": "b"}]).encode(), ["a", "b"]),
    ],
)
def test_text_of_every_kind(ending: str, mark: bytes, name: str, content: bytes, wanted: list, tmp_path: Path) -> None:
    assert read_documents(write(tmp_path / (name + ending), mark + content)) == wanted


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_parquet(ending: str, tmp_path: Path) -> None:
    content = parquet(text=["a", "b"], number=[1, 2])
    assert read_documents(write(tmp_path / f"a.parquet{ending}", content)) == ["a", "b"]
    calls = [{"role": "assistant", "content": "x", "name": None}, {"role": "tool", "content": "y", "name": "f"}]
    (chat,) = read_dataset(write(tmp_path / f"c.parquet{ending}", parquet(messages=[calls], tools=['[{"name": "f"}]'])))
    assert chat.messages == [{"role": "assistant", "content": "x"}, calls[1]], "what Arrow made up is gone"
    assert chat.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": HELLO, "source": "web"}, Conversation("", HELLO)),
        ({"messages": HELLO, "tools": [{"name": "f"}]}, Conversation("", HELLO, [{"name": "f"}])),
        ({"messages": HELLO, "tools": None}, Conversation("", HELLO)),
        ({"conversations": HELLO}, Conversation("", HELLO)),
        (
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
            Conversation("", HELLO),
        ),
    ],
)
def test_conversations(record: dict, wanted: Conversation, tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", jsonl(record))
    (found,) = read_dataset(spec)
    assert found == Conversation(f"{spec}:1", wanted.messages, wanted.tools)


def test_a_field_by_name(tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", jsonl({"text": "a", "content": "b", "chat": HELLO}))
    assert read_dataset(spec) == ["a"]
    assert read_dataset(spec, "content") == ["b"]
    assert read_dataset(spec, "chat")[0].messages == HELLO
    plain = write(tmp_path / "a.md", b"plain")
    assert read_dataset(plain, "content", is_alone=False) == ["plain"], "of a mix, others have the usual"


def test_datasets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []
    rows = {"text": ["a", "b"]}

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("org/wiki[raw-v1](validation)") == ["a\n\nb"], "rows are lines, not documents"
    monkeypatch.setattr(documents, "PASSAGE_CHARACTERS", 1)
    assert read_documents("wiki") == ["a", "b"]
    assert calls == [(("org/wiki", "raw-v1"), {"split": "validation"}), (("wiki", None), {"split": "train"})]
    named = [{**message, "name": None} for message in HELLO]
    rows = {"messages": [named, named], "prompt": ["x", "y"], "tools": [None, None]}
    chats = read_dataset("org/chats")
    assert isinstance(chats, Conversations) and len(chats) == 2
    assert chats[1] == Conversation("org/chats:2", HELLO)
    assert read_dataset("org/chats", "prompt") == ["x", "y"]
    rows = {"txt": ["a"]}
    with pytest.raises(HeaprError, match="org/chats:1 has no `text` field, only txt; "):
        read_dataset("org/chats")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist; correct its name"),
        ("no[way", None, "is no file .* and not name"),
        ("empty.txt", b"  \n", "holds no text; name another"),
        ("empty.jsonl", b"\n", "holds no text; name another"),
        ("table.csv", b"a,b", r"table.csv is no .txt, .md, .jsonl, .json or .parquet, .*; convert or rename it"),
        ("list.jsonl", b'{"text": "a"}\n["b"]\n', r"list.jsonl:2 is not a JSON object with text or messages"),
        ("broken.jsonl", b'\n{"text"', r"broken.jsonl:2 is not a JSON object with text or messages"),
        ("number.jsonl", jsonl({"text": "a"}, {"text": 5}), r"number.jsonl:2 has a `text` field that is no string"),
        ("other.jsonl", jsonl({"text": "a"}, {"txt": 1}), r"other.jsonl:2 has no `text` field, only txt; one document"),
        ("digits.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"digits.jsonl:1 is not a JSON object"),
        ("deep.jsonl", DEEP, r"deep.jsonl:1 is nested too deeply; one record"),
        ("deep.json", DEEP, r"deep.json is nested too deeply; one record"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"half.jsonl:2 holds half of a character"),
        ("half.json", b'[{"text": "\\ud800"}]', r"half.json holds half of a character"),
        ("latin.txt", b"a\nb\n\xe9", r"latin.txt:3 is not UTF-8 .*; save the file as UTF-8"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin.jsonl:2 is not UTF-8"),
        ("wide.txt", "a".encode("utf-16"), r"wide.txt:1 is not UTF-8"),
        ("object.json", b'{"data": []}', r"object.json is no list of records; write \[\{...\}, ...\], or one"),
        ("entry.json", b'[{"text": "a"}, 5]', r"entry.json, record 2 is not a JSON object"),
        ("bad.parquet", b"PAR1", r"bad.parquet is damaged"),
        ("cut.txt.gz", gzip.compress(b"a" * 1000, mtime=0)[:-12], r"cut.txt.gz is damaged"),
        ("plain.txt.gz", b"plain", r"plain.txt.gz is damaged"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    spec = name if name.startswith("no[") else str(tmp_path / name)
    with pytest.raises(HeaprError, match=message) as refused:
        read_documents(spec)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "c.jsonl:1 holds no list of messages; one document or one conversation"),
        ({"messages": ["Hello"]}, "c.jsonl:1 holds no list of messages"),
        (
            {"messages": [{"content": "Hello"}]},
            "c.jsonl:1 has messages with other fields than role and content, or from",
        ),
        ({"messages": [{"from": "someone", "value": "x"}]}, "c.jsonl:1 has messages with other fields"),
        ({"messages": [{"from": "human", "text": "x"}]}, "c.jsonl:1 has messages with other fields"),
        ({"messages": HELLO, "tools": 5}, "c.jsonl:1 has `tools` that are no list"),
        ({"messages": HELLO, "tools": "{"}, "c.jsonl:1 is not a JSON object"),
        ({"messages": "Hello", "tools": "{"}, None),
    ],
)
def test_bad_conversations(record: dict, message: str | None, tmp_path: Path) -> None:
    spec = write(tmp_path / "c.jsonl", jsonl(record))
    if message is None:
        assert read_dataset(spec) == ["Hello"]
        return
    with pytest.raises(HeaprError, match=message):
        list(read_dataset(spec))


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(HeaprError, match="is a directory; name a file in it"):
        read_dataset(str(tmp_path))


def test_conversations_where_text_is_needed(tmp_path: Path) -> None:
    with pytest.raises(HeaprError, match="is of conversations, and text is needed here; name another"):
        read_documents(write(tmp_path / "c.jsonl", jsonl({"messages": HELLO})))
