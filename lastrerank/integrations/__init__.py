"""One thin file for each library that lastrerank plugs into. Nothing here is imported before it is asked for."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def install_command(extra: str) -> str:
    """What installs an extra beside this lastrerank, in whatever environment it runs and from wherever it is typed."""
    return f"{shlex.quote(sys.executable)} -m pip install 'lastrerank[{extra}]'"


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the import of a library: what isn't there says how it is installed.

    Raises:
        ImportError: with the command; a ModuleNotFoundError where a module is missing altogether.
    """
    try:
        yield
    except ImportError as error:
        raise type(error)(f"{error}: {install_command(extra)}", name=error.name) from error


def as_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Reranker.from_pretrained` as they can be written down: PyTorch's devices and dtypes by their names,
    paths as strings."""

    def plain(value: Any) -> Any:
        if type(value).__module__ == "torch":
            return str(value).removeprefix("torch.")
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    return {name: plain(value) for name, value in arguments.items()}
