"""One thin file for each library that lastrerank plugs into. Nothing here is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Reranker.from_pretrained` as they can be written down: a dtype of PyTorch's by its name."""
    dtype = arguments.get("dtype")
    return dict(arguments) | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})
