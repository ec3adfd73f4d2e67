# SPDX-License-Identifier: Apache-2.0
"""Recorded traffic: files of ranks and runs, moments weighed by it, and the nearest mix of sources."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heapr_vllm.cli.main import main
from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.pruned import read_masks
from heapr_vllm.formats.traffic import LayerTraffic, Traffic, save_traffic
from heapr_vllm.prune import NeuronMoments
from heapr_vllm.prune.report.traffic_match import match_traffic
from heapr_vllm.prune.selection.criteria import score
from heapr_vllm.prune.selection.served_traffic import as_served


@pytest.fixture
def moments(calibration: Path) -> NeuronMoments:
    return NeuronMoments.from_pretrained(calibration)


def recorded(moments: NeuronMoments, folder: Path, factor: int = 1, run: str = "a") -> Path:
    """Traffic `factor` times as long as the calibration text and otherwise the same, in a file of one rank."""
    layers = {
        prefix: LayerTraffic((layer.activation_sq * factor).float(), layer.tokens * factor)
        for prefix, layer in moments.layers.items()
    }
    header = {"run": run, "rank": 0, "base_fingerprint": moments.metadata["base_fingerprint"]}
    save_traffic(folder / f"{run}.safetensors", layers, header)
    return folder


def test_ranks_are_joined_and_runs_added(moments: NeuronMoments, tmp_path: Path) -> None:
    """Two ranks that hold half of every expert's neurons count the same tokens."""
    recorded(moments, tmp_path)
    for rank in range(2):
        layers = {}
        for prefix, layer in moments.layers.items():
            energy = torch.zeros_like(layer.activation_sq)
            energy[:, rank::2] = layer.activation_sq[:, rank::2]
            layers[prefix] = LayerTraffic(energy, layer.tokens)
        header = {
            "run": "b",
            "rank": rank,
            "ranks": 2,
            "top_k": 1,
            "base_fingerprint": moments.metadata["base_fingerprint"],
        }
        save_traffic(tmp_path / f"b{rank}.safetensors", layers, header)
    traffic = Traffic.load(tmp_path)
    assert traffic.runs == 2
    assert traffic.tokens == 2 * max(int(layer.tokens.sum()) for layer in moments.layers.values())
    for prefix, layer in moments.layers.items():
        torch.testing.assert_close(traffic.layers[prefix].activation_sq, 2 * layer.activation_sq)
        assert torch.equal(traffic.layers[prefix].tokens, 2 * layer.tokens)


def test_tokens_choose_several_experts(moments: NeuronMoments, tmp_path: Path) -> None:
    layers = {
        prefix: LayerTraffic(layer.activation_sq.float(), layer.tokens) for prefix, layer in moments.layers.items()
    }
    for layer in layers.values():
        layer.tokens[:] = torch.tensor([9] + [1] * (len(layer.tokens) - 1))
    experts = len(next(iter(layers.values())).tokens)
    save_traffic(tmp_path / "a.safetensors", layers, {"run": "a", "rank": 0, "ranks": 1, "top_k": 4})
    assert Traffic.load(tmp_path).tokens == (8 + experts) // 4


def test_traffic_like_the_text_changes_nothing(moments: NeuronMoments, tmp_path: Path) -> None:
    """However long it is."""
    served = as_served(moments, Traffic.load(recorded(moments, tmp_path, factor=7)))
    for prefix, layer in moments.layers.items():
        for name, values in layer.tensors().items():
            torch.testing.assert_close(served[prefix].tensors()[name].to(values.dtype), values)


