"""A layer in eager code, of the small operators that its graph has: both then agree to the bit."""

from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest import mock

import torch


def as_traced(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            return call(*args, **kwargs)

    return called
