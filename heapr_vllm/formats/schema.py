# SPDX-License-Identifier: Apache-2.0
"""JSON that anybody may have written, checked against types where it is read.

msgspec does the checking: it takes the dataclasses that the code uses anyway, is strict (no "1" for 1), names the path
of what is wrong, refuses NaN, and depends on nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from heapr_vllm.errors import HeaprError, first_line

MAX_BYTES = 256 * 2**20  # an index of a million tensors has about 100 MB
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # of tokens, bytes or neurons
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

Kind = TypeVar("Kind")


def read_json(path: Path, kind: type[Kind], remedy: str) -> Kind:
    """Reads a file of JSON as `kind`. Raises HeaprError, with the `remedy`, if it is damaged or of another shape."""
    if path.stat().st_size > MAX_BYTES:
        raise HeaprError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no such file is; {remedy}")
    return parse_json(path.read_bytes(), kind, str(path), remedy)


def parse_json(text: bytes | str, kind: type[Kind], where: str, remedy: str) -> Kind:
    """Does as `read_json` with the content of a file; `where` names it in errors."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, HeaprError, ValueError, RecursionError) as error:
        raise _damaged(where, error, remedy) from error


def convert(value: Any, kind: type[Kind], where: str, remedy: str, *, strict: bool = True) -> Kind:
    """Does as `read_json` with values that another library has parsed: of JSON, or texts alone (`strict` false)."""
    try:
        return msgspec.convert(value, type=kind, strict=strict)
    except (msgspec.MsgspecError, HeaprError, ValueError, RecursionError) as error:
        raise _damaged(where, error, remedy) from error


def _damaged(where: str, error: BaseException, remedy: str) -> HeaprError:
    if isinstance(error, HeaprError):
        return HeaprError(f"{where}: {error}")
    return HeaprError(f"{where} is damaged ({first_line(error)}); {remedy}")
