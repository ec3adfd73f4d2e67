# SPDX-License-Identifier: Apache-2.0
"""Whatever lies in a file: a HeaprError of one line, or a result; never another exception, never a file touched.

`make fuzz` runs the same for minutes.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import INDEX_FILE, Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.fingerprint import fingerprint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.formats.repair_record import REPAIR_FILE
from heapr_vllm.prune import NeuronMoments, export_checkpoint
from heapr_vllm.prune.calibration.moments import MOMENTS_FILE
from heapr_vllm.prune.export.checkpoint import ExportInputs
from heapr_vllm.prune.report.summary import FRONTIER_FILE, format_report, load_report
from heapr_vllm.prune.selection.selector import Selector
from tests import quantized_models
from tests.formats.strategies import REPAIR, documents, metadata, with_metadata
from tools.hostile import Dice
from tools.packed_tensors import FORMS, PackedTensors

EXAMPLES = int(os.environ.get("HEAPR_FUZZ", "40"))  # per reader
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 40, suppress_health_check=list(HealthCheck)
)
MASKS = "heapr/masks.safetensors"


@pytest.fixture(scope="module")
def repository(masks_repository: Path, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masks repository whose frontier and repair files are there too, and beside it the base model."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(qwen3, folder / "base")
    shutil.copytree(masks_repository, folder / "masks")
    point = {"stored_reduction": 0.5, "executed_reduction": 0.4, "loss_increase": 0.1}
    frontier = {"criterion": "heapr", "chosen": point, "stored": [point], "executed": [point]}
    (folder / "masks" / "heapr" / FRONTIER_FILE).write_text(json.dumps(frontier))
    return folder


def survives(read: Callable[[], Any]) -> bool:
    """Whether `read` gives a result; else it must say in one line what is wrong."""
    try:
        read()
    except HeaprError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


def rewritten(path: Path, text: str) -> Callable[[], None]:
    """Puts hostile text into a file; the returned function puts the old content back."""
    before = path.read_bytes() if path.is_file() else None
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def restore() -> None:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)

    return restore


def attack(folder: Path, name: str, text: str, *reads: Callable[[], Any]) -> None:
    restore = rewritten(folder / name, text)
    try:
        for read in reads:
            survives(read)
    finally:
        restore()


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@fuzzed
@given(data=st.data())
def test_config_of_a_masks_repository(data: st.DataObject, repository: Path) -> None:
    masks = repository / "masks"
    text = data.draw(documents(content(masks / "config.json")))
    attack(
        masks,
        "config.json",
        text,
        lambda: load_report(masks),
        lambda: read_masks(masks),
        lambda: ExportInputs.read(masks, model=str(repository / "base")),
    )


@fuzzed
@given(data=st.data())
def test_config_of_a_base_model(data: st.DataObject, repository: Path) -> None:
    base = repository / "base"
    text = data.draw(documents(content(base / "config.json")))

    def read() -> None:
        checkpoint = Checkpoint.resolve(base)
        checkpoint.check_unpruned()
        checkpoint.expert_shapes()
        fingerprint(checkpoint)
        sizes.export_bytes(checkpoint)

    attack(base, "config.json", text, read)


@pytest.mark.parametrize("name", quantized_models.FORMATS)
@fuzzed
@given(data=st.data())
def test_config_of_a_quantized_base_model(
    name: str, data: st.DataObject, qwen3: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / f"fuzzed-{name}"
    if not base.is_dir():
        quantized_models.quantized(qwen3, base, name)
    text = data.draw(documents({"hidden_size": 64, "quantization_config": quantized_models.block(name, ["lm_head"])}))

    def read() -> None:
        checkpoint = Checkpoint.resolve(base)
        checkpoint.check_unpruned()
        sizes.export_bytes(checkpoint)

    attack(base, "config.json", text, read)


@fuzzed
@given(data=st.data())
def test_index(data: st.DataObject, repository: Path) -> None:
    base = repository / "base"
    valid = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(Checkpoint(base).weight_map, "model.safetensors"),
    }
    valid["weight_map"] = dict(list(valid["weight_map"].items())[:6])
    text = data.draw(documents(valid))

    def read() -> None:
        checkpoint = Checkpoint.resolve(base)
        checkpoint.check_readable()
        checkpoint.expert_shapes()

    attack(base, INDEX_FILE, text, read)


@pytest.mark.parametrize("name", ["calibration.json", FRONTIER_FILE])
@fuzzed
@given(data=st.data())
def test_records(name: str, data: st.DataObject, repository: Path) -> None:
    masks = repository / "masks"
    text = data.draw(documents(content(masks / "heapr" / name)))
    attack(masks, f"heapr/{name}", text, lambda: format_report(load_report(masks)))


@fuzzed
@given(data=st.data())
def test_repair_record(data: st.DataObject, repository: Path) -> None:
    masks = repository / "masks"
    text = data.draw(documents(REPAIR))
    attack(masks, REPAIR_FILE, text, lambda: format_report(load_report(masks)))


@fuzzed
@given(data=st.data())
def test_masks(data: st.DataObject, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source, target = repository / "masks" / MASKS, repository / "hostile.safetensors"
    shapes = st.sampled_from([(0,), (8, 8), (8, 0), (1, 8, 8), (8, 9), (2, 8), (8,), ()])
    dtypes = st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.bool])

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if data.draw(st.booleans()):
            tensors[min(tensors)] = torch.ones(data.draw(shapes)).to(data.draw(dtypes))
        return tensors

    with_metadata(source, data.draw(documents(metadata(source))), target, edit)
    survives(lambda: NeuronMasks.load(target))


@fuzzed
@given(data=st.data())
def test_moments(data: st.DataObject, calibration: Path, repository: Path) -> None:
    source, target = calibration / MOMENTS_FILE, repository / "hostile-moments.safetensors"

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(["nothing", "shape", "dtype", "NaN", "negative", "gone"]))
        if kind == "shape":
            tensors[name] = torch.ones(3)
        elif kind == "dtype":
            tensors[name] = tensors[name].to(torch.int8)
        elif kind == "NaN":
            tensors[name] = torch.full(tensors[name].shape, torch.nan)
        elif kind == "negative":
            tensors[name] = -tensors[name]
        elif kind == "gone":
            del tensors[name]
        return tensors

    with_metadata(source, data.draw(documents(metadata(source))), target, edit)
    survives(lambda: Selector(NeuronMoments.load(target), "heapr"))


@fuzzed
@given(data=st.data())
def test_blocks(data: st.DataObject, repository: Path) -> None:
    """`quantization_config` as vLLM hands it to the plugin, parsed already."""
    block = content(repository / "masks" / "config.json")["quantization_config"]
    block |= {"inner": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "experts": {"type": "int"}}
    document = None
    with suppress(ValueError, RecursionError):
        document = json.loads(data.draw(documents(block)))
    if isinstance(document, dict):
        survives(lambda: PruningConfig.from_dict(document))


@pytest.mark.parametrize("name", FORMS)
def test_tensors_of_4_bits(name: str, tmp_path: Path) -> None:
    """Of other types, shapes and bytes, or gone."""
    target = PackedTensors(name, tmp_path / name)
    outcomes = [survives(partial(target.attack, Dice(f"{target.name} {case}"))) for case in range(2 * EXAMPLES)]
    assert 0.1 < sum(outcomes) / len(outcomes) < 0.9, "taken"


def test_nothing_outside_is_read_or_written(repository: Path, tmp_path: Path) -> None:
    """The cases of lost data: names that lead out of a folder, and outputs over inputs."""
    for name in ("base", "masks"):
        shutil.copytree(repository / name, tmp_path / name)
    victim = tmp_path / "victim.safetensors"
    shutil.copyfile(tmp_path / "base" / "model.safetensors", victim)
    before = victim.read_bytes()
    shards = dict.fromkeys(Checkpoint(tmp_path / "base").weight_map, "../victim.safetensors")
    (tmp_path / "base" / INDEX_FILE).write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(HeaprError, match="lies outside of it"):
        export_checkpoint(tmp_path / "masks", tmp_path / "out" / "compact", model=str(tmp_path / "base"))
    assert victim.read_bytes() == before
    (tmp_path / "base" / INDEX_FILE).unlink()
    (tmp_path / "base" / "merges.txt").symlink_to("/etc/hostname")
    with pytest.raises(HeaprError, match=r"merges.txt, which lies outside"):
        export_checkpoint(tmp_path / "masks", tmp_path / "compact", model=str(tmp_path / "base"))
    config = content(tmp_path / "masks" / "config.json")
    config["quantization_config"]["masks"] = "/etc/passwd"
    (tmp_path / "masks" / "config.json").write_text(json.dumps(config))
    for read in (load_report, read_masks):
        with pytest.raises(HeaprError, match="/etc/passwd, which lies outside"):
            read(tmp_path / "masks")


def test_messages_are_one_line_whatever_they_quote() -> None:
    """Neither a new line nor an escape sequence for the terminal gets through."""
    assert str(HeaprError("a\nb\x1b[31mé\ud800")) == "a\\nb\\x1b[31mé\\ud800"
