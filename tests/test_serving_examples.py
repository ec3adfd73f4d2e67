# SPDX-License-Identifier: Apache-2.0
"""Deployment examples: what can be told without a cluster, a registry or a network."""

import argparse
import re
import shlex
import tomllib
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from heapr_vllm.environment import is_supported

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "serving_examples"
DOCKERFILE = (EXAMPLES / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dockerfile_version() -> str:
    return re.search(r"^ARG VLLM_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[1]


def pip_arguments() -> list[str]:
    """What the Dockerfile gives to `uv pip install`."""
    command = re.search(r"^RUN uv pip install (.+?) &&", DOCKERFILE, re.MULTILINE)[1]
    return shlex.split(command)


def ray_config() -> dict[str, Any]:
    (application,) = yaml.safe_load((EXAMPLES / "ray_serve" / "heapr.yaml").read_text())["applications"]
    (config,) = application["args"]["llm_configs"]
    return config


def model_spec() -> dict[str, Any]:
    (spec,) = yaml.safe_load((EXAMPLES / "kubernetes" / "values.yaml").read_text())["servingEngineSpec"]["modelSpec"]
    return spec


def test_dockerfile_builds_on_a_supported_engine_and_copies_what_the_package_needs() -> None:
    assert is_supported(dockerfile_version())
    assert all(is_supported(v) for v in re.findall(r"VLLM_VERSION=([\d.]+)", DOCKERFILE))
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert {"heapr_vllm", "pyproject.toml", PYPROJECT["readme"], *PYPROJECT["license-files"]} <= copied
    assert all((ROOT / name).exists() for name in copied)


def test_nothing_replaces_the_engine_or_torch() -> None:
    """Both ways of adding the plugin install the same and ask for no dependencies."""
    pip = ray_config()["runtime_env"]["pip"]
    assert "--no-deps" in pip_arguments() and pip["pip_install_options"] == ["--no-deps"]
    added = [argument for argument in pip_arguments() if not argument.startswith(("-", "/"))]
    plugin, *others = pip["packages"]
    assert others == added
    assert Path(plugin).name == f"{PYPROJECT['name'].replace('-', '_')}-{PYPROJECT['version']}-py3-none-any.whl"
    assert set(added) <= set(PYPROJECT["dependencies"]), "the bounds are those of pyproject.toml"


def test_kubernetes_runs_the_image_that_the_dockerfile_builds() -> None:
    spec = model_spec()
    assert f"{spec['repository']}:{spec['tag']}" in (EXAMPLES / "kubernetes" / "values.yaml").read_text()
    assert spec["tag"] == f"v{dockerfile_version()}" and f"vllm-openai-heapr:{spec['tag']}" in DOCKERFILE
    required = {
        "name": str,
        "repository": str,
        "tag": str,
        "modelURL": str,
        "replicaCount": int,
        "requestCPU": int,
        "requestMemory": str,
        "requestGPU": int,
        "vllmConfig": dict,
    }
    assert {key: type(spec[key]) for key in required} == required


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_engine_options_exist() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert set(ray_config()["engine_kwargs"]) <= {field.name for field in fields(EngineArgs)}
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    names = {re.sub("([A-Z])", r"_\1", key).lower(): value for key, value in model_spec()["vllmConfig"].items()}
    flags = [
        part
        for name, value in names.items()
        for part in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]
    parsed: argparse.Namespace = parser.parse_args(flags)
    assert all(getattr(parsed, name) == value for name, value in names.items())
