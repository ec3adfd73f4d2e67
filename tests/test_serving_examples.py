# SPDX-License-Identifier: Apache-2.0
"""Deployment examples: what can be told without a cluster, a registry or a network."""

import argparse
import json
import re
import shlex
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from heapr_vllm.environment import is_supported

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "serving_examples"
RAY_APPLICATION = (EXAMPLES / "ray_serve" / "application.py").read_text()
DOCKERFILE = (EXAMPLES / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dockerfile_version() -> str:
    return re.search(r"^ARG VLLM_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[1]


def pip_arguments() -> list[str]:
    """What the Dockerfile gives to `uv pip install`."""
    command = re.search(r"^RUN uv pip install (.+?) &&", DOCKERFILE, re.MULTILINE)[1]
    return shlex.split(command)


def kubernetes_values() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "kubernetes" / "values.yaml").read_text())


def model_spec() -> dict[str, Any]:
    (spec,) = kubernetes_values()["servingEngineSpec"]["modelSpec"]
    return spec


def closed(schema: Any) -> Any:
    """The same schema, which refuses names it does not know; the chart passes over them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in inner else inner


def test_dockerfile_builds_on_a_supported_engine_and_copies_what_the_package_needs() -> None:
    assert is_supported(dockerfile_version())
    assert all(is_supported(v) for v in re.findall(r"VLLM_VERSION=([\d.]+)", DOCKERFILE))
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert {"heapr_vllm", "pyproject.toml", PYPROJECT["readme"], *PYPROJECT["license-files"]} <= copied
    assert all((ROOT / name).exists() for name in copied)


def test_nothing_replaces_the_engine_or_torch() -> None:
    """Both ways of adding the plugin install the same and ask for no dependencies."""
    added = [argument for argument in pip_arguments() if not argument.startswith(("-", "/"))]
    assert "--no-deps" in pip_arguments() and '"pip_install_options": ["--no-deps"]' in RAY_APPLICATION
    assert f"PLUGIN_REQUIREMENTS = {json.dumps(added)}" in RAY_APPLICATION
    assert f"{PYPROJECT['name'].replace('-', '_')}-{PYPROJECT['version']}-py3-none-any.whl" in RAY_APPLICATION
    assert set(added) <= set(PYPROJECT["dependencies"]), "the bounds are those of pyproject.toml"


def test_kubernetes_runs_the_image_that_the_dockerfile_builds() -> None:
    spec = model_spec()
    assert f"{spec['repository']}:{spec['tag']}" in (EXAMPLES / "kubernetes" / "values.yaml").read_text()
    assert spec["tag"] == f"v{dockerfile_version()}" and f"vllm-openai-heapr:{spec['tag']}" in DOCKERFILE


def test_kubernetes_values_follow_the_charts_schema() -> None:
    schema = json.loads((ROOT / "tests" / "vllm_stack" / "values.schema.json").read_text())
    validator = Draft202012Validator(closed(schema))
    validator.check_schema(schema)
    assert not list(validator.iter_errors(kubernetes_values()))
    for name, value in {"replicaCounts": 2, "requestMemory": 64}.items():
        spec = model_spec() | {name: value}
        assert not validator.is_valid({"servingEngineSpec": {"modelSpec": [spec]}}), name


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_engine_options_exist() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    names = {re.sub("([A-Z])", r"_\1", key).lower(): value for key, value in model_spec()["vllmConfig"].items()}
    flags = [
        part
        for name, value in names.items()
        for part in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]
    parsed: argparse.Namespace = parser.parse_args(flags)
    assert all(getattr(parsed, name) == value for name, value in names.items())
