# SPDX-License-Identifier: Apache-2.0
"""HEAPR_KERNEL: that kernel, or one line that says why not and what to do."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError
from heapr_vllm.model_executor.kernels import choice, cpu_native
from heapr_vllm.model_executor.kernels.cpu_compiled import extension
from heapr_vllm.model_executor.kernels.cpu_compiled import kernel as cpu_compiled
from heapr_vllm.model_executor.kernels.triton import kernel as triton

current_platform.import_kernels()
CPU = SimpleNamespace(is_cpu=lambda: True, is_cuda_alike=lambda: False)
GPU = SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: True)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the interpreter."""
    for name in ("HEAPR_KERNEL", "HEAPR_CPU_KERNEL", "HEAPR_CPU_BUCKETS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    on(monkeypatch, CPU)


def on(monkeypatch: pytest.MonkeyPatch, platform: SimpleNamespace) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    for module in (choice, cpu_native, cpu_compiled, triton):
        monkeypatch.setattr(module, "current_platform", platform)


def capture_graphs(monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode) -> None:
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)


@pytest.mark.parametrize(
    ("environment", "kernel"),
    [
        ({"HEAPR_KERNEL": "triton", "TRITON_INTERPRET": "1"}, "triton"),
        ({"HEAPR_KERNEL": "reference"}, "reference"),
        ({"HEAPR_KERNEL": "native"}, "native"),
        ({"HEAPR_KERNEL": "native", "HEAPR_CPU_KERNEL": "ragged"}, "native"),
        ({"HEAPR_KERNEL": "reference", "HEAPR_CPU_KERNEL": "native"}, "reference"),
        ({"HEAPR_KERNEL": "", "HEAPR_CPU_KERNEL": "native"}, "native"),
    ],
)
def test_forced(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kernel: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choice.select_kernel(torch.float32, 64).name == kernel


@pytest.mark.skipif(not extension.load(), reason="no C++ compiler")
def test_own_op_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEAPR_KERNEL", "ragged")
    assert choice.select_kernel(torch.float32, 64).name == "compiled", "its former name"


def test_forced_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    capture_graphs(monkeypatch, CUDAGraphMode.NONE)
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("HEAPR_KERNEL", kernel)
        assert choice.select_kernel(torch.bfloat16, 64).name == kernel == choice.kernel_choice()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "HEAPR_KERNEL=cuda is no kernel; choose from triton, compiled, native, reference, or unset it"),
        ("triton", "HEAPR_KERNEL=triton cannot run here: there is no GPU; set TRITON_INTERPRET=1"),
    ],
)
def test_refused_before_any_worker_starts(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("HEAPR_KERNEL", name)
    for ask in (choice.kernel_choice, lambda: choice.select_kernel(torch.float32, 64)):
        with pytest.raises(HeaprError, match=message):
            ask()


def test_refused_without_triton_or_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: False)
    for name, message in (("triton", "there is no Triton"), ("compiled", "cannot be compiled")):
        monkeypatch.setenv("HEAPR_KERNEL", name)
        with pytest.raises(HeaprError, match=message):
            choice.kernel_choice()


@pytest.mark.parametrize("name", ["compiled", "native"])
def test_kernels_of_cpus_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on(monkeypatch, GPU)
    monkeypatch.setenv("HEAPR_KERNEL", name)
    with pytest.raises(HeaprError, match="it is for CPUs; choose triton"):
        choice.kernel_choice()


@pytest.mark.parametrize(
    ("name", "dtype", "hidden_size", "message"),
    [
        ("triton", torch.float32, 40, "the hidden size 40 is no multiple of 16"),
        ("triton", torch.bfloat16, 64, "interpreter gets bfloat16 wrong; add --dtype float32"),
        ("compiled", torch.float32, 48, "the hidden size 48 is no multiple of 32"),
        ("native", torch.float32, 48, "hidden size in multiples of 32"),
    ],
)
def test_layers_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, hidden_size: int, message: str
) -> None:
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HEAPR_KERNEL", name)
    with pytest.raises(HeaprError, match=message):
        choice.select_kernel(dtype, hidden_size)


def test_reference_needs_an_eager_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads its tables on the host."""
    on(monkeypatch, GPU)
    capture_graphs(monkeypatch, CUDAGraphMode.PIECEWISE)
    monkeypatch.setenv("HEAPR_KERNEL", "reference")
    with pytest.raises(HeaprError, match="add --enforce-eager"):
        choice.select_kernel(torch.float32, 64)


def test_compiled_graphs_are_not_shared_between_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernel_choice` is a part of the key of vLLM's cache; native graphs also hold stored widths."""
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choices = set()
    for kernel, buckets in (
        ("triton", ""),
        ("compiled", ""),
        ("reference", ""),
        ("native", "always"),
        ("native", "never"),
    ):
        monkeypatch.setenv("HEAPR_KERNEL", kernel)
        monkeypatch.setenv("HEAPR_CPU_BUCKETS", buckets)
        choices.add(choice.kernel_choice())
    assert len(choices) == 5
