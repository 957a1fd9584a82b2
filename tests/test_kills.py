"""The short form of benchmarks/kill_resume.py."""

from __future__ import annotations

from pathlib import Path

from benchmarks.kill_resume import compare


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    found = compare(tmp_path, kills=3, epochs=16, longest=0.5)
    assert found["differences"] == []
    assert found["kills"] == 3
    assert found["before the preflight"] == found["in a checkpoint"] == 1
