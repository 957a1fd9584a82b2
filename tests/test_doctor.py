"""`texforce doctor`: what it finds, and what it says when something is wrong."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from texforce_cli.cli.app import run
from texforce_cli.tiny import WEIGHTS
from texforce_cli.workflows import doctor
from texforce_cli.workflows.plan import plan


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXFORCE_MICRO_BATCH", "2")  # a preflight of four pictures


def findings(capsys: Any) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["doctor"]["findings"]}


def test_a_machine_that_is_well_is_told_so_in_two_lines(tmp_path: Path, capsys: Any) -> None:
    assert run(["doctor", "--model", "tiny", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-2:] == ["ready: training will work here", "begin with: texforce demo"]
    assert "preflight: max |ratio - 1| = 0.0e+00 in fp32" in shown.out
    names = [line.partition(":")[0] for line in shown.out.splitlines()]
    assert {"versions", "devices", "memory", "disk here", "plugins", "model", "preflight"} <= set(names)
    assert f"torch {version('torch')}" in shown.out
    assert "warning" not in shown.err
    assert list(tmp_path.iterdir()) == []  # it only looks


def test_a_model_that_is_not_there_is_named(capsys: Any) -> None:
    assert run(["doctor", "--model", "nowhere", "--json"]) == 1
    found = findings(capsys)
    assert "nowhere" in found["model"]["trouble"]
    assert "cpu" in found["devices"]["value"]  # what there is to choose from is told all the same


def test_a_full_disk_is_trouble(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    usage = type("Usage", (), {"free": 5e8})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert run(["doctor", "--model", "tiny", "--device", "cpu", "--json"]) == 1
    assert "make room" in findings(capsys)["disk here"]["trouble"]


def test_a_folder_that_may_not_be_written_is_trouble(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert run(["doctor", "--model", "nowhere", "--json"]) == 1
    assert "cannot be written" in findings(capsys)["disk here"]["trouble"]


def test_stable_diffusion_on_a_cpu_is_looked_at_in_few_steps_and_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    told: list[Any] = []

    def planned(flags: dict[str, Any], file: Any) -> Any:
        asked.append(flags)
        return plan(flags, file)

    monkeypatch.setattr(doctor, "plan", planned)
    _, ready = doctor.examine(str(WEIGHTS), "cpu", None, told.append)
    assert ready and asked[-1]["steps"] == 2
    # two images of one in a pass, two steps each, drawn and then computed again
    assert [(event.phase, event.done, event.total) for event in told] == [
        ("preflight", done, 8) for done in (2, 4, 5, 6, 7, 8)
    ]


def test_a_ratio_that_is_not_one_is_trouble(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from texforce_cli.algorithms.ddpo import DDPO

    log_prob = DDPO._log_prob
    monkeypatch.setattr(DDPO, "_log_prob", lambda *about: (log_prob(*about)[0] + 0.01, log_prob(*about)[1]))
    assert run(["doctor", "--model", "tiny", "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].endswith("preflight: train with a larger --clip-range")  # it is fp32 already
    assert shown.out.splitlines()[-2:] == ["not ready: mend what the warnings say", "then ask again: texforce doctor"]


def test_a_broken_plugin_is_told_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    registry = doctor.load_registry()
    registry.broken["texforce-bad"] = "ImportError: no module"
    monkeypatch.setattr(doctor, "load_registry", lambda: registry)
    assert run(["doctor", "--model", "tiny", "--device", "cpu", "--json"]) == 0
    assert "texforce-bad" in findings(capsys)["plugins"]["trouble"]


def test_every_device_is_listed_with_its_room(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch

    from texforce_cli.devices import present

    for able, name in ((True, "cpu (with bf16)"), (False, "cpu")):
        monkeypatch.setattr("texforce_cli.devices.cpu_computes_bf16", lambda able=able: able)
        assert present()[-1] == name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7e9 + 1e9 * index, 16e9))
    assert present()[:2] == ["cuda:0 (GPU 0, 7.0 of 16.0 GB free)", "cuda:1 (GPU 1, 8.0 of 16.0 GB free)"]
    assert run(["doctor", "--model", "tiny", "--device", "cpu", "--json"]) == 0
    found = findings(capsys)
    assert found["devices"]["value"].endswith("16.0 GB free), cpu") and found["model"]["value"].endswith(", on cpu")
