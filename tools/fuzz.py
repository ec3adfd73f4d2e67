# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the readers of files, guided by coverage: `python -m tools.fuzz --seconds 600`; needs the package atheris.

The fuzzer's bytes choose a file of a masks repository, places in it and hostile values for them. A reader may return or
raise a HeaprError of one line; anything else stops the run, and libFuzzer prints the input, which
`python -m tools.fuzz --replay FILE` repeats. `tests/formats/test_fuzz.py` does the same in seconds, without guidance.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["heapr_vllm"]):
    from heapr_vllm.errors import HeaprError
    from heapr_vllm.formats import sizes
    from heapr_vllm.formats.checkpoint import INDEX_FILE, Checkpoint
    from heapr_vllm.formats.config import PruningConfig
    from heapr_vllm.formats.masks import NeuronMasks
    from heapr_vllm.formats.pruned import read_masks
    from heapr_vllm.formats.repair_record import REPAIR_FILE, RepairRecord
    from heapr_vllm.prune import NeuronMoments
    from heapr_vllm.prune.export.checkpoint import ExportInputs
    from heapr_vllm.prune.report.summary import FRONTIER_FILE, format_report, load_report
    from heapr_vllm.prune.selection.selector import Selector

from tests import tiny_models
from tests.conftest import prune
from tests.formats.strategies import DELETED, HOLDERS, KEYS, NUMBERS, TEXTS, at, changed, paths
from tests.formats.test_fuzz import REPAIR, metadata, with_metadata

VALUES = (None, True, False, DELETED, *NUMBERS, *TEXTS, *HOLDERS)


class Target:
    """One file: its valid content, and what reads it. `put` writes another content where the reader looks."""

    def __init__(self, valid: Any, put: Callable[[str], None], read: Callable[[], Any]) -> None:
        self.valid = valid
        self.put = put
        self.read = read

    def attack(self, data: atheris.FuzzedDataProvider) -> None:
        document = self.valid
        for _ in range(data.ConsumeIntInRange(1, 3)):
            places = list(paths(document))
            place = places[data.ConsumeIntInRange(0, len(places) - 1)]
            if isinstance(at(document, place), dict) and data.ConsumeBool():
                place = (*place, KEYS[data.ConsumeIntInRange(0, len(KEYS) - 1)])
                document = changed(document, place, _value(data, is_root=True))
                continue
            document = changed(document, place, _value(data, is_root=not place))
        text = json.dumps(document)
        if data.ConsumeIntInRange(0, 9) == 0:
            text = text[: data.ConsumeIntInRange(0, len(text))]
        self.put(text)
        try:
            self.read()
        except HeaprError as error:
            assert str(error) and "\n" not in str(error)


def _value(data: atheris.FuzzedDataProvider, is_root: bool) -> Any:
    kind = data.ConsumeIntInRange(0, 5)
    if kind == 0:
        return data.ConsumeInt(9)
    if kind == 1:
        return data.ConsumeUnicode(12)
    value = VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)]
    return None if is_root and value is DELETED else value


def targets(work: Path) -> list[Target]:
    """The files of a tiny masks repository and its base model, made in `work`."""
    base = tiny_models.save("qwen3_moe", work / "base")
    prune(base, tiny_models.write_corpus(work / "text.jsonl"), work, sparsity=0.5, num_samples=4)
    masks = work / "masks"
    point = {"stored_reduction": 0.5, "executed_reduction": 0.4, "loss_increase": 0.1}
    frontier = {"criterion": "heapr", "chosen": point, "stored": [point], "executed": [point]}
    (masks / "heapr" / FRONTIER_FILE).write_text(json.dumps(frontier))
    (masks / REPAIR_FILE).write_text(json.dumps(REPAIR))

    def file(path: Path, read: Callable[[], Any]) -> Target:
        before = path.read_text()

        def reading() -> None:
            try:
                read()
            finally:
                path.write_text(before)

        return Target(json.loads(before), lambda text: _write(path, text), reading)

    def tensors(source: Path, read: Callable[[Path], Any]) -> Target:
        hostile = work / f"hostile-{source.name}"

        def put(text: str) -> None:
            with_metadata(source, text, hostile, lambda unchanged: unchanged)

        return Target(metadata(source), put, lambda: read(hostile))

    def base_model() -> None:
        checkpoint = Checkpoint(base)
        checkpoint.check_unpruned()
        checkpoint.expert_shapes()
        sizes.export_bytes(checkpoint)

    indexed = Path(shutil.copytree(base, work / "indexed"))
    index = {"weight_map": dict.fromkeys(list(Checkpoint(base).weight_map)[:4], "model.safetensors")}
    (indexed / INDEX_FILE).write_text(json.dumps(index))
    block = json.loads((masks / "config.json").read_text())["quantization_config"]
    parsed: list[Any] = []

    def put_block(text: str) -> None:
        parsed[:] = [{}]
        with suppress(ValueError):
            document = json.loads(text)
            parsed[:] = [document] if isinstance(document, dict) else [{}]

    return [
        file(masks / "config.json", lambda: (load_report(masks), read_masks(masks))),
        file(masks / "config.json", lambda: ExportInputs.read(masks, model=str(base), verify=False)),
        file(masks / "heapr" / "calibration.json", lambda: format_report(load_report(masks))),
        file(masks / "heapr" / FRONTIER_FILE, lambda: format_report(load_report(masks))),
        file(masks / REPAIR_FILE, lambda: RepairRecord.read(masks)),
        file(base / "config.json", base_model),
        file(indexed / INDEX_FILE, lambda: Checkpoint(indexed).check_readable()),
        tensors(masks / "heapr" / "masks.safetensors", NeuronMasks.load),
        tensors(work / "calib" / "moments.safetensors", lambda path: Selector(NeuronMoments.load(path), "heapr")),
        Target(block, put_block, lambda: PruningConfig.from_dict(parsed[0])),
    ]


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--replay", type=Path, help="an input that libFuzzer kept, instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        files = targets(Path(work))

        def one(content: bytes) -> None:
            data = atheris.FuzzedDataProvider(content)
            files[data.ConsumeIntInRange(0, len(files) - 1)].attack(data)

        if arguments.replay:
            one(arguments.replay.read_bytes())
            return
        options = [f"-max_total_time={arguments.seconds}", "-max_len=256", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
