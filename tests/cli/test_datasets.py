# SPDX-License-Identifier: Apache-2.0
"""`heapr calibrate` and `eval` on texts that nobody should give them: exit code 2, one line that names the remedy."""

import json
from pathlib import Path

import pytest

from tests.cli.test_hostile import refused
from tests.prune.text.test_chats import CHATML, REFUSES, user, write_chats

SYSTEM = {"role": "system", "content": "x"}
FILES = {
    "text.txt": b"some words " * 500,
    "latin.jsonl": b'{"text": "a"}\n{"text": "\xe9"}\n',
    "deep.jsonl": b'{"text": ' + b"[" * 100_000,
    "half.jsonl": b'{"text": "\\ud83d"}',
    "table.csv": b"a,b",
    "roles.jsonl": json.dumps({"messages": [SYSTEM, user("x")]}).encode(),
    "turns.jsonl": json.dumps({"messages": [{"speaker": "x", "content": "y"}]}).encode(),
    "chatml.jinja": CHATML.encode(),
    "refuses.jinja": REFUSES.encode(),
    "broken.jinja": b"{% if",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files, some chats and an empty directory, where the command runs."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_chats(tmp_path / "chats.jsonl", 4)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.jsonl", "dataset file missing.jsonl does not exist; correct its name"),
        ("empty", "dataset empty is a directory; name a file in it"),
        ("table.csv", "convert or rename it"),
        ("latin.jsonl", "latin.jsonl:2 is not UTF-8 (invalid continuation byte); save the file as UTF-8"),
        ("deep.jsonl", "deep.jsonl:1 is nested too deeply"),
        ("half.jsonl", "half.jsonl:1 holds half of a character (a lone surrogate); write"),
        (
            "turns.jsonl --chat-template chatml.jinja",
            "turns.jsonl:1 has messages with other fields than role and content, or from",
        ),
        ("text.txt:0.5 chats.jsonl:0.2", "add up to 0.7; change them so that it is 1"),
        ("text.txt:1 chats.jsonl:0", "the share of chats.jsonl is 0; give it more than 0, or leave the source out"),
        ("a=text.txt a=chats.jsonl", "two sources are called a; give each a name of its own"),
        ("text.txt:0.5 chats.jsonl", "source chats has no share, but others have"),
        ("text.txt:0.9 chats.jsonl:0.1", "source chats gets none of 4 samples; ask for 10 or more"),
        ("chats.jsonl", "the model has no chat template, so conversations cannot be rendered; give one with"),
        ("chats.jsonl --chat-template none.jinja", "none.jinja cannot be read"),
        ("chats.jsonl --chat-template empty", "empty cannot be read"),
        ("chats.jsonl --chat-template broken.jinja", "cannot be rendered by the chat template: unexpected"),
        (
            "roles.jsonl --chat-template refuses.jinja",
            "roles.jsonl:1 cannot be rendered by the chat template: roles must;",
        ),
        (
            "roles.jsonl --chat-template chatml.jinja --loss assistant",
            "0 conversations with something to predict, 4 are",
        ),
        ("text.txt --loss assistant", "--loss assistant needs conversations, and this is text"),
        ("chats.jsonl --text-column body", "has no `body` field, only "),
        ("text.txt --packing --max-seq-length 4000", "exceeds the model's 512 positions"),
    ],
)
def test_datasets(arguments: str, message: str, folder: Path, qwen3: Path, capsys: pytest.CaptureFixture) -> None:
    text = ["--max-seq-length", "64", "--num-calibration-samples", "4", "--dataset", *arguments.split()]
    refused(["calibrate", str(qwen3), "-o", "calib", *text], message, capsys, qwen3, folder)
    assert not (folder / "calib").exists()


def test_an_evaluation_reads_the_same_texts(folder: Path, qwen3: Path, capsys: pytest.CaptureFixture) -> None:
    text = ["--max-seq-length", "64", "--num-samples", "4", "--dataset", "text.txt", "chats.jsonl:0.5"]
    refused(["eval", str(qwen3), *text], "source text has no share", capsys, qwen3, folder)
