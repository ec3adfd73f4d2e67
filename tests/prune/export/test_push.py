# SPDX-License-Identifier: Apache-2.0
"""Pruned models to a stand-in of the Hub: all files, or one line that says why not."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from heapr_vllm.cli.main import main
from heapr_vllm.formats.config import MASKS_FILE
from heapr_vllm.prune import export_checkpoint
from tests.hub import TOKEN, Hub, is_large, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # large files by HTTP instead
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def masks(masks_repository: Path, tmp_path: Path) -> Path:
    """As `heapr prune` writes them for a base model of the Hub."""
    shutil.copytree(masks_repository, tmp_path / "masks")
    config = json.loads((tmp_path / "masks" / "config.json").read_text())
    config["quantization_config"]["base_model"] |= {"name_or_path": "me/base", "revision": "a" * 40}
    (tmp_path / "masks" / "config.json").write_text(json.dumps(config))
    return tmp_path / "masks"


def refused(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["push", *argv]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("heapr: error: ")]
    assert message in line


@pytest.mark.parametrize("kind", ["masks", "compact"])
def test_all_files_arrive(
    kind: str, masks: Path, masks_repository: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if kind == "compact":
        export_checkpoint(masks_repository, tmp_path / "compact")
    folder = tmp_path / kind
    assert main(["push", str(folder), "me/pruned", "--private"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/me/pruned/commit/{'0' * 40}"
    repository = hub.repositories["me/pruned"]
    sent = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repository.private
    assert repository.files == {name: content for name, content in sent.items() if not is_large(name)}
    assert repository.large.keys() == {name for name in sent if is_large(name)}
    for name, digest in repository.large.items():
        assert hashlib.sha256(sent[name]).hexdigest() == digest and hub.objects[digest] == sent[name]
    assert main(["push", str(folder), "me/pruned"]) == 0, "a repository that is there is used"
    assert main(["push", str(folder), "me/open"]) == 0 and not hub.repositories["me/open"].private


def test_masks_of_a_local_model(masks_repository: Path, hub: Hub, capsys: pytest.CaptureFixture) -> None:
    refused([str(masks_repository), "me/pruned"], "is a folder here, so nobody else could serve these masks", capsys)
    assert not hub.repositories


def test_what_is_not_whole(
    masks_repository: Path, qwen3: Path, calibration: Path, hub: Hub, tmp_path: Path, capsys
) -> None:
    export_checkpoint(masks_repository, tmp_path / "compact")
    for folder in (qwen3, calibration, tmp_path / "nowhere"):
        refused([str(folder), "me/pruned"], "is no pruned model; `heapr prune` and", capsys)
    for name, message in (
        ("config.json", "lacks config.json, so it is not whole"),
        ("README.md", "lacks README.md, so it is not whole"),
        ("heapr/calibration.json", "calibration.json is missing"),
        ("model.safetensors", "lacks its weights; run `heapr export` again"),
    ):
        shutil.copytree(tmp_path / "compact", tmp_path / "broken", dirs_exist_ok=True)
        for path in (tmp_path / "broken" / name, *(tmp_path / "broken").glob(f"{name}.index.json")):
            path.unlink(missing_ok=True)
        refused([str(tmp_path / "broken"), "me/pruned"], message, capsys)
        shutil.rmtree(tmp_path / "broken")
    for name in (next((tmp_path / "compact").glob("*.safetensors")).name, MASKS_FILE):
        shutil.copytree(tmp_path / "compact", tmp_path / "broken")
        content = (tmp_path / "broken" / name).read_bytes()
        (tmp_path / "broken" / name).write_bytes(content[: len(content) * 3 // 4])
        refused([str(tmp_path / "broken"), "me/pruned"], "is damaged", capsys)
        shutil.rmtree(tmp_path / "broken")
    assert not hub.repositories, "nothing was made for what is not sent"


def test_what_the_hub_refuses(masks: Path, hub: Hub, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    for name in ("me/a/b", "me/..", "-", "me/a b"):
        refused([str(masks), "--", name], "is no name of a repository, such as you/model", capsys)
    hub.refused["others/model"] = 403
    refused([str(masks), "others/model"], "the Hub refused others/model: ", capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused([str(masks), "me/pruned"], "and that the token may write there", capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(masks / "no-token"))
    refused([str(masks), "me/pruned"], "no token of the Hub; log in with `hf auth login`, or set HF_TOKEN", capsys)
    assert not hub.repositories


def test_no_network(masks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused([str(masks), "me/pruned"], "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it", capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused([str(masks), "me/pruned"], "the Hub cannot be reached", capsys)
