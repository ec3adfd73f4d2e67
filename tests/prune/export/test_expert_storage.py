# SPDX-License-Identifier: Apache-2.0
"""`heapr export --quantize`: kept codes are the base model's, and every choice has the size and values it promises."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats import sizes
from heapr_vllm.formats.checkpoint import Checkpoint
from heapr_vllm.formats.masks import NeuronMasks
from heapr_vllm.formats.names import ExpertTensor
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.formats.reader import TensorReader
from heapr_vllm.model_executor.quantization import HeaprConfig
from heapr_vllm.prune import export_checkpoint, write_masks_repository
from heapr_vllm.prune.export.masks_repository import read_pruning_config
from heapr_vllm.prune.models.experts import expert_modules
from heapr_vllm.prune.models.loading import load_model
from heapr_vllm.prune.models.pruned import applied, opened
from heapr_vllm.prune.repair.fit import RepairSettings
from heapr_vllm.prune.report.summary import load_report
from tests import quantized_models

LAYER = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module", params=quantized_models.FORMATS)
def sibling(request: pytest.FixtureRequest, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen3` in a format of base models."""
    return quantized_models.quantized(qwen3, tmp_path_factory.mktemp(request.param) / "base", request.param)


def kept(masks: NeuronMasks, where: ExpertTensor, tensor: torch.Tensor) -> torch.Tensor:
    keep = masks.keep[where.prefix][where.expert]
    return tensor[:, keep] if where.shard == "w2" else tensor[keep]


