"""One thin file for each library that lastrerank plugs into. Nothing here is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the import of a library: what isn't there says how it is installed.

    Raises:
        ImportError: with the command; a ModuleNotFoundError where a module is missing altogether.
    """
    try:
        yield
    except ImportError as error:
        raise type(error)(f"{error}: pip install 'lastrerank[{extra}]'", name=error.name) from error


def as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Reranker.from_pretrained` as they can be written down: a dtype of PyTorch's by its name."""
    dtype = arguments.get("dtype")
    return dict(arguments) | ({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})
