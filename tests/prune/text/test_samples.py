# SPDX-License-Identifier: Apache-2.0
"""Samples of text and of conversations, and of mixes of them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.prune.text.documents import read_documents
from heapr_vllm.prune.text.samples import Samples, TextSettings, draw_samples, token_samples
from tests.prune.text.test_chats import CHATML, write_chats
from tests.tiny_models import tokenizer


@pytest.fixture
def talking(qwen3: Path, tmp_path: Path) -> Checkpoint:
    """A model folder with a chat template and no weights."""
    ours = tokenizer()
    ours.chat_template = CHATML
    ours.save_pretrained(tmp_path / "talking")
    (tmp_path / "talking" / "config.json").write_bytes((qwen3 / "config.json").read_bytes())
    return Checkpoint(tmp_path / "talking")


def test_a_column_that_is_not_there(talking: Checkpoint, tmp_path: Path) -> None:
    """Nothing else is taken in its place, unless another source of a mix may have it."""
    for name, fields in (("a", '{"text": "abc", "code": "real"}'), ("b", '{"cod": "fish and chips"}')):
        (tmp_path / f"{name}.jsonl").write_text(f"{fields}\n" * 200)
    one, other = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    with pytest.raises(HeaprError, match="has no `cod` field, only text, code"):
        draw_samples(talking, TextSettings(dataset=one, max_seq_length=8, text_column="cod"), 2)
    assert len(draw_samples(talking, TextSettings(dataset=[one, other], max_seq_length=8, text_column="cod"), 2)) == 2


def test_text_is_seeded_and_joined_by_end_of_text(corpus: Path) -> None:
    documents = read_documents(str(corpus))
    blocks = token_samples(documents, tokenizer(), 5, 100, seed=0)
    assert blocks.shape == (5, 100) and blocks.dtype == torch.int64 and (blocks == 256).any()
    assert torch.equal(blocks, token_samples(documents, tokenizer(), 5, 100, seed=0))
    assert not torch.equal(blocks, token_samples(documents, tokenizer(), 5, 100, seed=1))


def test_samples_of_plain_text_are_what_they_always_were(qwen3: Path, corpus: Path) -> None:
    """Earlier calibrations and repairs compare this fingerprint: sha256 of int64 [5, 100]."""
    settings = TextSettings(dataset=str(corpus), max_seq_length=100)
    samples = draw_samples(Checkpoint(qwen3), settings, 5)
    wanted = "7af9312b28dba5c62ee0c3704c5a04471c6207a80d4a3f8f5bdc07dda8081ccc"
    assert samples.fingerprint() == f"sha256:{wanted}"
    blocks = token_samples(read_documents(str(corpus)), tokenizer(), 5, 100, seed=0)
    assert hashlib.sha256(blocks.numpy().tobytes()).hexdigest() == wanted
    assert samples.tokens == 500 and samples.predictions == 495


def test_documents_begin_as_prompts_do() -> None:
    """Where the tokenizer puts a token before a prompt, and never with two at their end."""
    ours = tokenizer()
    ours.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", ours.bos_token_id), ("<|endoftext|>", 256)]
    for template, end in (("<s> $A", [256]), ("<s> $A <|endoftext|>", [256]), ("$A", [256])):
        ours.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        begin = [ours.bos_token_id] if "<s>" in template else []
        text = tokenizer()("ab").input_ids
        length = len(begin + text + end)
        (sample,) = token_samples(["ab"], ours, 1, length, seed=0).tolist()
        assert sample == begin + text + end


def test_too_little_text(corpus: Path) -> None:
    with pytest.raises(HeaprError, match=r"samples of 512 tokens, 999 are needed; ask for fewer"):
        token_samples(read_documents(str(corpus)), tokenizer(), 999, 512, seed=0)


def test_a_conversation_is_a_sample(talking: Checkpoint, tmp_path: Path) -> None:
    spec = write_chats(tmp_path / "chats.jsonl", 20)
    samples = draw_samples(talking, TextSettings(dataset=spec, max_seq_length=120), 10)
    whole = tokenizer()
    whole.chat_template = CHATML
    records = [json.loads(line)["messages"] for line in Path(spec).read_text().splitlines()]
    wanted = [whole.apply_chat_template(messages)["input_ids"] for messages in records]
    found = [sample.ids.tolist() for sample in samples.entries]
    assert all(ids in [each[:120] for each in wanted] for ids in found)
    assert len({len(ids) for ids in found}) > 1 and len(set(map(tuple, found))) == 10
    (source,) = samples.sources
    cut = sum(ids not in wanted for ids in found)
    assert (source.samples, source.tokens, source.truncated) == (10, sum(map(len, found)), cut) and cut > 0
    assert (
        draw_samples(talking, TextSettings(dataset=spec, max_seq_length=120), 10).fingerprint() == samples.fingerprint()
    )
    other = draw_samples(talking, TextSettings(dataset=spec, max_seq_length=120, loss="assistant"), 10)
    assert [sample.ids.tolist() for sample in other.entries] == found, "who counts is another matter"
    assert other.fingerprint() != samples.fingerprint() and other.predictions < samples.predictions


def test_what_has_nothing_to_predict_is_left_out(talking: Checkpoint, tmp_path: Path) -> None:
    silent = [{"messages": [{"role": "user", "content": "Hello?"}]}]
    spec = write_chats(tmp_path / "chats.jsonl", 3, silent)
    settings = TextSettings(dataset=spec, max_seq_length=512, loss="assistant")
    (source,) = draw_samples(talking, settings, 3).sources
    assert source.skipped <= 1 and source.samples == 3
    with pytest.raises(HeaprError, match="3 conversations with something to predict, 4 are needed; ask for fewer"):
        draw_samples(talking, settings, 4)
    assert len(draw_samples(talking, TextSettings(dataset=spec, max_seq_length=512), 4)) == 4


def test_a_mix(talking: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    settings = TextSettings(dataset=[f"a={corpus}:0.7", f"b={chats}:0.3"], max_seq_length=64, loss="assistant")
    samples = draw_samples(talking, settings, 10)
    assert [sample.source for sample in samples.entries] == [0] * 7 + [1] * 3
    assert [(source.name, source.samples, source.share) for source in samples.sources] == [("a", 7, 0.7), ("b", 3, 0.3)]
    assert all(sample.counted.all() for sample in samples.entries[:7]), "text counts whole"
    assert not any(sample.counted.all() for sample in samples.entries[7:])
    alone = draw_samples(talking, TextSettings(dataset=str(corpus), max_seq_length=64), 7)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(samples.entries, alone.entries, strict=False))
    assert sum(source.tokens for source in samples.sources) == samples.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "user"}, "--loss user is not one of all, assistant; choose one"),
        ({"loss": "assistant"}, "--loss assistant needs conversations, and this is text; name some, or use --loss all"),
        ({"max_seq_length": 1}, "--max-seq-length 1 leaves nothing to predict"),
        ({"max_seq_length": 513}, "exceeds the model's 512 positions; pass --max-seq-length 512"),
        ({"dataset": "CHATS"}, "the model has no chat template, .*; give one with --chat-template FILE, or calibrate"),
        ({"dataset": ["a=CORPUS", "b=CHATS"]}, "source b: the model has no chat template"),
        ({"dataset": "CHATS", "chat_template": "missing.jinja"}, "chat template missing.jinja cannot be read"),
    ],
)
def test_bad_settings(change: dict, message: str, qwen3: Path, corpus: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 3)
    names = {"CHATS": chats, "a=CORPUS": str(corpus), "b=CHATS": f"b={chats}"}
    settings: dict = {"dataset": str(corpus), "max_seq_length": 64} | change
    dataset = settings["dataset"]
    settings["dataset"] = names.get(dataset, dataset) if isinstance(dataset, str) else [names[each] for each in dataset]
    with pytest.raises(HeaprError, match=message):
        draw_samples(Checkpoint(qwen3), TextSettings(**settings), 2)


def test_a_template_from_a_file(qwen3: Path, talking: Checkpoint, tmp_path: Path) -> None:
    spec = write_chats(tmp_path / "chats.jsonl", 3)
    (tmp_path / "t.jinja").write_text(CHATML)
    settings = TextSettings(dataset=spec, max_seq_length=512)
    given = TextSettings(dataset=spec, max_seq_length=512, chat_template=str(tmp_path / "t.jinja"))
    assert draw_samples(Checkpoint(qwen3), given, 3).fingerprint() == draw_samples(talking, settings, 3).fingerprint()


def test_equal_rows_have_the_old_fingerprint_and_others_another() -> None:
    rows = torch.arange(12).view(3, 4)
    plain = Samples.equal(rows)
    assert plain.fingerprint() == f"sha256:{hashlib.sha256(rows.numpy().tobytes()).hexdigest()}"
    found = {plain.fingerprint(), Samples.equal(rows.view(2, 6)).fingerprint(), Samples.equal(rows + 1).fingerprint()}
    assert len(found) == 2, "it has never told how long samples are; the settings do"