def values(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights in float32, codes dequantised."""
    opened_checkpoint = Checkpoint(checkpoint)
    with TensorReader(opened_checkpoint, torch.float32) as reader:
        names = [name for name in opened_checkpoint.weight_map if opened_checkpoint.weight_of(name) is None]
        return {name: reader.tensor(name) for name in names}


def test_kept_codes_are_the_bases(sibling: Path, masks_repository: Path, tmp_path: Path) -> None:
    """Codes bit by bit, values bit by bit, and all that is not an expert as it was.

    But for down_proj of 4 bits, which is rounded to 8: half a step of 1/127 of the largest of a group.
    """
    export_checkpoint(masks_repository, tmp_path / "compact", model=str(sibling))
    masks = NeuronMasks.from_pretrained(masks_repository)
    base, found = load_file(sibling / "model.safetensors"), load_file(tmp_path / "compact" / "model.safetensors")
    base_values, found_values = values(sibling), values(tmp_path / "compact")
    experts = 0
    for name, value in base_values.items():
        where = ExpertTensor.parse(name)
        if where is None:
            continue
        wanted = kept(masks, where, value)
        if name in base:
            codes = kept(masks, where, base[name].view(torch.uint8)).view(base[name].dtype)
            assert quantized_models.same_bits(found[name], codes)
        if name in base or where.shard != "w2":
            assert torch.equal(found_values[name], wanted)
        else:
            half_steps = found[f"{name}_scale"].repeat_interleave(quantized_models.BLOCK, 0) / 2
            assert bool(((found_values[name] - wanted).abs() <= half_steps * 1.0001).all())
        experts += 1
    for name, tensor in base.items():
        if ".experts." not in name:
            assert found[name].dtype == tensor.dtype and found[name].view(torch.uint8).equal(tensor.view(torch.uint8))
    assert experts == 3 * 3 * 8
    pruning = read_pruning_config(tmp_path / "compact")
    assert pruning.inner == Checkpoint(sibling).quantization
    assert pruning.expert_scheme == Checkpoint(sibling).expert_quantization.scheme(64)


def test_none_writes_the_values(sibling: Path, masks_repository: Path, tmp_path: Path) -> None:
    masks = NeuronMasks.from_pretrained(masks_repository)
    for layout in ("compact", "zeroed"):
        output = tmp_path / layout
        export_checkpoint(masks_repository, output, model=str(sibling), layout=layout, quantize="none")
        assert Checkpoint(output).base_quantization is None
        found, wanted = load_file(output / "model.safetensors"), values(sibling)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            where = ExpertTensor.parse(name)
            expected = kept(masks, where, tensor) if where else tensor
            actual = kept(masks, where, found[name]) if where and layout == "zeroed" else found[name]
            assert torch.equal(actual, expected), "in float32, as the model computes"


def test_zeroed_codes_are_a_model_of_the_bases_format(sibling: Path, masks_repository: Path, tmp_path: Path) -> None:
    arguments = {"model": str(sibling), "layout": "zeroed", "quantize": "keep"}
    if Checkpoint(sibling).packed:
        with pytest.raises(HeaprError, match="--layout compact, or --quantize none"):
            export_checkpoint(masks_repository, tmp_path / "zeroed", **arguments)
        return
    export_checkpoint(masks_repository, tmp_path / "zeroed", **arguments)
    zeroed = Checkpoint(tmp_path / "zeroed")
    assert zeroed.quantization == Checkpoint(sibling).quantization
    masks = NeuronMasks.from_pretrained(masks_repository)
    found, wanted = values(zeroed.path), values(sibling)
    for name, tensor in wanted.items():
        where = ExpertTensor.parse(name)
        if where is not None:
            removed = replace(masks, keep={prefix: ~keep for prefix, keep in masks.keep.items()})
            assert torch.equal(kept(masks, where, found[name]), kept(masks, where, tensor))
            assert not kept(removed, where, found[name]).any()


@pytest.mark.parametrize("stored", ["gptq", "awq", "w4a16", "int8-channel"])
def test_codes_of_some_experts_are_not_kept(stored: str, masks_repository: Path, qwen3: Path, tmp_path: Path) -> None:
    """A layer may be left out of a quantization: nothing is rounded unasked, and what the message names works."""
    base = quantized_models.quantized(qwen3, tmp_path / "base", stored, excluded=LAYER)
    message = rf"{LAYER}.0.down_proj.weight is F32 and other experts are codes.*--quantize int8"
    for choice in ("keep", None):
        with pytest.raises(HeaprError, match=message):
            export_checkpoint(masks_repository, tmp_path / "kept", model=str(base), quantize=choice)
    config = HeaprConfig(read_pruning_config(masks_repository))
    config.bases[None], config.hidden_size = Checkpoint(base), 64
    with pytest.raises(HeaprError, match=message):
        config.storage_formats()
    for choice in ("int8", "fp8", "int4", "none"):
        export_checkpoint(masks_repository, tmp_path / choice, model=str(base), quantize=choice)
    masks = NeuronMasks.from_pretrained(masks_repository)
    found, whole = values(tmp_path / "none"), values(base)
    for name in filter(ExpertTensor.parse, whole):
        assert torch.equal(found[name], kept(masks, ExpertTensor.parse(name), whole[name]))


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_experts_are_rounded(name: str, sibling: Path, masks_repository: Path, tmp_path: Path) -> None:
    """Of an unquantized model and of one in another format; the rest stays as it is there."""
    masks = NeuronMasks.from_pretrained(masks_repository)
    scheme = ExpertScheme.for_hidden_size(name, 64)
    export_checkpoint(masks_repository, tmp_path / "compact", model=str(sibling), quantize=name)
    found = load_file(tmp_path / "compact" / "model.safetensors")
    with TensorReader(Checkpoint(sibling), torch.float32) as reader:
        for tensor_name in filter(ExpertTensor.parse, reader.checkpoint.weight_map):
            where = ExpertTensor.parse(tensor_name)
            codes, scale = scheme.quantize(kept(masks, where, reader.tensor(tensor_name)), where.shard)
            assert quantized_models.same_bits(found[tensor_name], codes)
            assert torch.equal(found[f"{tensor_name}_scale"], scale)
    assert read_pruning_config(tmp_path / "compact").inner == Checkpoint(sibling).quantization


@pytest.mark.filterwarnings("ignore:.*experts to repair see fewer tokens")
@pytest.mark.parametrize("stored", ["fp8-channel", "gptq", "awq"])
def test_repaired_weights_are_rounded_last(stored: str, masks_repository: Path, qwen3: Path, tmp_path: Path) -> None:
    base = quantized_models.quantized(qwen3, tmp_path / "base", stored)
    outputs = {}
    for quantize in ("keep", "none"):
        outputs[quantize] = tmp_path / quantize
        export_checkpoint(
            masks_repository, outputs[quantize], model=str(base), repair=RepairSettings(), quantize=quantize
        )
    codes = load_file(outputs["keep"] / "model.safetensors")
    whole, refitted, rounded = values(base), values(outputs["none"]), values(outputs["keep"])
    masks = NeuronMasks.from_pretrained(masks_repository)
    scheme = Checkpoint(base).expert_quantization.scheme(64)
    changed = 0
    for name in filter(ExpertTensor.parse, whole):
        where = ExpertTensor.parse(name)
        if where.shard == "w2":
            expected = scheme.quantize(refitted[name], "w2")[0]
            assert quantized_models.same_bits(codes[name], expected)
            value = refitted[name].abs()
            bound = 2e-3 + (value.amax(0) / 250 if scheme.type == "int" else value / 15)
            assert bool(((rounded[name] - refitted[name]).abs() <= bound).all()), "of the neuron's largest, or its own"
            changed += not torch.equal(refitted[name], kept(masks, where, whole[name]))
        else:
            assert torch.equal(rounded[name], kept(masks, where, whole[name]))
    assert changed > 8


def test_sizes(calibration: Path, awkward_masks: NeuronMasks, qwen3: Path, tmp_path: Path) -> None:
    """What is said before the export is what is written."""
    for name in ("int8", "fp8", "int4"):
        scheme = ExpertScheme.for_hidden_size(name, 64)
        write_masks_repository(awkward_masks, calibration, tmp_path / name, scheme=scheme)
        predicted = load_report(tmp_path / name)
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-compact")
        written = load_report(tmp_path / f"{name}-compact")
        assert predicted.experts == written.experts == name
        assert predicted.compact_bytes == written.compact_bytes
        assert written.compact_bytes == sizes.num_bytes(Checkpoint(tmp_path / f"{name}-compact"))
        assert name in (tmp_path / f"{name}-compact" / "README.md").read_text()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_masks_and_checkpoint_are_evaluated_alike(
    name: str, calibration: Path, awkward_masks: NeuronMasks, qwen3: Path, tmp_path: Path
) -> None:
    """Masks with `experts` compute in transformers what the exported checkpoint computes."""
    scheme = ExpertScheme.for_hidden_size(name, 64)
    write_masks_repository(awkward_masks, calibration, tmp_path / "masks", scheme=scheme)
    export_checkpoint(tmp_path / "masks", tmp_path / "compact")
    tokens = torch.arange(20)[None]
    logits = []
    for folder in ("masks", "compact"):
        with opened(Checkpoint(tmp_path / folder), "float32", "cpu") as (model, _), torch.no_grad():
            logits.append(model(tokens).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    with applied(awkward_masks, load_model(Checkpoint(qwen3), "float32", "cpu")) as model, torch.no_grad():
        assert (model(tokens).logits - logits[1]).abs().max() > 1e-3, "it does round"


def over(base: Path, masks_repository: Path, folder: Path) -> Checkpoint:
    """The same masks, said to be of another base model, its sibling."""
    shutil.copytree(masks_repository, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["base_model"]["name_or_path"] = str(base)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def test_masks_over_codes_are_evaluated_as_they_are_served(
    sibling: Path, masks_repository: Path, tmp_path: Path
) -> None:
    """Every weight is that of the exported checkpoint, so down_proj of 4 bits is that of 8."""
    export_checkpoint(masks_repository, tmp_path / "compact", model=str(sibling))
    compact, masks = Checkpoint(tmp_path / "compact"), over(sibling, masks_repository, tmp_path / "masks")
    with opened(compact, "float32", "cpu") as (exported, _), opened(masks, "float32", "cpu") as (masked, found):
        expected = exported.state_dict()
        assert masked.state_dict().keys() == expected.keys()
        for name, weight in masked.state_dict().items():
            prefix, _, matrix = name.rpartition(".")
            rows = found.keep[prefix].repeat(1, 2) if matrix == "gate_up_proj" else ...
            assert torch.equal(weight[rows], expected[name][rows]), name


def test_codes_of_some_experts_are_evaluated_as_they_are(masks_repository: Path, qwen3: Path, tmp_path: Path) -> None:
    """Nothing serves their masks, so nothing is rounded."""
    base = quantized_models.quantized(qwen3, tmp_path / "base", "gptq", excluded=LAYER)
    masks = over(base, masks_repository, tmp_path / "masks")
    with opened(masks, "float32", "cpu") as (model, found):
        whole, keep = values(base), found.keep
        for prefix, experts in expert_modules(model).items():
            for expert, down in enumerate(experts.down_proj):
                kept_columns = keep[prefix][expert]
                expected = whole[f"{prefix}.{expert}.down_proj.weight"][:, kept_columns]
                assert torch.equal(down[:, kept_columns], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "keep"}, "has no codes to keep"),
        ({"quantize": "int3"}, "not one of none, keep, int8, fp8, int4"),
        ({"quantize": "int8", "layout": "zeroed"}, "--layout compact, or --quantize none"),
    ],
)
def test_refused(arguments: dict, message: str, masks_repository: Path, tmp_path: Path) -> None:
    with pytest.raises(HeaprError, match=message):
        export_checkpoint(masks_repository, tmp_path / "output", **arguments)
    assert not (tmp_path / "output").exists()
