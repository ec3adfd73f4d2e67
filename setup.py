# SPDX-License-Identifier: Apache-2.0
"""Everything is in pyproject.toml, except the compiled CPU op, which a wheel holds on request:

    HEAPR_BUILD_CPU_OP=1 pip wheel --no-build-isolation --no-deps -w dist .

It is built for this machine's CPU and the PyTorch installed here; on others it is compiled on first use.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

HAS_OP = os.environ.get("HEAPR_BUILD_CPU_OP") == "1"
FOLDER = Path("heapr_vllm", "model_executor", "kernels", "cpu_compiled")


class BuildWithOp(build_py):
    def run(self) -> None:
        super().run()
        if HAS_OP:
            spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
            build = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(build)
            build.build(Path(self.build_lib) / FOLDER)


class MaybeBinary(Distribution):
    def has_ext_modules(self) -> bool:
        return HAS_OP


setup(cmdclass={"build_py": BuildWithOp}, distclass=MaybeBinary)
