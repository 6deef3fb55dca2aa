"""What torch.compile is told about this package's functions, without importing its compiler.

The decorators of `torch.compiler` import all of torch._dynamo where they are written: as long
again as torch itself, for everybody who never compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(fn: Function) -> Function:
    """Let traced code take the answer of `fn` instead of looking inside.

    For what cannot be traced and is one for the whole process: the environment, an import, a
    compiler. It is `torch.compiler.assume_constant_result`.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def never_traced(fn: Function) -> Function:
    """Let traced code call `fn` as it is. It is `torch.compiler.disable`, applied when called."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> object:
        return torch.compiler.disable(fn)(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(Function, call)
