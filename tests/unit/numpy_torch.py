"""As much of torch as hooks need, on numpy: tensors, and modules with forward hooks. For machines without torch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class Tensor(np.ndarray):
    """An array with a tensor's methods."""

    device = "cpu"

    def to(self, dtype: Any) -> Tensor:
        return self.astype(dtype)

    def numel(self) -> int:
        return int(self.size)

    def norm(self, dim: int, keepdim: bool) -> Tensor:
        return np.linalg.norm(np.asarray(self), axis=dim, keepdims=keepdim).astype(np.float32).view(Tensor)


def tensor(values: Any, dtype: Any = None, device: Any = None) -> Tensor:
    return np.array(values, dtype).view(Tensor)


class Block:
    """A decoder block, and torch's protocol of forward hooks with keywords."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray, tuples: bool) -> None:
        self.weight, self.bias, self.tuples = weight, bias, tuples
        self._forward_hooks: dict[int, Callable[..., Any]] = {}

    def register_forward_hook(self, hook: Callable[..., Any], *, with_kwargs: bool) -> Any:
        assert with_kwargs
        key = len(self._forward_hooks)
        self._forward_hooks[key] = hook
        return SimpleNamespace(remove=lambda: self._forward_hooks.pop(key))

    def __call__(self, hidden: Any, **more: Any) -> Any:
        out = (hidden + hidden @ self.weight.T + self.bias).view(Tensor)
        result: Any = (out, None) if self.tuples else out
        for hook in self._forward_hooks.values():
            changed = hook(self, (hidden,), more, result)
            result = result if changed is None else changed
        return result


def module() -> Any:
    """What ``import torch`` finds."""
    torch: Any = ModuleType("torch")
    torch.float32 = np.float32
    torch.as_tensor = tensor
    torch.where = lambda condition, one, other: np.where(condition, one, other).view(Tensor)
    torch.ones_like = lambda x: np.ones_like(x)
    return torch
