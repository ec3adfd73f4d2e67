# SPDX-License-Identifier: Apache-2.0
"""The check of vLLM wheels: silent on the installed vLLM, loud on one that lacks what the plugin uses."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.sources import Sources
from tools.wheel_imports import check

SPEC = find_spec("vllm")
pytestmark = pytest.mark.skipif(SPEC is None, reason="vLLM is not installed")
MOE, QUANTIZATION = "model_executor/layers/fused_moe", "model_executor/layers/quantization"


class Edited(Sources):
    """The installed vLLM with one piece of text replaced."""

    def __init__(self, path: str = "", old: str = "", new: str = "") -> None:
        super().__init__(Path(SPEC.origin).parent.parent)
        self.path, self.old, self.new = path, old, new

    def read(self, path: str) -> str | None:
        text = super().read(path)
        if path != f"vllm/{self.path}":
            return text
        assert self.old in text
        return text.replace(self.old, self.new)


def test_installed_version() -> None:
    count, problems = check(Edited())
    assert not problems and count > 200


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        (
            f"{MOE}/all2all_utils.py",
            "def maybe_make_prepare_finalize(",
            "def make_prepare_finalize(",
            "all2all_utils has no maybe_make_prepare_finalize",
        ),
        (
            f"{MOE}/all2all_utils.py",
            "allow_new_interface: bool",
            "new_interface: bool",
            "no parameter allow_new_interface",
        ),
        (
            f"{MOE}/modular_kernel.py",
            "class FusedMoEActivationFormat(",
            "class ActivationFormat(",
            "modular_kernel has no FusedMoEActivationFormat",
        ),
        (
            f"{MOE}/modular_kernel.py",
            "def finalize_weight_and_reduce_impl(",
            "def weight_and_reduce(",
            "HeaprExperts lacks weight_and_reduce, abstract in FusedMoEExpertsModular",
        ),
        (
            f"{MOE}/modular_kernel.py",
            "workspace2: torch.Tensor,",
            "workspace2: torch.Tensor, stream: int,",
            "FusedMoEExpertsModular.apply is also given stream",
        ),
        (
            f"{MOE}/routed_experts.py",
            "def _expert_routing_tables(",
            "def _routing_tables(",
            "RoutedExperts has no _expert_routing_tables",
        ),
        (f"{MOE}/config.py", "intermediate_size: int\n", "ffn_size: int\n", "FusedMoEConfig has no intermediate_size"),
        (
            f"{QUANTIZATION}/base_config.py",
            "def get_quant_method(\n        self, layer: torch.nn.Module, prefix: str",
            "def get_quant_method(\n        self, module: torch.nn.Module, prefix: str",
            "QuantizationConfig.get_quant_method is also given module",
        ),
    ],
)
def test_missing_names_and_changed_signatures(path: str, old: str, new: str, problem: str) -> None:
    assert any(problem in line for line in check(Edited(path, old, new))[1])
