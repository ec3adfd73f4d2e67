# SPDX-License-Identifier: Apache-2.0
"""Fuzzes the readers of files, guided by coverage: `python -m tools.fuzz --seconds 600`; needs the package atheris.

The fuzzer's bytes choose one of the files of `tools/hostile.py`, places in it and values for them, or change tensors of
4 bits as `tools/packed_tensors.py` does; `--only WORD` takes those with the word in their names. A reader may return,
or raise a HeaprError of one line; anything else stops the run, and libFuzzer keeps the input, which `python -m
tools.fuzz --replay FILE` repeats. `tests/formats/test_fuzz.py` does the same in seconds, without guidance.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["heapr_vllm"]):
    from heapr_vllm.errors import HeaprError
    from tools.hostile import Target, targets
    from tools.packed_tensors import PackedTensors, packed_tensors


def attack(files: Sequence[Target | PackedTensors], content: bytes) -> None:
    """Reads one hostile file."""
    choose = atheris.FuzzedDataProvider(content)
    target = files[choose.ConsumeIntInRange(0, len(files) - 1)]
    try:
        target.attack(choose)
    except HeaprError as error:
        assert str(error) and "\n" not in str(error)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--replay", type=Path, help="an input that libFuzzer kept, with its --only")
    parser.add_argument("--only", default="", metavar="WORD")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        files = [each for each in (*targets(Path(work)), *packed_tensors(Path(work))) if arguments.only in each.name]
        if not files:
            parser.error(f"no target's name contains {arguments.only}")
        if arguments.replay:
            attack(files, arguments.replay.read_bytes())
            return
        options = [f"-max_total_time={arguments.seconds}", "-max_len=256", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options], lambda content: attack(files, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
