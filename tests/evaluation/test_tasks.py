# SPDX-License-Identifier: Apache-2.0
"""Tasks of a local folder through lm-eval itself, on its dummy model, which answers "lol" to everything."""

import json
import sys
from pathlib import Path

import pytest
from lm_eval.models.dummy import DummyLM

from heapr_vllm.errors import HeaprError
from heapr_vllm.evaluation.settings import EvaluationSettings
from heapr_vllm.evaluation.tasks import Outcomes, _outcomes, check_tasks, run_tasks
from tests.evaluation.local_tasks import write_group, write_task

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, answers in {"often": "lol lol lol no", "seldom": "no lol no no no no"}.items():
        items = [{"prompt": f"{name} {i}", "answer": answer} for i, answer in enumerate(answers.split())]
        write_task(folder, name, items)
    filters = [
        {"name": kind, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for kind, pattern in (("first", "^(l)"), ("whole", "(lol)"))
    ]
    write_task(folder, "filtered", [{"prompt": "p", "answer": "lol"}], filter_list=filters, num_fewshot=0)
    write_group(folder, "both", ["often", "seldom"])
    return folder


def settings(folder: Path, *tasks: str, **others: object) -> EvaluationSettings:
    return EvaluationSettings(dataset="", tasks=tasks, include_path=str(folder), **others)


def test_every_sample_is_kept(folder: Path, tmp_path: Path) -> None:
    (found,) = run_tasks(DummyLM(), settings(folder, "often"), tmp_path / "answers").values()
    assert found.metric == "exact_match" and found.value == 0.75 and found.num_samples == 4 and found.num_fewshot == 0
    assert found.right == {"often 0": True, "often 1": True, "often 2": True, "often 3": False}
    lines = [json.loads(line) for line in (tmp_path / "answers" / "often.jsonl").read_text().splitlines()]
    assert [line["exact_match"] for line in lines] == [1, 1, 1, 0] and lines[3]["target"] == "no"


def test_limit_and_fewshot(folder: Path) -> None:
    (found,) = run_tasks(DummyLM(), settings(folder, "often", limit=2, num_fewshot=1), None).values()
    assert found.num_samples == len(found.right) == 2 and found.num_fewshot == 1


def test_a_group_pools_its_tasks(folder: Path) -> None:
    found = run_tasks(DummyLM(), settings(folder, "both"), None)
    assert found["both"].num_samples == len(found["both"].right) == 10
    assert found["both"].value == pytest.approx(4 / 10) and len(found) == 1


def test_filters_stand_apart(folder: Path) -> None:
    found = run_tasks(DummyLM(), settings(folder, "filtered"), None)
    assert {name: each.value for name, each in found.items()} == {
        "filtered exact_match,first": 0,
        "filtered exact_match,whole": 1,
    }


def test_samples_that_are_more_than_right_or_wrong() -> None:
    found = {
        "samples": {
            "f1": [
                {"doc_id": i, "filter": "none", "f1": each, "acc": i % 2} for i, each in enumerate([(1, 0), (1, 1)])
            ],
            "wiki": [{"doc_id": 0, "filter": "none", "ppl": (-3.5, 7)}],
        },
        "results": {"f1": {"f1,none": 0.75}, "wiki": {"ppl,none": 8.5}},
        "n-samples": {"f1": {"effective": 2}, "wiki": {"effective": 1}},
        "n-shot": {"f1": 0, "wiki": 0},
        "higher_is_better": {"f1": {"f1": True}, "wiki": {"ppl": False}},
    }
    (graded,) = _outcomes("f1", ["f1"], found).values()
    assert graded.value == 0.75 and graded.num_samples == 2 and not graded.right
    alone = _outcomes("group", ["f1", "wiki"], found)
    assert {name: each.value for name, each in alone.items()} == {"f1": 0.75, "wiki": 8.5}, "no metric is common"


def test_against_the_baseline() -> None:
    numbers = {"metric": "exact_match", "num_samples": 20, "num_fewshot": 0, "higher_is_better": True}
    base = Outcomes(value=0.8, right={str(i): i < 16 for i in range(20)}, **numbers)
    ours = Outcomes(value=0.4, right={str(i): i < 8 for i in range(20)}, **numbers)
    result = ours.against(base)
    assert result.recovery == 0.5 and result.mcnemar_p == pytest.approx(2 / 2**8)  # 8 to 0
    assert result.low < 0.4 < result.high
    assert base.against(None).recovery is None and base.against(None).mcnemar_p is None
    graded = Outcomes(value=0.4, **numbers).against(Outcomes(value=0.5, **numbers))
    assert graded.recovery == 0.8 and graded.low is None and graded.mcnemar_p is None
    perplexities = numbers | {"higher_is_better": False}
    assert Outcomes(value=9.0, **perplexities).against(Outcomes(value=8.0, **perplexities)).recovery is None


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tasks(settings(folder, "often", "both"))
    with pytest.raises(HeaprError, match="knows no task nonsense; .*--include-path DIR"):
        check_tasks(settings(folder, "often", "nonsense"))
    with pytest.raises(HeaprError, match="--include-path .* is no folder of tasks"):
        check_tasks(settings(tmp_path / "nowhere", "often"))
    write_task(tmp_path, "empty", [], dataset_kwargs={"data_files": {"test": str(tmp_path / "missing.jsonl")}})
    with pytest.raises(HeaprError, match="lm-eval cannot run empty: "):
        run_tasks(DummyLM(), settings(tmp_path, "empty"), None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(HeaprError, match=r"--tasks needs lm-eval: pip install .+\[eval\]"):
        check_tasks(settings(folder, "often"))
