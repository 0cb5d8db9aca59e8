"""Benchmarks. Imported from a checkout that isn't installed, this makes `lastrerank.kernels` the folder `kernels/`."""

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("lastrerank.kernels") is None:
    _kernels = types.ModuleType("lastrerank.kernels")
    _kernels.__path__ = [str(Path(__file__).parent.parent / "kernels")]
    sys.modules["lastrerank.kernels"] = _kernels
