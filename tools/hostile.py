# SPDX-License-Identifier: Apache-2.0
"""Hostile versions of every file that is read, and what becomes of them: `python -m tools.hostile --cases 300`.

Prints, per file, how many were taken, refused in one line (HeaprError), or ended in another exception. It uses names
that were there before 26 November 2026 too, so that both can be compared: copy it and tests/formats/strategies.py.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.checkpoint import INDEX_FILE, Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.repair_record import REPAIR_FILE
from heapr_vllm.prune import CalibrationSettings, NeuronMoments
from heapr_vllm.prune.calibration.dry_run import plan
from heapr_vllm.prune.export.checkpoint import ExportInputs
from heapr_vllm.prune.report.summary import FRONTIER_FILE, format_report, load_report
from heapr_vllm.prune.selection.selector import Selector
from tests import tiny_models
from tests.conftest import prune
from tests.formats.strategies import (
    DELETED,
    HOLDERS,
    KEYS,
    NUMBERS,
    REPAIR,
    TEXTS,
    at,
    changed,
    metadata,
    paths,
    with_metadata,
)

VALUES = (None, True, False, DELETED, *NUMBERS, *TEXTS, *HOLDERS)


class Chooser(Protocol):
    """What makes choices: a fuzzer's bytes, or dice. The names are those of atheris.FuzzedDataProvider."""

    def ConsumeIntInRange(self, low: int, high: int) -> int: ...
    def ConsumeInt(self, num_bytes: int) -> int: ...
    def ConsumeUnicode(self, length: int) -> str: ...
    def ConsumeBool(self) -> bool: ...


class Dice:
    """Choices from a seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def ConsumeIntInRange(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def ConsumeInt(self, num_bytes: int) -> int:
        return self.random.randint(-(2 ** (8 * num_bytes - 1)), 2 ** (8 * num_bytes - 1))

    def ConsumeUnicode(self, length: int) -> str:
        return "".join(chr(self.random.randint(0, 0x10FFFF)) for _ in range(length))

    def ConsumeBool(self) -> bool:
        return self.random.random() < 0.5


class Target:
    """One file: its valid content, how another one is put where it is read, and the reader."""

    def __init__(self, name: str, valid: Any, put: Callable[[str], None], read: Callable[[], Any]) -> None:
        self.name = name
        self.valid = valid
        self.put = put
        self.read = read

    def attack(self, choose: Chooser) -> None:
        """Reads a hostile version; whatever the reader raises goes through."""
        document = self.valid
        for _ in range(choose.ConsumeIntInRange(1, 3)):
            places = list(paths(document))
            place = places[choose.ConsumeIntInRange(0, len(places) - 1)]
            is_added = isinstance(at(document, place), dict) and choose.ConsumeBool()
            if is_added:
                place = (*place, KEYS[choose.ConsumeIntInRange(0, len(KEYS) - 1)])
            value = _value(choose)
            if value is DELETED and (is_added or not place):
                value = None
            document = changed(document, place, value)
        text = json.dumps(document)
        if choose.ConsumeIntInRange(0, 9) == 0:
            text = text[: choose.ConsumeIntInRange(0, len(text))]
        self.put(text)
        self.read()


def _value(choose: Chooser) -> Any:
    kind = choose.ConsumeIntInRange(0, 5)
    if kind == 0:
        return choose.ConsumeInt(9)
    if kind == 1:
        return choose.ConsumeUnicode(12)
    return VALUES[choose.ConsumeIntInRange(0, len(VALUES) - 1)]


def targets(work: Path) -> list[Target]:
    """The files of a tiny masks repository and its base model, made in `work`."""
    base, text = tiny_models.save("qwen3_moe", work / "base"), tiny_models.write_corpus(work / "text.jsonl")
    prune(base, text, work, sparsity=0.5, num_samples=4)
    masks = work / "masks"
    point = {"stored_reduction": 0.5, "executed_reduction": 0.4, "loss_increase": 0.1}
    frontier = {"criterion": "heapr", "chosen": point, "stored": [point], "executed": [point]}
    (masks / "heapr" / FRONTIER_FILE).write_text(json.dumps(frontier))
    (masks / REPAIR_FILE).write_text(json.dumps(REPAIR))
    indexed = Path(shutil.copytree(base, work / "indexed"))
    weight_map = dict.fromkeys(list(Checkpoint(base).weight_map)[:4], "model.safetensors")
    (indexed / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    def file(name: str, path: Path, read: Callable[[], Any]) -> Target:
        before = path.read_text()

        def put(text: str) -> None:
            path.write_bytes(text.encode("utf-8", "surrogatepass"))

        def reading() -> None:
            try:
                read()
            finally:
                path.write_text(before)

        return Target(name, json.loads(before), put, reading)

    def tensors(name: str, source: Path, read: Callable[[Path], Any]) -> Target:
        hostile = work / f"hostile-{source.name}"

        def put(text: str) -> None:
            with_metadata(source, text, hostile, lambda unchanged: unchanged)

        return Target(name, metadata(source), put, lambda: read(hostile))

    parsed: list[Any] = []

    def put_block(text: str) -> None:
        parsed[:] = [{}]
        with suppress(ValueError):
            document = json.loads(text)
            parsed[:] = [document] if isinstance(document, dict) else [{}]

    def report() -> None:
        format_report(load_report(masks))

    settings = CalibrationSettings(model=str(base), dataset=str(text), max_seq_length=64)
    block = json.loads((masks / "config.json").read_text())["quantization_config"]
    return [
        file("config.json of masks, inspected", masks / "config.json", report),
        file(
            "config.json of masks, exported", masks / "config.json", lambda: ExportInputs.read(masks, model=str(base))
        ),
        file("calibration.json", masks / "heapr" / "calibration.json", report),
        file("frontier.json", masks / "heapr" / FRONTIER_FILE, report),
        file("repair.json", masks / REPAIR_FILE, report),
        file("config.json of a base model", base / "config.json", lambda: plan(settings)),
        file("index.json", indexed / INDEX_FILE, lambda: Checkpoint(indexed).check_readable()),
        tensors("masks", masks / "heapr" / "masks.safetensors", NeuronMasks.load),
        tensors("moments", work / "calib" / "moments.safetensors", lambda p: Selector(NeuronMoments.load(p), "heapr")),
        Target("quantization_config", block, put_block, lambda: PruningConfig.from_dict(parsed[0])),
    ]


def count(target: Target, cases: int) -> Counter[str]:
    """Outcomes of so many hostile versions, the same in every run."""
    outcomes: Counter[str] = Counter()
    for number in range(cases):
        try:
            target.attack(Dice(f"{target.name} {number}"))
            outcomes["taken"] += 1
        except HeaprError as error:
            outcomes["refused in one line" if "\n" not in str(error) else "other exceptions"] += 1
        except Exception as error:
            outcomes["other exceptions"] += 1
            outcomes[type(error).__name__] += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.hostile")
    parser.add_argument("--cases", type=int, default=300, help="per file")
    arguments = parser.parse_args()
    columns = ("taken", "refused in one line", "other exceptions")
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        print(f"| file | {' | '.join(columns)} | |\n|---|---|---|---|---|")
        for target in targets(Path(work)):
            outcomes = count(target, arguments.cases)
            kinds = sorted(name for name in outcomes if name not in columns)
            print(
                f"| {target.name} | {' | '.join(str(outcomes[c]) for c in columns)} | {', '.join(kinds)} |", flush=True
            )
            failed += outcomes["other exceptions"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
