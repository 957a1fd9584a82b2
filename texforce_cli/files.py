"""Files that are either whole or absent, or grow by whole lines: every other write goes to a temporary neighbour and is renamed
into place."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from texforce_cli.errors import TexforceError, UsageError

R = TypeVar("R")

_PAUSES = (0.01, 0.03, 0.1, 0.3, 0.6) if os.name == "nt" else ()
"""Seconds between tries of what a virus scanner, an index or a reader forbids for a moment on Windows."""


class NotWritten(TexforceError):
    """A file could not be written: the disk is full, or the folder may not be changed."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone while the block runs, by a lock that ends with the process, where the file system
    has such locks.

    Raises:
        TexforceError: another process works in it, or it cannot be written.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        remedy = "wait until it has ended, or stop it"
        if isinstance(
            lock, SoftFileLock
        ):  # what filelock takes where there is no flock: a file that a lost machine leaves
            remedy += f"; if it was on a machine that is gone, delete '{folder / '.lock'}'"
        raise TexforceError(f"another process works in '{folder}'", remedy) from error
    except NotImplementedError:  # a file system without locks, of which an older filelock says so
        pass
    except OSError as error:
        raise write_error(folder / ".lock", error) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def atomic_path(path: Path, *, settled: bool = True, fresh: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, flushed and renamed over it when the block ends, removed when it fails.

    Not `settled`: after a power failure it may be absent, which is quicker, for what is one of many and can be made again.
    `fresh`: nothing may be there that it would replace.
    The temporary file keeps the suffix of `path`, so that libraries that look at suffixes write the right format.

    Raises:
        UsageError: something is at a `fresh` path by then.
        TexforceError: the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        with parents_of(path):
            try:
                yield temporary
                flush(temporary)
                patiently(lambda: _rename_to_new(temporary, path) if fresh else temporary.replace(path))
                if settled:
                    settle(path.parent)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Give a file a name that nothing has, in one step where the file system has links."""
    try:
        if os.name == "nt":
            temporary.rename(path)  # which replaces nothing there
        else:
            _link(temporary, path)
    except FileExistsError as error:
        raise appeared(path) from error


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.open("xb").close()
        try:
            temporary.replace(path)
        except OSError:
            path.unlink()
            raise


def appeared(path: Path) -> UsageError:
    """What is said where something is at a path that was free when the work began."""
    return UsageError(f"'{path}' has appeared meanwhile", "choose another --out, or add --force")


def patiently(step: Callable[[], R]) -> R:
    """What `step` gives, which replaces or renames something: on Windows it is tried again while another process has it open.

    Raises:
        OSError: as `step`; what is forbidden stays so for a second.
    """
    for pause in _PAUSES:
        try:
            return step()
        except PermissionError:
            time.sleep(pause)
    return step()


def flush(place: Path) -> None:
    """Bring the contents of a file, or of every file in a folder, to the disk.

    Raises:
        OSError: they do not fit, or the disk has failed.
    """
    for path in [place] if place.is_file() else place.rglob("*"):
        if path.is_file():
            with path.open("rb+") as handle:
                os.fsync(handle.fileno())


def settle(folder: Path) -> None:
    """Bring the names in `folder` to the disk, so that a rename outlives a power failure, where the system can do that."""
    try:
        place = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder
        return
    try:
        os.fsync(place)
    except OSError as error:  # some network file systems sync no folder
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(place)


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those that were made and are still empty when the block fails are removed."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            settle(folder.parent)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` as one atomic step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, as one atomic step; half characters, as of a file name that is no UTF-8, become `?`."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, as one atomic step."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if any(
        "\ud800" <= letter <= "\udfff" for letter in text
    ):  # of a file name that is no UTF-8, which is to be read again
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


class Lines:
    """A file that grows by whole lines, each on the disk before the next step. One thread at a time.

    Opened by `opened`, which changes nothing on disk: a torn last line is cut off by the first `append`.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        """Bytes of whole lines; what stands behind them is torn."""

    @classmethod
    def opened(cls, path: Path) -> tuple[Lines, list[bytes]]:
        """The file, and the whole lines that are in it.

        Raises:
            TexforceError: it cannot be read.
        """
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise TexforceError(
                f"'{path}' cannot be read ({error.strerror or error})", "make it readable, or move it away"
            ) from error
        size = data.rfind(b"\n") + 1
        return cls(path, size), data[:size].split(b"\n")[:-1]

    def append(self, *lines: bytes) -> None:
        """Add lines: they are on the disk when this returns.

        Raises:
            TexforceError: the disk is full or read-only.
        """
        try:
            self._write(b"".join(line + b"\n" for line in lines))
        except OSError as error:
            raise write_error(self.path, error) from error

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as handle:
            # half a line, of a run that was killed or of a disk that was full, must not run into this one
            handle.truncate(min(self._size, handle.tell()))
            written = 0
            while written < len(data):
                written += handle.write(data[written:])
            os.fsync(handle.fileno())
            self._size = handle.seek(0, os.SEEK_END)


def from_json(text: str) -> Any:
    """What a JSON text says that somebody else may have written; its numbers fit into a float.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has a number that is not finite.
    """
    try:
        return _JSON.decode(text)
    except (RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


def read_json(path: Path) -> Any:
    """What a JSON file says that somebody else may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: as `from_json`; it is not UTF-8.
    """
    return from_json(path.read_text(encoding="utf-8"))


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _whole(text: str) -> int:
    value = int(text)
    float(value)
    return value


_JSON = json.JSONDecoder(parse_float=_real, parse_int=_whole, parse_constant=_real)


def finite(value: Any) -> Any:
    """The same plain value with null for what is not finite: JSON knows no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write `rows` to `path` as CSV, as one atomic step. A text that a spreadsheet would take for a formula is quoted; what is
    not finite is left empty."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(map(_csv_cell, row) for row in rows)
    write_text(path, text.getvalue())


def _csv_cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value if not isinstance(value, float) else json.dumps(value)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    import hashlib  # loads OpenSSL, which the quick commands do without

    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_SMALL_FOLDER = 64_000_000
"""Bytes of a folder up to which its contents are hashed; beyond, names, sizes and times stand for them."""


def contents_hash(place: str) -> str:
    """A hash of the file or folder that a text names; "" where it names none, or none that can be read."""
    import hashlib

    try:
        path = user_path(place)
        if not place or not path.exists():
            return ""
        if path.is_file():
            return sha256(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        sizes = [file.stat().st_size for file in files]
        small = sum(sizes) <= _SMALL_FOLDER
        listed = [
            [file.relative_to(path).as_posix(), size, sha256(file) if small else file.stat().st_mtime_ns]
            for file, size in zip(files, sizes)
        ]
    except (OSError, RuntimeError, ValueError):
        return ""
    return hashlib.sha256(json.dumps(listed).encode("utf-8")).hexdigest()[:16]


_IN_USE = (5, 32)
"""What Windows says of a file that is open elsewhere: access denied, sharing violation."""


def write_error(path: Path, error: OSError) -> NotWritten:
    """The sentence for a failed write: which file, why, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotWritten(f"no space left on the disk to write '{path}'", "free some space and run the command again")
    if getattr(error, "winerror", None) in _IN_USE and path.is_file():
        return NotWritten(f"'{path}' cannot be replaced: a program has it open", "close it there")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotWritten(f"'{path.parent}' cannot be written", "choose another folder with --out")
    return NotWritten(f"'{path}' could not be written ({error.strerror or error})", "choose another folder with --out")


def user_path(text: str | Path) -> Path:
    """The path that a user's text names: `~` in front is a home, where somebody has it."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  pathlib's raises where nobody has it


def placed(text: str) -> Path | None:
    """The path that a text names, if something is there."""
    try:
        path = user_path(text)
        return path if path.exists() else None
    except OSError:  # longer than a name may be
        return None


def user_folder(kind: Literal["cache", "data"]) -> Path:
    """Where things are kept between runs: TEXFORCE_HOME, else the system's place for an application's cache or data."""
    home = os.environ.get("TEXFORCE_HOME")
    if home:
        return user_path(home) / kind
    import platformdirs

    return Path(platformdirs.user_cache_dir("texforce") if kind == "cache" else platformdirs.user_data_dir("texforce"))
