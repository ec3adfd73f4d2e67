# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval that lie in a folder: no Hub."""

import json
from pathlib import Path

import yaml


def write_task(folder: Path, name: str, items: list[dict], **config: object) -> None:
    """Writes a generation task, exact match against `answer`, few-shot examples from its own items."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_group(folder: Path, name: str, tasks: list[str]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": tasks}))
