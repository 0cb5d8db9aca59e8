"""What `make dist` has made, from outside: `python tests/check_dist.py DIST`."""

from __future__ import annotations

import ctypes
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = (
    "lastrerank/__init__.py", "lastrerank/py.typed", "lastrerank/kernels/attention.py", "lastrerank/demo.json",
    "lastrerank/kernels/attention_hopper.py",
    "lastrerank/models/lastrerank-43m/model.safetensors", "lastrerank/models/lastrerank-43m/README.md",
    "lastrerank/server/page.html", "lastrerank/server/docs.html",
    "licenses/LICENSE", "licenses/lastrerank/LICENSE-MPL-2.0.txt",
)  # fmt: skip
SOURCES = ("pyproject.toml", "CMakeLists.txt", "csrc/kernels.cpp", "kernels/attention.py", "README.md", "LICENSE")
MOST_MEGABYTES = 80


def main(folder: Path) -> None:
    """Raises SystemExit with everything that is wrong."""
    wrong: list[str] = []
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(archives) != 1:
        raise SystemExit(f"{folder}: {len(wheels)} wheels and {len(archives)} source distributions, expected one each")
    wheel = wheels[0]
    if "-py3-none-" not in wheel.name:
        wrong.append(f"{wheel.name}: expected one wheel for every Python 3")
    if wheel.stat().st_size > MOST_MEGABYTES << 20:
        wrong.append(f"{wheel.name}: {wheel.stat().st_size >> 20} MiB, expected at most {MOST_MEGABYTES}")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        wrong += [f"{wheel.name} lacks {name}" for name in WHEEL if not any(n.endswith(name) for n in names)]
        if not any(n.startswith("lastrerank/") and n.endswith(".so") for n in names):
            wrong.append(f"{wheel.name} lacks the native library: was there a compiler?")
        wrong += [f"{wheel.name} has {n}" for n in names if n.startswith(("tests/", "bench/", "docs/", "csrc/"))]
        metadata = opened.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    wrong += [f"METADATA has a relative link: {line}" for line in metadata.splitlines() if "](" in line.replace(
        "](https:", "")]  # fmt: skip
    with tarfile.open(archives[0]) as opened_sources:
        names = [name.split("/", 1)[-1] for name in opened_sources.getnames()]
    wrong += [f"{archives[0].name} lacks {name}" for name in SOURCES if name not in names]
    if "manylinux" not in wheel.name:
        wrong.append(f"{wheel.name}: no manylinux wheel, which a package index takes no other of")
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as opened:
        opened.extractall(unpacked)
        libraries = list(Path(unpacked).rglob("lastrerank_native*.so"))
        wrong += [f"{path.name} can't be loaded: {error}" for path in libraries if (error := _load_error(path))]
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{wheel.name} and {archives[0].name}: as they should be")


def _load_error(path: Path) -> str | None:
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
