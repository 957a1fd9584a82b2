"""Safetensors files without torch: a header that is checked before it is believed, tensors read one at a time, written as a stream.

The format: 8 bytes of length, a JSON header of that length, the tensors one after another. The safetensors library reads
no bfloat16 or float8 into numpy, maps whole files into memory, and writes its header in a random order; hence this file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from texforce_cli.errors import TexforceError, UsageError, first_line

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_MOST_DIMENSIONS, _LARGEST_DIMENSION = 8, 2**48
_AGAIN = "copy or download it again"
_STAND_INS = {
    b"version https://git-lfs": ("a git-lfs pointer, not the file itself", "run `git lfs pull`, or download the file"),
    b"<": ("a web page, not a model", "download the file itself: on the Hub /resolve/ where the page has /blob/"),
}
_PICKLES = {
    b"PK": ("a pickle with the ending of another format", "convert it to .safetensors; pickles can run code"),
    b"\x80": ("a pickle with the ending of another format", "convert it to .safetensors; pickles can run code"),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: its dtype by the format's name, its shape, and its bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read and holds together; no tensor is in memory."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    written: tuple[int, int]
    """Its size and when it was written (ns): with others it is another file."""

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read the header of a file.

        Raises:
            UsageError: there is no such file.
            TexforceError: it is no safetensors file, cut short, or its header contradicts itself; the sentence says where.
        """
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise UsageError(f"'{path}' is a folder, not a file", "name the .safetensors file in it")
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
                raise UsageError(f"'{path}' is a pipe or a device, not a file", "copy what it gives into a file")
            size, written = status.st_size, _written(status)
            with path.open("rb") as handle:
                start = handle.read(64)
                refuse_impostors(path, start)
                length = int.from_bytes(start[:8], "little")
                if size < 8 or length > size - 8 or length > _LONGEST_HEADER:
                    need = f"its header needs {length + 8} bytes, the file has {size}"
                    kind = "is cut short" if start[8:9] == b"{" else "is no safetensors file"
                    raise TexforceError(f"'{path}' {kind} ({need})", _AGAIN)
                handle.seek(8)
                text = handle.read(length)
        except FileNotFoundError as error:
            raise UsageError(f"there is no file '{path}'", "check the path") from error
        except OSError as error:
            raise TexforceError(f"'{path}' could not be read ({error.strerror or error})", "check the file") from error
        header = _parsed(path, text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TexforceError(f"'{path}' has metadata that is no table of texts", _AGAIN)
        entries = {key: _entry(path, key, value, 8 + length) for key, value in header.items()}
        _check_layout(path, entries, 8 + length, size)
        return cls(path, entries, metadata, written)

    def read(self, key: str) -> Array:
        """A tensor as it is stored; bfloat16 and float8 as the dtypes of ml_dtypes.

        Raises:
            TexforceError: the file has changed or cannot be read any more.
        """
        entry = self.entries[key]
        data = np.empty(entry.shape, DTYPES[entry.dtype])
        try:
            with self.path.open("rb") as handle:
                handle.seek(entry.start)
                count = handle.readinto(_bytes(data))
                same = _written(os.fstat(handle.fileno())) == self.written
        except OSError as error:
            raise TexforceError(f"'{self.path}' could not be read ({error.strerror or error})", _AGAIN) from error
        if count != data.nbytes or not same:
            raise TexforceError(f"'{self.path}' has changed while '{shown(key)}' was read", "run the command again")
        return data

    def finite(self, key: str) -> Array:
        """A tensor of numbers in float32, or float64 where it is stored so.

        Raises:
            TexforceError: it holds NaN or infinite values or some beyond float32, or is no tensor of numbers with a
                fraction; a single number may be an integer.
        """
        data = self.read(key)
        if not self.entries[key].dtype.startswith(("F", "BF")) and (data.size != 1 or data.dtype == np.bool_):
            raise TexforceError(f"'{self.path}' holds '{shown(key)}' as {self.entries[key].dtype}", "it is no weight")
        return finite(self.path, key, data)


def _written(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def finite(path: Path, key: str, data: Array) -> Array:
    """Numbers in float32, or float64 where they are stored so.

    Raises:
        TexforceError: they hold NaN or infinite values, or some that float32 cannot hold.
    """
    with np.errstate(over="ignore"):
        single = data.astype(np.float32, copy=False)
    if not np.isfinite(single).all():
        what = "numbers beyond float32" if np.isfinite(data).all() else "NaN or infinite values"
        raise TexforceError(f"'{path}' holds {what} in '{shown(key)}'", "it cannot be used")
    return data if data.dtype == np.float64 else single


def shown(name: str) -> str:
    """A name as a message may quote it: on one line, and not too long."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return line if len(line) <= 120 else f"{line[:117]}..."


class TensorWriter:
    """Tensors written one at a time behind a header that is written last, into a place kept free for it.

    `planned` gives the dtype and the shape of each tensor, in order; a shape may turn out smaller, and `metadata` may be
    given anew in `finish`, as long as the header fits into the place. The same content gives the same bytes.
    """

    def __init__(
        self,
        handle: BinaryIO,
        planned: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._handle = handle
        offset, header = 0, {}
        for key, (dtype, shape) in planned.items():
            length = math.prod(shape) * dtype.itemsize
            header[key] = _described(dtype, shape, offset, offset + length)
            offset += length
        self._place = len(_header_text(header, metadata))
        self._header: dict[str, Any] = {}
        self._offset = 0
        handle.write(bytes(8 + self._place))

    def write(self, key: str, value: Array) -> None:
        """Append one tensor."""
        data = np.ascontiguousarray(value)
        self._header[key] = _described(value.dtype, value.shape, self._offset, self._offset + data.nbytes)
        self._offset += data.nbytes
        self._handle.write(_bytes(data))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header; the file is whole after this."""
        text = _header_text(self._header, metadata)
        if len(text) > self._place:
            raise ValueError(f"the header has {len(text)} bytes, {self._place} were kept for it")
        self._handle.seek(0)
        self._handle.write(self._place.to_bytes(8, "little") + text.ljust(self._place))


def write_tensors(handle: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file of tensors that are in memory."""
    writer = TensorWriter(handle, {key: (value.dtype, value.shape) for key, value in tensors.items()}, metadata)
    for key, value in tensors.items():
        writer.write(key, value)
    writer.finish(metadata)


def _bytes(data: Array) -> memoryview:
    return data.reshape(-1).view(np.uint8).data


def _described(dtype: np.dtype[Any], shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}


def _header_text(header: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    whole = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    return text + b" " * (-len(text) % 8)


def refuse_impostors(path: Path, start: bytes, *, pickles: bool = False) -> None:
    """Refuse what begins like something else than a file of tensors; `pickles` may be one.

    Raises:
        TexforceError: it is empty, or what it is instead.
    """
    if not start:
        raise TexforceError(f"'{path}' is empty", _AGAIN)
    if start[8:9] == b"{":
        return
    for signature, (what, remedy) in (_STAND_INS if pickles else _STAND_INS | _PICKLES).items():
        if start.lstrip().startswith(signature):
            raise TexforceError(f"'{path}' is {what}", remedy)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands in it twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = f"its header cannot be read: {first_line(error)}"
        raise TexforceError(f"'{path}' is no safetensors file ({reason})", _AGAIN) from error
    if not isinstance(header, dict):
        raise TexforceError(f"'{path}' is no safetensors file (its header is no table)", _AGAIN)
    return header


def _entry(path: Path, key: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(n) is int and 0 <= n < _LARGEST_DIMENSION for n in (*shape, start, stop))
        whole = whole and len(shape) <= _MOST_DIMENSIONS
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise TexforceError(f"'{path}' describes '{shown(key)}' in a way that cannot be read", _AGAIN)
    if dtype not in DTYPES:
        raise TexforceError(f"'{path}' holds '{shown(key)}' as {dtype[:20]!r}", f"that can be {', '.join(DTYPES)}")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if need != stop - start:
        raise TexforceError(f"'{path}' gives '{shown(key)}' {stop - start} bytes, its shape needs {need}", _AGAIN)
    return Entry(dtype, shape, base + start, base + stop)


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """The tensors fill the file, without overlap or holes: nothing is hidden and nothing is lost."""
    end = base
    for key, entry in _by_place(entries):
        if entry.stop > size:
            raise TexforceError(
                f"'{path}' is cut short ('{shown(key)}' ends at byte {entry.stop}, the file at {size})", _AGAIN
            )
        if entry.start < end:
            raise TexforceError(f"'{path}' has overlapping tensors ('{shown(key)}' begins within another)", _AGAIN)
        if entry.start > end:
            raise TexforceError(
                f"'{path}' has {entry.start - end} bytes before '{shown(key)}' that belong to nothing", _AGAIN
            )
        end = entry.stop
    if end < size:
        raise TexforceError(f"'{path}' has {size - end} bytes at its end that belong to nothing", _AGAIN)


def _by_place(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    yield from sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
