# SPDX-License-Identifier: Apache-2.0
"""The calibration benchmark: one short run in a process of its own, and what the table says of several."""

from pathlib import Path

import pytest

from benchmarks import calibration


@pytest.mark.parametrize("shape", calibration.SHAPES)
def test_measures(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibration.SHAPES, shape, (2, 8))
    figures = calibration.measure(shape, "bfloat16")
    assert tuple(figures) == calibration.FIGURES
    assert figures["tokens_per_second"] > 0 and figures["tokens_per_cpu_second"] > 0 and figures["memory_mib"] >= 0


def test_trees_take_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked: list[str] = []

    def measure_tree(tree: Path, shape: str, dtype: str) -> dict[str, float]:
        asked.append(tree.name)
        return dict.fromkeys(calibration.FIGURES, float(len(asked)))

    monkeypatch.setattr(calibration, "measure_tree", measure_tree)
    calibration.main(["--trees", "before", "after", "--shapes", "wide", "--dtypes", "float32", "--rounds", "3"])
    assert asked == ["before", "after"] * 3
    lines = capsys.readouterr().out.splitlines()
    assert "before" in lines[-2] and "3 (1 to 5)" in lines[-2]
    assert "after" in lines[-1] and "4 (2 to 6)" in lines[-1]
