# SPDX-License-Identifier: Apache-2.0
"""The check of vLLM wheels: silent on the installed vLLM, loud on one that lacks what the plugin uses."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.wheel_imports import check, unpack

SPEC = find_spec("vllm")
pytestmark = pytest.mark.skipif(SPEC is None, reason="vLLM is not installed")
MOE, QUANTIZATION = "model_executor/layers/fused_moe", "model_executor/layers/quantization"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed vLLM, which tests leave as they found it."""
    folder = tmp_path_factory.mktemp("sources")
    unpack(Path(SPEC.origin).parent.parent, folder)
    return folder


def test_installed_version(sources: Path) -> None:
    assert not check(sources)


def test_other_wheels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no vLLM"):
        unpack(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        (
            f"{MOE}/all2all_utils.py",
            "def maybe_make_prepare_finalize(",
            "def make_prepare_finalize(",
            "all2all_utils` has no member `maybe_make_prepare_finalize`",
        ),
        (
            f"{MOE}/all2all_utils.py",
            "allow_new_interface: bool",
            "new_interface: bool",
            "Argument `allow_new_interface` does not match any known parameter",
        ),
        (
            f"{MOE}/modular_kernel.py",
            "class FusedMoEActivationFormat(",
            "class ActivationFormat(",
            "modular_kernel` has no member `FusedMoEActivationFormat`",
        ),
        (
            f"{MOE}/modular_kernel.py",
            "def finalize_weight_and_reduce_impl(",
            "def weight_and_reduce(",
            "Cannot instantiate `HeaprExperts` with unimplemented abstract method `weight_and_reduce`",
        ),
        (
            f"{MOE}/modular_kernel.py",
            "workspace2: torch.Tensor,",
            "workspace2: torch.Tensor, stream: int,",
            "Definition is incompatible with `FusedMoEExpertsModular.apply`",
        ),
        (
            f"{MOE}/routed_experts.py",
            "def _expert_routing_tables(",
            "def _routing_tables(",
            "attribute `_expert_routing_tables` on type `PrunedLayer`",
        ),
        (
            f"{MOE}/routed_experts.py",
            "self.global_num_experts = ",
            "self.num_global_experts = ",
            "attribute `global_num_experts` on type `PrunedLayer`",
        ),
        (
            f"{MOE}/config.py",
            "intermediate_size: int\n",
            "ffn_size: int\n",
            "`FusedMoEConfig` has no attribute `intermediate_size`",
        ),
        (
            f"{QUANTIZATION}/base_config.py",
            "def get_quant_method(\n        self, layer: torch.nn.Module, prefix: str",
            "def get_quant_method(\n        self, module: torch.nn.Module, prefix: str",
            "Definition is incompatible with `QuantizationConfig.get_quant_method`",
        ),
        ("platforms/interface.py", "def is_cpu(", "def is_host(", "has no attribute `is_cpu`"),
    ],
)
def test_missing_names_and_changed_signatures(sources: Path, path: str, old: str, new: str, problem: str) -> None:
    file = sources / "vllm" / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    try:
        assert any(problem in line for line in check(sources))
    finally:
        file.write_text(text)
