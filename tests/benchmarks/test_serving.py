# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.serving` at toy size: what its arms compute, how rounds are dealt, and the command itself."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import serving, vllm_server
from benchmarks.arms import ARMS, Arm, build_arms, check_memory, needed_gib
from benchmarks.random_models import CONFIGS, random_masks, write_dense
from benchmarks.routing import STEPS, counted, uniform
from benchmarks.variants import keep_all, write_pruned, write_zeroed
from benchmarks.workload import WORKLOADS, Workload, random_prompts, tokens_per_second
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.config import PruningConfig
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.prune.models.pruned import applied, opened
from tests.model_executor.engine import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights on the disk."""
    return write_dense("tiny", tmp_path_factory.mktemp("dense"), weights=True)


@pytest.fixture(scope="module")
def masks() -> NeuronMasks:
    return random_masks(CONFIGS["tiny"], 0.5)


def test_zeroed_differs_where_masks_say_so(dense: Path, masks: NeuronMasks, tmp_path: Path) -> None:
    """Kept neurons as in dense, pruned ones zero in all three projections, everything else the same."""
    before, after = (_tensors(path) for path in (dense, write_zeroed(dense, masks, tmp_path)))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        where = ExpertTensor.parse(name)
        if where:
            keep = masks.keep[where.prefix][where.expert]
            tensor = tensor * (keep if where.shard == "w2" else keep[:, None])
        assert torch.equal(tensor, after[name])
    assert Checkpoint(tmp_path).config == Checkpoint(dense).config
    with applied(masks, AutoModelForCausalLM.from_pretrained(dense)) as model, torch.no_grad():
        ids = torch.arange(20)[None]
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard, names in Checkpoint(path).shards.items():
        with Checkpoint(path).open(shard) as file:
            found |= {name: file.get_tensor(name) for name in names}
    return found


@pytest.mark.parametrize("is_pruned", [False, True])
def test_compact_computes_what_zeroed_does(is_pruned: bool, dense: Path, masks: NeuronMasks, tmp_path: Path) -> None:
    """In transformers; unpruned computes what dense does."""
    chosen = masks if is_pruned else keep_all(masks)
    write_pruned(dense, chosen, tmp_path / "compact")
    write_zeroed(dense, chosen, tmp_path / "zeroed")
    logits = [_logits(path) for path in (tmp_path / "compact", tmp_path / "zeroed", dense)]
    torch.testing.assert_close(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[2]) != is_pruned


@torch.no_grad()
def _logits(path: Path) -> torch.Tensor:
    """Of 20 tokens, [1, 20, vocabulary]."""
    with opened(Checkpoint(path), "float32", "cpu") as (model, _):
        return model(torch.arange(20)[None]).logits


def test_without_weights_pruned_is_compact(masks: NeuronMasks, tmp_path: Path) -> None:
    pruned = Checkpoint(write_pruned(write_dense("tiny", tmp_path), masks, tmp_path / "pruned"))
    assert PruningConfig.from_dict(pruned.config["quantization_config"]).layout == "compact" and not pruned.has_weights


def test_routing_is_that_of_the_model(dense: Path, masks: NeuronMasks) -> None:
    one, many = Workload(8, 16, 1, 1), Workload(32, 16, 16, 32)
    (single,) = counted(dense, [None], one, "cpu")
    whole, pruned = counted(dense, [None, masks], many, "cpu")
    assert single.experts_hit == 2 and 2 < whole.experts_hit <= 8
    assert whole.kept(None) == 1 and pruned.kept(masks) == pytest.approx(0.5, abs=0.1)
    assert pruned.kept(masks) != 1 - masks.sparsity  # weighted by routes
    assert all(count.sum() == 16 * (32 + STEPS) * 2 for count in pruned.tokens.values())
    assert uniform(dense, 1).experts_hit == pytest.approx(2) and uniform(dense, 500).experts_hit == pytest.approx(8)
    assert uniform(dense, 1).kept(masks) == 1 - masks.sparsity


def test_only_ragged_arms_execute_less(dense: Path, masks: NeuronMasks) -> None:
    seen = uniform(dense, 4)
    kept = {ragged: serving.routing_columns(Arm(dense, None, masks, ragged), seen) for ragged in (False, True)}
    assert kept[False]["kept"] == kept[False]["kept_routed"] == 1
    assert kept[True]["kept"] == kept[True]["kept_routed"] == round(1 - masks.sparsity, 4)


def test_arms_and_their_memory(dense: Path, masks: NeuronMasks, tmp_path: Path) -> None:
    """A pruned arm per sparsity, one zeroed arm, of the first; too little memory is told before anything starts."""
    found = {
        label: (own, write_pruned(dense, own, tmp_path / label))
        for label, own in {"50%": masks, "25%": random_masks(CONFIGS["tiny"], 0.25)}.items()
    }
    arms = build_arms(list(ARMS), dense, found, "", tmp_path)
    assert list(arms) == ["dense", "zeroed 50%", "unpruned", "pruned 50%", "pruned 25%"]
    assert [arm.plugins for arm in arms.values()] == ["", "", None, None, None]
    assert [arm.is_ragged for arm in arms.values()] == [False, False, False, True, True]
    assert 500 < needed_gib(arms, kv_cache_gib=100) < 520
    with pytest.raises(SystemExit, match=r"5 servers at once need about 5\d\d\.\d GiB, .* GiB are free"):
        check_memory(arms, kv_cache_gib=100)


def test_rounds_take_turns() -> None:
    arms = {name: Arm(Path(name), None) for name in "abc"}
    assert "".join(name for _, name in serving.turns(arms, 3)) == "abccbaabc"
    assert [number for number, _ in serving.turns(arms, 2)] == [0, 0, 0, 1, 1, 1]


def test_ratios_are_taken_round_by_round() -> None:
    speeds = {"dense": [1.0, 2.0, 4.0], "unpruned": [2.0, 2.0, 2.0], "pruned 50%": [1.0, 4.0, 2.0]}
    assert serving.speed_columns("pruned 50%", speeds) == {
        "tok_s": 2,
        "tok_s_min": 1,
        "tok_s_max": 4,
        "vs_dense": 1,
        "vs_dense_min": 0.5,
        "vs_dense_max": 2,
        "vs_unpruned": 1,
        "vs_unpruned_min": 0.5,
        "vs_unpruned_max": 2,
    }
    assert set(serving.ratios("dense", [1.0], {}).values()) == {""}


def test_no_two_prompts_are_alike() -> None:
    prompts = [tuple(prompt) for seed in range(3) for prompt in random_prompts(WORKLOADS["batch"], 4096, seed)]
    assert len(set(prompts)) == 3 * 32 and {len(prompt) for prompt in prompts} == {32}
    assert random_prompts(WORKLOADS["batch"], 4096, 0) == random_prompts(WORKLOADS["batch"], 4096, 0)


def test_speed_counts_what_the_server_gave() -> None:
    """Every prompt is asked once, after one short request per slot; an answer cut short is an error."""
    with _answering() as (url, bodies):
        assert tokens_per_second(url, Path("model"), WORKLOADS["smoke"], 4096, seed=0) > 0
        assert sorted(body["prompt"] for body in bodies[2:]) == sorted(random_prompts(WORKLOADS["smoke"], 4096, 0))
        assert all(body["max_tokens"] == 8 and body["ignore_eos"] for body in bodies) and len(bodies) == 6
    with _answering(short=1) as (url, _), pytest.raises(RuntimeError, match="7 tokens instead of 8"):
        tokens_per_second(url, Path("model"), WORKLOADS["smoke"], 4096, seed=0)
    with pytest.raises(RuntimeError, match="did not answer"):
        tokens_per_second(url, Path("model"), WORKLOADS["smoke"], 4096, seed=0)


@contextmanager
def _answering(short: int = 0) -> Iterator[tuple[str, list[dict]]]:
    """URL of a server whose completions lack `short` tokens, and the requests that it got."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"usage": {"completion_tokens": bodies[-1]["max_tokens"] - short}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", bodies
        finally:
            server.shutdown()


