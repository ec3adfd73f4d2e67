# SPDX-License-Identifier: Apache-2.0
"""HEAPR_KERNEL: that kernel, or one line that says why not and what to do."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from heapr_vllm.errors import HeaprError
from heapr_vllm.formats.quantized import ExpertScheme
from heapr_vllm.model_executor.kernels import choice, cpu_native
from heapr_vllm.model_executor.kernels.cpu_compiled import build, extension
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
    for module in (cpu_native, cpu_compiled, triton):
        monkeypatch.setattr(module, "current_platform", platform)


def capture_graphs(monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode) -> None:
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode))
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)


def names(dtype: torch.dtype = torch.float32, hidden_size: int = 64, scheme: ExpertScheme | None = None) -> list[str]:
    return [kernel.name for kernel in choice.candidates(dtype, hidden_size, scheme)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HEAPR_KERNEL": "triton", "TRITON_INTERPRET": "1"}, ["triton"]),
        ({"HEAPR_KERNEL": "reference"}, ["reference"]),
        ({"HEAPR_KERNEL": "native"}, ["native"]),
        ({"HEAPR_KERNEL": "buckets"}, ["buckets"]),
        ({"HEAPR_KERNEL": "native", "HEAPR_CPU_KERNEL": "ragged"}, ["native"]),
        ({"HEAPR_KERNEL": "reference", "HEAPR_CPU_KERNEL": "native"}, ["reference"]),
        ({"HEAPR_KERNEL": "", "HEAPR_CPU_KERNEL": "native"}, ["native", "buckets"]),
        ({"HEAPR_CPU_KERNEL": "native", "HEAPR_CPU_BUCKETS": "always"}, ["buckets"]),
        ({"HEAPR_CPU_KERNEL": "native", "HEAPR_CPU_BUCKETS": "never"}, ["native"]),
        ({"HEAPR_CPU_KERNEL": "ragged"}, ["compiled"]),
        ({"HEAPR_CPU_KERNEL": "compiled", "HEAPR_CPU_BUCKETS": "always"}, ["compiled"]),
        ({"HEAPR_CPU_BUCKETS": "never"}, ["compiled", "native"]),
        ({"HEAPR_CPU_KERNEL": "typo"}, ["compiled", "native", "buckets"]),
        ({}, ["compiled", "native", "buckets"]),
    ],
)
def test_candidates(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: list[str]) -> None:
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert names() == expected


def test_candidates_that_fit_no_layer_or_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: True)
    assert names(hidden_size=48) == ["reference"], "panels are 32 columns wide, vLLM's op takes multiples of 32"
    assert names(scheme=ExpertScheme("float")) == ["compiled"], "vLLM's op does not decode"
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: False)
    monkeypatch.setenv("HEAPR_CPU_KERNEL", "compiled")
    assert names() == ["native", "buckets"], "an older wish gives way"
    assert names(scheme=ExpertScheme("int")) == ["reference"]


@pytest.mark.parametrize(
    ("isa", "has_vnni", "rounding"),
    [
        ("avx512", False, ["compiled"]),
        ("avx512", True, ["compiled_a8"]),
        ("avx512_bf16", True, ["compiled_a8"]),
        ("avx512_amx", True, ["compiled"]),
    ],
)
def test_time_does_not_decide_whether_activations_are_rounded(
    monkeypatch: pytest.MonkeyPatch, isa: str, has_vnni: bool, rounding: list[str]
) -> None:
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: True)
    monkeypatch.setattr(build, "has_vnni", lambda: has_vnni)
    monkeypatch.setattr(build, "isa", lambda: isa)
    assert names(torch.bfloat16, scheme=ExpertScheme("int")) == rounding
    assert names(torch.float32, scheme=ExpertScheme("int")) == ["compiled"]
    assert names(torch.bfloat16, scheme=ExpertScheme("float")) == ["compiled"]
    assert names(torch.bfloat16, scheme=ExpertScheme(group_size=256)) == ["compiled"]
    monkeypatch.setenv("HEAPR_CPU_KERNEL", "compiled")
    assert names(torch.bfloat16, scheme=ExpertScheme("int")) == ["compiled"]
    monkeypatch.delenv("HEAPR_CPU_KERNEL")
    monkeypatch.setenv("HEAPR_KERNEL", "compiled")
    assert names(torch.bfloat16, scheme=ExpertScheme("int")) == ["compiled"]


def test_candidates_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    assert names() == ["triton"]
    assert names(torch.bfloat16, scheme=ExpertScheme("int")) == ["triton"], "rounded activations are not timed there"


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_four_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    on(monkeypatch, GPU)
    capture_graphs(monkeypatch, CUDAGraphMode.NONE)
    monkeypatch.setenv("HEAPR_KERNEL", kernel)
    assert names(torch.bfloat16, 64, ExpertScheme(num_bits=4, group_size=64)) == [kernel]


def test_four_bits_of_a_hidden_size_without_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    monkeypatch.setenv("HEAPR_KERNEL", "triton")
    message = "int4 experts on GPUs need a hidden size in multiples of 64, not 96; use --quantize int8"
    with pytest.raises(HeaprError, match=message):
        names(torch.bfloat16, 96, ExpertScheme(num_bits=4, group_size=32))


def test_kernels_of_one_width_get_all_experts_in_that_of_down(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    assert names(torch.bfloat16, scheme=ExpertScheme("int", num_bits=4, down_bits=8)) == ["triton"]
    widths = {name: kernel.takes_two_widths for name, kernel in choice.kernels().items()}
    assert {name for name, takes in widths.items() if takes} == {"compiled_a8", "compiled", "reference"}


@pytest.mark.skipif(not extension.load(), reason="no C++ compiler")
def test_own_op_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEAPR_KERNEL", "ragged")
    assert names() == ["compiled"], "its former name"


def test_forced_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    capture_graphs(monkeypatch, CUDAGraphMode.NONE)
    for kernel in ("triton", "reference"):
        monkeypatch.setenv("HEAPR_KERNEL", kernel)
        assert names(torch.bfloat16) == [kernel]
    monkeypatch.setenv("HEAPR_KERNEL", "triton_a8")
    assert names(torch.bfloat16, scheme=ExpertScheme("int")) == ["triton_a8"]
    with pytest.raises(HeaprError, match="experts in 8 bits, not unquantized ones; choose triton"):
        names(torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "cuda",
            "HEAPR_KERNEL=cuda is no kernel; choose from triton, triton_a8, compiled_a8, compiled, native, buckets, ",
        ),
        ("triton", "HEAPR_KERNEL=triton cannot run here: there is no GPU; set TRITON_INTERPRET=1"),
    ],
)
def test_refused_before_any_worker_starts(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("HEAPR_KERNEL", name)
    for ask in (choice.forced_kernel, names):
        with pytest.raises(HeaprError, match=message):
            ask()


def test_refused_without_triton_or_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cpu_compiled, "can_run", lambda: False)
    for name, message in (("triton", "there is no Triton"), ("compiled", "cannot be compiled")):
        monkeypatch.setenv("HEAPR_KERNEL", name)
        with pytest.raises(HeaprError, match=message):
            choice.forced_kernel()


@pytest.mark.parametrize("name", ["compiled", "native"])
def test_kernels_of_cpus_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on(monkeypatch, GPU)
    monkeypatch.setenv("HEAPR_KERNEL", name)
    with pytest.raises(HeaprError, match="it is for CPUs; choose triton"):
        choice.forced_kernel()


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
        names(dtype, hidden_size)


def test_reference_needs_an_eager_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads its tables on the host."""
    on(monkeypatch, GPU)
    capture_graphs(monkeypatch, CUDAGraphMode.PIECEWISE)
    monkeypatch.setenv("HEAPR_KERNEL", "reference")
    with pytest.raises(HeaprError, match="add --enforce-eager"):
        names()
