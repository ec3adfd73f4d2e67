# SPDX-License-Identifier: Apache-2.0
"""The CPU op built ahead of time, as a wheel holds it, with its AMX path: without AMX, brgemm runs on AVX-512."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from heapr_vllm.model_executor.kernels.cpu_compiled import build
from tests.model_executor.engine import ROOT

SCRIPT = """if True:
    import sys
    from pathlib import Path
    import torch
    import heapr_vllm
    from heapr_vllm.model_executor.kernels.cpu_compiled import extension
    assert Path(sys.argv[1]) in Path(heapr_vllm.__file__).parents
    assert extension.load(), "the shipped library was not taken"
    from heapr_vllm.model_executor.kernels.cpu_compiled.kernel import CompiledKernel
    from tests.model_executor.kernels.test_op import CASES, layer
    for case in CASES:
        dense = layer(case, torch.bfloat16, CompiledKernel())
        output = dense.run()
        assert (output - dense.expected).norm() <= 1e-2 * dense.expected.norm(), case
        assert torch.equal(output, dense.run()), case
    print("all equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not build.isa().startswith("avx512"), reason="PyTorch's brgemm wants AVX-512 for bfloat16")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_a_wheel_can_hold_the_op(tmp_path: Path) -> None:
    environment = {**os.environ, "HEAPR_BUILD_CPU_OP": "1", "HEAPR_CPU_CFLAGS": "-DHEAPR_AMX"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_py",
        "--build-lib",
        str(tmp_path / "lib"),
        "egg_info",
        "--egg-base",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    environment |= {
        "PYTHONPATH": f"{tmp_path / 'lib'}:{ROOT}",
        "CXX": "no-such-compiler",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "lib")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("all equal\n"), done.stdout + done.stderr[-3000:]
