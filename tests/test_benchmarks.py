"""Every benchmark runs, at a size that says nothing: what docs and benchmarks/README.md promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import profile_epoch
from texforce_cli.devices import cpu_computes_bf16

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SMALL = "--images 16 --micro-batch 4 --steps 3 --trained-steps 2 --rounds 1 --threads 1".split()


def benchmark(name: str, out: Path, *options: str) -> dict[str, object]:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_the_profile_of_an_epoch_counts_every_phase(tmp_path: Path) -> None:
    found = benchmark("profile_epoch", tmp_path / "profile.json", *SMALL)
    counted, floor = found["gigaflop"], found["floor_gigaflop"]
    assert isinstance(counted, dict) and isinstance(floor, dict)
    assert counted["sampling"] > floor["sampling"] > 0  # decoding and the text encoder are on top
    assert counted["training"] == pytest.approx(floor["training"], rel=0.1)
    assert counted["rewards"] == 0  # a JPEG file is no product of matrices


def test_the_help_of_the_profile_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_epoch.main(["--help"])
    said = capsys.readouterr().out
    assert "how near it is to the floor" in said and "--trl-python" not in said


def test_the_arms_of_an_epoch_take_turns(tmp_path: Path) -> None:
    found = benchmark("train_speed", tmp_path / "speed.json", *SMALL, "--guidance", "3")
    usual = {"plain/texforce", "plain/texforce-snapshot"}
    bf16 = {"plain/texforce-bf16"} if cpu_computes_bf16() else set()
    assert found["ratios"].keys() == usual | bf16  # type: ignore[attr-defined]
    assert found["floors"].keys() == {"texforce", "texforce-snapshot", "texforce-unet"} | (
        {"texforce-bf16", "texforce-unet-bf16"} if bf16 else set()
    )  # type: ignore[attr-defined]
    left = {"texforce-window", "trl", "trl-bf16"} | (set() if bf16 else {"texforce-bf16", "texforce-unet-bf16"})
    assert found["left_out"].keys() == left  # type: ignore[attr-defined]


def test_the_time_to_a_reward(tmp_path: Path) -> None:
    options = "--seeds 1 --arms fast --epochs 1 --pairs 4 --threads 1".split()
    found = benchmark("time_to_reward", tmp_path / "time.json", *options, "--figure", str(tmp_path / "curves.png"))
    (run,) = found["runs"]  # type: ignore[misc]
    assert run["points"].keys() == {"plain", "fast"} and (tmp_path / "curves.png").stat().st_size > 10_000
    assert all(points[0][2] for points in run["points"].values())  # what is measured is what has learnt
    arms = found["arms"]
    assert isinstance(arms, dict) and arms["plain"]["precision"] == found["measured in"] == "fp32"


def test_every_way_of_one_pass_is_measured(tmp_path: Path) -> None:
    found = benchmark("unet_pass", tmp_path / "pass.json", "--images", "8", "--rounds", "3", "--no-compile")
    passes = found["passes"]
    assert isinstance(passes, dict) and len(passes) == 8
    assert all(row["forward"]["median"] <= row["forward and backward"]["max"] for row in passes.values())


def test_the_table_of_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    options = "--size small --device cpu --precision fp32 --micro-batches 1,2 --steps 2 --rounds 1".split()
    found = benchmark("gpu", tmp_path / "gpu.json", *options)
    assert [row["micro_batch"] for row in found["rows"]] == [1, 2]  # type: ignore[attr-defined]


def test_the_arithmetic_of_many_gpus_has_the_counted_operations() -> None:
    from benchmarks import flops

    assert flops.table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
