"""Safetensors files: every dtype, the same bytes, and a sentence for each way in which a file can lie."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from texforce_cli.cli.app import run
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.tensorfile import TensorFile, TensorWriter, shown, write_tensors


@pytest.mark.parametrize(
    "dtype",
    [
        getattr(torch, name)
        for name in "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 uint8 bool".split()
    ],
)
def test_torch_and_this_reader_agree_on_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    safetensors.torch.save_file({"x": value, "y": value[0].clone()}, tmp_path / "a.safetensors", {"k": "é"})
    file = TensorFile.open(tmp_path / "a.safetensors")
    assert file.metadata == {"k": "é"}
    assert np.array_equal(file.read("x").astype(np.float64), value.double().numpy())
    assert np.array_equal(file.read("y").astype(np.float64), value[0].double().numpy())


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_what_is_written_torch_reads(name: str, tmp_path: Path) -> None:
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    value = np.random.default_rng(0).standard_normal((4, 3)).astype(dtype)
    with (tmp_path / "a.safetensors").open("wb") as handle:
        write_tensors(handle, {"b": value, "a": value[:0], "s": value[0, 0]}, {"format": "pt"})
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert np.array_equal(found["b"].float().numpy(), value.astype(np.float32))
    assert found["a"].shape == (0, 3)
    assert found["s"].shape == ()


@given(
    st.dictionaries(st.text(min_size=1), st.integers(0, 5), max_size=5),
    st.dictionaries(st.text(), st.text(), max_size=4),
)
def test_any_names_and_texts_come_back_and_the_same_bytes_each_time(
    sizes: dict[str, int], texts: dict[str, str]
) -> None:
    sizes.pop("__metadata__", None)
    tensors = {name: np.arange(size, dtype=np.float32) for name, size in sizes.items()}
    buffers = []
    for metadata in (texts, dict(reversed(texts.items()))):
        buffer = io.BytesIO()
        write_tensors(buffer, tensors, metadata)
        buffers.append(buffer.getvalue())
    assert buffers[0] == buffers[1]
    assert {name: value.tolist() for name, value in safetensors.torch.load(buffers[0]).items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


def test_a_header_that_turns_out_smaller_keeps_its_place() -> None:
    buffer = io.BytesIO()
    writer = TensorWriter(buffer, {"x": (np.dtype(np.float32), (1000, 1000))}, {"room": " " * 100})
    writer.write("x", np.ones((2, 2), np.float32))
    writer.finish({"error": "0.1"})
    assert safetensors.torch.load(buffer.getvalue())["x"].sum() == 4
    with pytest.raises(ValueError, match="were kept for it"):
        writer.finish({"error": "0" * 1000})


def bytes_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int = 0, stop: int = 4, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


WHOLE = bytes_of({"x": entry(), "y": entry(4, 8)}, bytes(8))
BROKEN: dict[str, tuple[bytes, str]] = {
    "zero bytes": (b"", "is empty"),
    "cut in the length": (WHOLE[:5], "is no safetensors file"),
    "cut after the length": (WHOLE[:8], "is no safetensors file"),
    "cut in the header": (WHOLE[:30], "is cut short .its header needs"),
    "cut in the data": (WHOLE[:-3], "is cut short .'y' ends at byte"),
    "bytes at the end": (WHOLE + b"1", "has 1 bytes at its end that belong to nothing"),
    "absurd header length": (
        (2**63 - 1).to_bytes(8, "little") + b"{}" + bytes(50),
        "its header needs 9223372036854775815",
    ),
    "noise": (bytes(range(200, 256)) * 4, "is no safetensors file"),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 3\n", "git-lfs pointer"),
    "a zipped pickle": (b"PK\x03\x04" + bytes(60), "is a pickle"),
    "a bare pickle": (b"\x80\x02}q\x00." + bytes(60), "is a pickle"),
    "no JSON": (bytes_of(b"{nonsense}"), "its header cannot be read"),
    "not UTF-8": (bytes_of(b'{"\xff": 1}'), "its header cannot be read"),
    "a list": (bytes_of([1]), "is no safetensors file"),
    "nested deeply": (bytes_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "its header cannot be read"),
    "a key twice": (bytes_of(b'{"x": 1, "x": 2}'), "stands in it twice"),
    "overlapping": (bytes_of({"x": entry(0, 4), "y": entry(2, 6)}, bytes(6)), "has overlapping tensors"),
    "a hole": (bytes_of({"x": entry(4, 8)}, bytes(8)), "has 4 bytes before 'x' that belong to nothing"),
    "offsets beyond": (bytes_of({"x": entry(0, 4), "y": entry(4, 8)}, bytes(4)), "is cut short"),
    "shape too large": (bytes_of({"x": entry(shape=(2, 2))}, bytes(4)), "gives 'x' 4 bytes, its shape needs 16"),
    "shape absurd": (bytes_of({"x": entry(shape=(2**40, 2**40))}, bytes(4)), "its shape needs"),
    "shape beyond": (bytes_of({"x": entry(shape=(2**60,))}, bytes(4)), "in a way that cannot be read"),
    "shape of a thousand digits": (
        bytes_of({"x": entry(shape=(10**999, 10**999))}, bytes(4)),
        "in a way that cannot be read",
    ),
    "dimensions without end": (bytes_of({"x": entry(shape=(1,) * 70)}, bytes(4)), "in a way that cannot be read"),
    "shape negative": (bytes_of({"x": entry(shape=(-1, -1))}, bytes(4)), "in a way that cannot be read"),
    "shape of texts": (bytes_of({"x": entry(shape=("1",))}, bytes(4)), "in a way that cannot be read"),
    "shape true": (bytes_of({"x": entry(shape=(True,))}, bytes(4)), "in a way that cannot be read"),
    "no shape": (bytes_of({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "in a way that cannot be read"),
    "offsets reversed": (bytes_of({"x": entry(4, 0)}, bytes(4)), "gives 'x' -4 bytes"),
    "an entry that is text": (bytes_of({"x": "F32"}, bytes(4)), "in a way that cannot be read"),
    "unknown dtype": (bytes_of({"x": entry(dtype="Q4")}, bytes(4)), "holds 'x' as 'Q4'"),
    "metadata of numbers": (bytes_of({"__metadata__": {"a": 1}}), "has metadata that is no table of texts"),
    "metadata a list": (bytes_of({"__metadata__": []}), "has metadata that is no table of texts"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, sentence = BROKEN[name]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(TexforceError, match=sentence) as caught:
        TensorFile.open(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)
    assert run(["fuse", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "new" / "b.safetensors")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def replace_by_its_like(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(WHOLE)
    os.utime(new, ns=(1, 1))
    new.replace(path)


@pytest.mark.parametrize("change", [Path.unlink, lambda p: p.write_bytes(WHOLE[:-6]), replace_by_its_like])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    file = TensorFile.open(path)
    change(path)
    with pytest.raises(TexforceError, match=r"has changed while|could not be read"):
        file.read("y")


def test_nan_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {"x": torch.tensor([1.0, torch.nan]), "n": torch.tensor([1, 2])}, tmp_path / "a.safetensors"
    )
    file = TensorFile.open(tmp_path / "a.safetensors")
    with pytest.raises(TexforceError, match="NaN or infinite values in 'x'"):
        file.finite("x")
    with pytest.raises(TexforceError, match="holds 'n' as I64"):
        file.finite("n")


@pytest.mark.filterwarnings("error")
def test_numbers_are_those_that_float32_holds(tmp_path: Path) -> None:
    values = {"x": torch.tensor([1.0, -1e39], dtype=torch.float64), "y": torch.tensor([1e38, 0.1], dtype=torch.float64)}
    safetensors.torch.save_file(values, tmp_path / "a.safetensors")
    file = TensorFile.open(tmp_path / "a.safetensors")
    with pytest.raises(TexforceError, match="holds numbers beyond float32 in 'x'"):
        file.finite("x")
    assert file.finite("y").tolist() == [1e38, 0.1]


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="is a pipe or a device"):
        TensorFile.open(tmp_path / "a.safetensors")


def test_a_name_is_quoted_on_one_line() -> None:
    assert shown("a b.é\n\x1b\ud800\\") == "a b.é\\n\\x1b\\ud800\\"
    assert shown("x" * 120) == "x" * 120
    assert shown("x" * 121) == "x" * 117 + "..."
