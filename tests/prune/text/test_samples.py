# SPDX-License-Identifier: Apache-2.0
"""Dataset specs and token samples."""

import json
from pathlib import Path

import pytest
import torch

from heapr_vllm.errors import HeaprError
from heapr_vllm.prune.text import documents
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import token_samples
from tests.tiny_models import tokenizer


def test_txt_is_one_document_and_jsonl_many(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    assert read_documents(str(tmp_path / "a.txt")) == ["first\n\nsecond"]
    assert len(read_documents(str(corpus))) == 60


def test_spec_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("org/wiki[raw-v1](validation)") == ["a\n\nb"], "rows are lines, not documents"
    monkeypatch.setattr(documents, "PASSAGE_CHARACTERS", 1)
    assert read_documents("wiki") == ["a", "b"]
    assert calls == [(("org/wiki", "raw-v1"), {"split": "validation"}), (("wiki", None), {"split": "train"})]


def test_blocks_are_seeded_and_joined_by_end_of_text(corpus: Path) -> None:
    documents = read_documents(str(corpus))
    blocks = token_samples(documents, tokenizer(), 5, 100, seed=0)
    assert blocks.shape == (5, 100) and blocks.dtype == torch.int64 and (blocks == 256).any()
    assert torch.equal(blocks, token_samples(documents, tokenizer(), 5, 100, seed=0))
    assert not torch.equal(blocks, token_samples(documents, tokenizer(), 5, 100, seed=1))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "missing.txt", "does not exist"),
        ("  \n", "empty.txt", "holds no text"),
        (
            '{"text": "a"}\n{"txt": 1}\n',
            "bad.jsonl",
            r"bad.jsonl:2 has no `text` field, only txt; one document per line",
        ),
        ('{"text": "a"}\n["b"]\n', "list.jsonl", r"list.jsonl:2 is not a JSON object with a `text` field"),
        ("not json", "broken.jsonl", r"broken.jsonl:1 is not a JSON object with a `text` field"),
        ('{"text": 5}\n', "number.jsonl", r"number.jsonl:1 has a `text` field that is no string"),
        (None, "no[way", "is not file.txt"),
    ],
)
def test_bad_datasets(tmp_path: Path, content: str | None, name: str, message: str) -> None:
    spec = str(tmp_path / name) if name.endswith(("txt", "jsonl")) else name
    if content is not None:
        Path(spec).write_text(content)
    with pytest.raises(HeaprError, match=message):
        read_documents(spec)


def test_a_chat_is_refused_with_what_is_expected(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "source": "web"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    with pytest.raises(HeaprError) as refused:
        read_documents(str(tmp_path / "chat.jsonl"))
    message = str(refused.value)
    assert "chat.jsonl:1 has no `text` field, only messages, source; " in message
    assert '{"text": "..."}' in message and "the model's chat template" in message


def test_too_little_text(corpus: Path) -> None:
    with pytest.raises(HeaprError, match=r"samples of 512 tokens, 999 are needed; ask for fewer"):
        token_samples(read_documents(str(corpus)), tokenizer(), 999, 512, seed=0)