def test_what_traffic_uses_more_counts_more(moments: NeuronMoments, tmp_path: Path) -> None:
    """An expert that gets three times the share has three times the predicted loss; one never calibrated has none."""
    prefix = next(iter(moments.layers))
    layer = moments[prefix]
    busy, silent = (int(expert) for expert in layer.tokens.argsort(descending=True)[:2])
    calibrated = replace(layer, tokens=layer.tokens.clone())
    calibrated.tokens[silent] = 0
    moments = NeuronMoments({**moments.layers, prefix: calibrated}, moments.metadata)
    traffic = Traffic.load(recorded(moments, tmp_path))
    traffic.layers[prefix].tokens[busy] *= 3
    traffic.layers[prefix].tokens[silent] = 5
    served = as_served(moments, traffic)
    total, longer = (int(each.layers[prefix].tokens.sum()) for each in (moments, traffic))
    ratio = score(served, "fisher")[prefix][busy] / score(moments, "fisher")[prefix][busy]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3 * total / longer), rtol=1e-2, atol=0)
    assert served[prefix].tokens[silent] == 0, "so that --unrouted decides about it"


def test_nearest_mix(moments: NeuronMoments) -> None:
    """Traffic that is a mix of two sources is found to be that mix."""
    layers = moments.layers
    other = {
        prefix: replace(layer, tokens=layer.tokens.roll(1), activation_sq=layer.activation_sq.roll(1, 0))
        for prefix, layer in layers.items()
    }
    sources = {"code": layers, "chat": other}
    counts = {prefix: 300 * layer.tokens + 700 * other[prefix].tokens for prefix, layer in layers.items()}
    traffic = Traffic(
        {prefix: LayerTraffic(layers[prefix].activation_sq, tokens) for prefix, tokens in counts.items()},
        1,
        moments.metadata["base_fingerprint"],
    )
    match = match_traffic(NeuronMoments.of_sources(sources, moments.metadata), traffic)
    assert match.mix == pytest.approx({"code": 0.3, "chat": 0.7}, abs=1e-6) and match.mix_different < 1e-6
    different = {each.name: each.different for each in match.sources}
    assert different["code"] > different["chat"] > 0 and different.keys() == {"code", "chat", "all"}
    assert all(0 < each.by_chance < 1 for each in match.sources)


def test_commands(calibration: Path, moments: NeuronMoments, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    traffic = str(recorded(moments, tmp_path / "traffic", factor=2))
    assert main(["traffic", str(calibration), traffic]) == 0
    assert "0.0%" in capsys.readouterr().out
    assert main(["traffic", str(calibration), traffic, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["different"] == pytest.approx(0, abs=1e-9)
    command = ["prune", str(calibration), "--flops", "0.3"]
    assert main([*command, "-o", str(tmp_path / "plain")]) == 0
    assert main([*command, "--traffic", traffic, "-o", str(tmp_path / "masks")]) == 0
    plain, served = read_masks(tmp_path / "plain"), read_masks(tmp_path / "masks")
    assert all(served.keep[prefix].equal(keep) for prefix, keep in plain.keep.items())
    assert served.metadata["traffic"] == {"tokens": Traffic.load(Path(traffic)).tokens, "runs": 1}


def test_refused(moments: NeuronMoments, tmp_path: Path) -> None:
    with pytest.raises(HeaprError, match="holds no traffic; serve the model with HEAPR_TRAFFIC="):
        Traffic.load(tmp_path)
    traffic = Traffic.load(recorded(moments, tmp_path))
    with pytest.raises(HeaprError, match="of another model than the calibration"):
        match_traffic(moments, replace(traffic, base_fingerprint="routers:another"))
    prefix = next(iter(traffic.layers))
    traffic.layers[prefix].tokens.zero_()
    with pytest.raises(HeaprError, match="has no token for"):
        as_served(moments, traffic)
    short = {prefix: LayerTraffic(torch.ones(2, 3), torch.ones(2, dtype=torch.int64))}
    save_traffic(tmp_path / "b.safetensors", short, {"run": "b", "rank": 0, "base_fingerprint": None})
    with pytest.raises(HeaprError, match="holds traffic of different models"):
        Traffic.load(tmp_path)
    save_traffic(tmp_path / "b.safetensors", short, {"run": "a", "rank": 1, "ranks": 3})
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(HeaprError, match="lacks files of run a; bring those of all ranks"):
        Traffic.load(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(HeaprError, match="is damaged"):
        Traffic.load(tmp_path)
