"""LoRA files: the syntax of a weight, exact reading and writing, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.lora.files import find_lora, lora_bytes, read_lora
from texforce_cli.lora.spec import LoraSpec, parse_lora

KEY = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.7", "a.safetensors", 0.7),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:-0.3", r"C:\loras\a.safetensors", -0.3),
        ("a:b.safetensors", "a:b.safetensors", 1.0),
        ("x:.5", "x", 0.5),
        ("org/repo:1e-1", "org/repo", 0.1),
    ],
)
def test_a_source_with_a_weight(text: str, source: str, weight: float) -> None:
    assert parse_lora(text) == LoraSpec(source, weight)


@pytest.mark.parametrize("text", ["x:nan", "x:inf", "x:0,7", "x:", ":0.5", ""])
def test_what_looks_like_a_weight_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no LoRA with a weight"):
        parse_lora(text)


@given(st.text(min_size=1), st.floats(-1e6, 1e6))
def test_any_path_with_any_weight_is_read_back(path: str, weight: float) -> None:
    assert parse_lora(f"{path}:{weight!r}") == LoraSpec(path, weight)


def weights(rank: int = 2, level: str = "text_model.") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key = KEY.replace("text_model.", level)
    return {
        f"{key}.lora_A.weight": torch.randn(rank, 4, generator=generator),
        f"{key}.lora_B.weight": torch.randn(3, rank, generator=generator),
    }


def test_what_is_written_is_read_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(20)}
    data = lora_bytes(weights(), metadata)
    assert data == lora_bytes(weights(), dict(reversed(metadata.items())))
    (tmp_path / "a.safetensors").write_bytes(data)
    found = read_lora(str(tmp_path / "a.safetensors"))
    assert {**metadata, "format": "pt"} == found.metadata
    assert all(torch.equal(found.weights[key], value) for key, value in weights().items())


def test_text_encoder_keys_are_given_their_level(tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(level=""), tmp_path / "a.safetensors")
    assert set(read_lora(str(tmp_path / "a.safetensors")).weights) == set(weights())


def test_alpha_of_the_header_is_folded_into_b(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 8, "text_encoder.r": 2})}
    safetensors.torch.save_file(weights(), tmp_path / "a.safetensors", header)
    found = read_lora(str(tmp_path / "a.safetensors")).weights
    assert torch.equal(found[f"{KEY}.lora_B.weight"], 4 * weights()[f"{KEY}.lora_B.weight"])
    assert torch.equal(found[f"{KEY}.lora_A.weight"], weights()[f"{KEY}.lora_A.weight"])


def test_a_lora_is_found_in_its_run_adapter_and_checkpoint_folder(tmp_path: Path) -> None:
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(lora_bytes(weights(), {}))
    for path in (file, file.parent, tmp_path / "run"):
        assert find_lora(str(path)) == file
    with pytest.raises(UsageError, match="holds no LoRA"):
        find_lora(str(tmp_path))
    with pytest.raises(UsageError, match="there is no LoRA"):
        find_lora(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "holds no tensors"),
        ({f"{KEY}.lora_A.weight": torch.ones(1, 1)}, "without"),
        ({"lora_te_x.lora_down.weight": torch.ones(1, 1)}, "is a kohya LoRA"),
        ({"model.weight": torch.ones(1)}, "no LoRA of diffusers' form"),
        ({**weights(), f"{KEY}.lora_B.weight": torch.full((3, 2), torch.nan)}, "NaN or infinite"),
    ],
)
def test_what_is_no_lora_is_refused_with_its_key(
    tmp_path: Path, tensors: dict[str, torch.Tensor], sentence: str
) -> None:
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(TexforceError, match=sentence):
        read_lora(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"version https://git-lfs", b"\xff" * 64])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(TexforceError, match="is not a readable safetensors file"):
        read_lora(str(tmp_path / "a.safetensors"))
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UsageError, match="can run code"):
        read_lora(str(tmp_path / "a.bin"))
