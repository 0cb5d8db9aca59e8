"""What is kept on disk: named by digest, written whole or not at all, locked while it grows, whole after a crash."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileState:
    """A regular file as it was when it was looked at."""

    path: Path
    device: int
    inode: int
    size: int
    modified: int
    changed: int  # of content or attributes: a new link, a new mode

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Raises: OSError where there is no such file."""
        found = os.stat(path)
        return cls(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_current(self) -> bool:
        """Whether the path leads to the same file, unchanged."""
        try:
            return FileState.of(self.path) == self
        except OSError:
            return False

    def now(self) -> FileState | None:
        """The same file as it is, if it has changed: None for one that hasn't, or that was replaced by another."""
        try:
            found = FileState.of(self.path)
        except OSError:
            return None
        return found if (found.device, found.inode) == (self.device, self.inode) and found != self else None


def digest(*parts: Any) -> str:
    """SHA-256, in hexadecimal, of values that JSON can hold, and of files, given as paths, by their content."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            own = hashlib.sha256()
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    own.update(chunk)
            part = own.hexdigest()
        total.update(json.dumps(part, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return total.hexdigest()


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replace a file by one of this content; a reader, or a crash, finds the old one or the new one."""
    target = Path(path)
    partial = partial_name(target)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(target: Path) -> Path:
    """A name beside a file or folder under which its successor can be written, that nobody else uses."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextmanager
def locked(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold a lock on a path, through a file `.lock` beside it that stays, until the block ends or the process does.

    Raises:
        ValueError: another process holds it; the message begins with `what`.
    """
    import fcntl  # Linux and macOS are what is supported

    target = Path(path)
    with target.with_name(f".{target.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(f"{what} is in use by another process: {target}") from error
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)


# Files whose locks this process holds.
_locks: set[IO[str]] = set()


def _let_go() -> None:
    """In a forked child: a lock is held until nobody has its file open, and a child may live longer."""
    for file in _locks:
        file.close()
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """JSON objects, one a line. What a crash leaves at the end, a line cut short or zeros, is cut off the file.

    Raises:
        ValueError: another line is damaged; the message names file and line.
    """
    target = Path(path)
    try:
        data = target.read_bytes()
    except FileNotFoundError:
        return []
    whole = data.rstrip(b"\0")
    whole = whole[: whole.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a last line that a crash has filled with something else
                whole = whole[: len(whole) - len(line) - 1]
                break
            raise ValueError(f"{target}:{number}: damaged: {error}") from error
        records.append(record)
    if whole != data:
        write_file(target, whole)
    return records


def write_records(path: str | os.PathLike[str], records: Iterable[dict[str, Any]]) -> None:
    """Replace a file of records, as `write_file` does."""
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
