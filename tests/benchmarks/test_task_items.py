# SPDX-License-Identifier: Apache-2.0
"""Items of the local tasks: what is asked can be found in the prompt or follows from it."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.task_items import CHARACTERS, TASKS, bracket_places, identifier_places, item, main, prompt_before

TASK_FILES = Path(__file__).parent.parent.parent / "benchmarks" / "tasks"
SOURCE = '''total_count = max(
    first[0],
    [
        second[1],
    ])
text = """
)"""
if total_count in names[index(x)]:  # nor here ))
    print(total_count, [
        {1: 2
        }])
    return {**sorted(total_count), "a": (
        2
    )}
'''


def found(task, text: str) -> list[tuple[str, str]]:
    return [(text[:end].splitlines()[-1], answer) for end, answer in task(text)]


def test_brackets_begin_a_line_where_nothing_else_can_stand() -> None:
    assert found(bracket_places, SOURCE) == [("   ", "])"), ("       ", "}])"), ("   ", ")}")]
    assert not found(bracket_places, "a = [\n    1,\n    ]\n"), "another item could stand there"


def test_names_stand_earlier_and_alone() -> None:
    assert [line for line, _ in found(identifier_places, SOURCE)] == [
        "if total",
        "    print(total",
        "    return {**sorted(total",
    ]
    assert {answer for _, answer in found(identifier_places, SOURCE)} == {"_count"}
    assert not found(identifier_places, "total_sum = 1\n" + SOURCE), "two names begin so"


def test_prompts_are_whole_lines(tmp_path: Path) -> None:
    text = "".join(f"value_{i} = call(\n    values[{i}]\n)\nother_name = value_{i}\n" for i in range(60))
    assert len(prompt_before(text, 1500)) <= CHARACTERS and prompt_before(text, 1500).startswith(("value_", "other_"))
    for task in TASKS:
        assert item(task, "a.py", text) == item(task, "a.py", text)


def test_what_is_written_is_what_the_tasks_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"name_{i} = call(\n    values[{i}]\n)\nprint_all(name_{i}, other)\n" for i in range(30))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "held_out.jsonl").write_text(json.dumps({"path": "a.py", "text": text}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["task_items", "--corpus", "corpus"])
    main()
    for task in TASKS:
        config = yaml.safe_load((TASK_FILES / f"{task}.yaml").read_text())
        (line,) = Path(config["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        assert config["task"] == task and {config["doc_to_text"], config["doc_to_target"]} < json.loads(line).keys()