def test_failed_start_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "vllm"
    script.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(vllm_server, "VLLM", str(script))
    with (
        pytest.raises(RuntimeError, match=r"(?s)ended with status 3; .*dense\.log ends:\nout of luck"),
        serving.servers({"dense": Arm(tmp_path, "")}, [], tmp_path / "logs"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.vllm
def test_served_comparison(tmp_path: Path) -> None:
    """The benchmark's command at toy size: four servers asked in turn, a row per arm."""
    table = tmp_path / "rows.csv"
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--sparsity",
        "0.5",
        "--workload",
        "smoke",
        "--rounds",
        "2",
        "--csv",
        str(table),
        "--work",
        str(tmp_path),
        "--",
        "--max-model-len",
        "64",
        "--enforce-eager",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = {row["arm"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["dense", "zeroed 50%", "unpruned", "pruned 50%"]
    assert float(rows["dense"]["vs_dense"]) == float(rows["unpruned"]["vs_unpruned"]) == 1
    assert len({row["kv_tokens"] for row in rows.values()}) == 1
    assert len({row["experts_hit"] for name, row in rows.items() if name in ("dense", "unpruned")}) == 1
    for name, row in rows.items():
        assert 0 < float(row["tok_s_min"]) <= float(row["tok_s"]) <= float(row["tok_s_max"])
        assert float(row["vs_dense"]) > 0 and float(row["vs_unpruned"]) > 0 and 2 <= float(row["experts_hit"]) <= 4
        assert row["routing"] == "counted" and f"smoke, round 2, {name}: " in done.stderr
        assert (float(row["kept_routed"]) < 1) == (float(row["kept"]) < 1) == (name == "pruned 50%")
