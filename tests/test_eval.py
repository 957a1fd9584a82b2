"""`texforce eval` through the real command on the embedded model."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from huggingface_hub import constants
from PIL import Image, PngImagePlugin

from texforce_cli import __version__
from texforce_cli.cli.app import run
from texforce_cli.diffusion import models
from texforce_cli.diffusion.adapters import Adapter
from texforce_cli.diffusion.models import load_pipeline, resolve_model
from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.files import held, user_folder
from texforce_cli.judging.votes import Vote
from texforce_cli.lora.spec import parse_lora
from texforce_cli.lora.write import lora_bytes
from texforce_cli.prompts import Prompt, load_prompts
from texforce_cli.prompts.fetched import FETCHED
from texforce_cli.report.page import Row, pictures_hash
from texforce_cli.report.pictures import read_picture, save_png
from texforce_cli.rewards.builtin.pictures import Brightness
from texforce_cli.rewards.builtin.scores_file import picture_hash
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.registry import Registry, RewardInfo
from texforce_cli.rewards.terms import TermSpec
from texforce_cli.team import Team, launched, processes
from texforce_cli.workflows import drawing
from texforce_cli.workflows.evaluation import draw, sharing
from texforce_cli.workflows.evaluation import run as running
from texforce_cli.workflows.evaluation.layout import Layout, read_layout, write_layout
from texforce_cli.workflows.evaluation.pictures import Found, Item, items_of
from texforce_cli.workflows.evaluation.request import EvalRequest, gather_variants, prompts_of
from texforce_cli.workflows.evaluation.scores import Metric, ScoreFile, metrics_of, score_key, score_pictures
from texforce_cli.workflows.evaluation.summary import adjusted
from texforce_cli.workflows.evaluation.variants import parse_variant, read_variants
from texforce_cli.workflows.evaluation.votes import count_votes
from texforce_cli.workflows.events import Listener, Progressed
from texforce_cli.workflows.loras import trained_on
from texforce_cli.workflows.stopping import StopRequest

FAST = ["--steps", "2", "--guidance", "1", "--metric", "brightness", "--metric", "jpeg-incompressibility"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prompts() -> str:
    rows = [("a cat", "seen"), ("a dog", "seen"), ("two foxes in the park", "seen"), ("a red car", "unseen")]
    Path("prompts.jsonl").write_text(
        "".join(
            json.dumps({"prompt": text, "split": split, "category": text.split()[0]}) + "\n" for text, split in rows
        )
    )
    return "prompts.jsonl"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA that changes the pictures and says what it was trained on."""
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    adapter = Adapter.insert(pipeline, "text-encoder", rank=2, alpha=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "a+b=c.safetensors"
    about = {"base": "tiny", "base_kind": "tiny", "rewards": ["brightness:2"]}
    path.write_bytes(lora_bytes(adapter.export(), {"texforce": json.dumps(about)}))
    return str(path)


def summary(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "summary.json").read_text())
    return found


def row(found: dict[str, Any], variant: str, metric: str, group: str = "all") -> dict[str, Any]:
    return next(r for r in found["rows"] if (r["group"], r["variant"], r["metric"]) == (group, variant, metric))


def evaluate(prompts: str, *extra: str, out: str = "out") -> int:
    return run([*command_of(prompts, out), *extra])


def command_of(prompts: str, out: str) -> list[str]:
    return ["eval", "--prompts", prompts, "--seeds", "0:3", "--out", out, *FAST]


def test_the_same_model_twice_differs_by_nothing(prompts: str) -> None:
    assert evaluate(prompts, "--variant", "one=tiny", "--variant", "two=tiny") == 0
    found = summary()
    for metric in ("brightness", "jpeg-incompressibility", "diversity"):
        line = row(found, "two", metric)
        assert (line["difference"], line["difference_low"], line["difference_high"]) == (0, 0, 0)
        assert (line["p"], line["p_holm"], line["win_rate"]) == (1, 1, 0.5)
    first, second = (sorted(Path("out/pictures", name).glob("*.png")) for name in ("one", "two"))
    assert len(first) == 12
    assert all(np.array_equal(Image.open(a), Image.open(b)) for a, b in zip(first, second))


def test_a_whole_evaluation(prompts: str, lora: str, capsys: Any) -> None:
    arguments = [
        "--variant",
        "base=tiny",
        "--variant",
        f"tex=tiny+{lora}:0.5",
        "--variant",
        f"more=tiny+{lora}+{lora}:0.5",
    ]
    assert evaluate(prompts, *arguments) == 0
    shown = capsys.readouterr()
    assert "brightness (in-sample)" in shown.out
    assert "report/index.html" in shown.err
    found = summary()
    assert found["variants"][2]["in_sample"] == ["brightness"]
    assert [r["group"] for r in found["rows"] if r["variant"] == "base" and r["metric"] == "brightness"] == [
        "all", "seen", "unseen", "a", "two",
    ]  # fmt: skip
    assert row(found, "tex", "brightness")["prompts"] == 4
    assert row(found, "tex", "brightness")["pictures"] == 12
    assert row(found, "tex", "brightness", "unseen")["label"] == "for this prompt only"
    assert row(found, "tex", "brightness")["difference"] != 0
    assert found["wins"]["brightness"]["tex"]["base"] == pytest.approx(1 - found["wins"]["brightness"]["base"]["tex"])
    assert Path("out/report/index.html").is_file()
    with Path("out/summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["rows"])
    marked = {(line["variant"], line["metric"]) for line in lines if line["in_sample"] == "1"}
    assert marked == {(name, "brightness") for name in ("tex", "more")}
    assert str(Path.cwd()) not in Path("out/summary.json").read_text() + Path("out/report/index.html").read_text()


def test_noise_depends_on_prompt_and_seed_alone(prompts: str) -> None:
    assert evaluate(prompts, "--variant", "base=tiny", "--batch", "5", "--images-only") == 0
    assert evaluate("one.txt", "--variant", "base=tiny", "--images-only", out="one") == 2
    Path("one.txt").write_text("two foxes in the park\n")
    assert evaluate("one.txt", "--variant", "base=tiny", "--images-only", out="one") == 0
    alone = sorted(Path("one/pictures/base").glob("*.png"))
    assert len(alone) == 3
    for path in alone:
        pixels, other = (np.asarray(Image.open(p)).astype(int) for p in (path, Path("out/pictures/base") / path.name))
        assert np.abs(pixels - other).max() <= 1


def test_what_is_there_is_neither_drawn_nor_scored_again_and_a_change_redoes_what_it_touches(
    prompts: str, lora: str
) -> None:
    arguments = ["--variant", "base=tiny", "--variant", f"tex=tiny+{lora}"]
    assert evaluate(prompts, *arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")}
    scores, whole = Path("out/scores.jsonl").read_bytes(), Path("out/summary.json").read_bytes()
    page = Path("out/report/index.html").read_bytes()
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', page.decode(), re.DOTALL)[1])  # type: ignore[index]
    *judged, diversity = data["scores"]
    assert all(None not in values for values in judged) and not any(diversity)  # which no picture has
    assert run(["eval", "--out", "out"]) == 0  # the folder knows the rest
    assert {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")} == before
    assert Path("out/scores.jsonl").read_bytes() == scores
    assert Path("out/summary.json").read_bytes() == whole
    assert Path("out/report/index.html").read_bytes() == page
    assert evaluate(prompts, "--variant", "base=tiny", "--variant", f"tex=tiny+{lora}:0.5") == 0
    after = {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")}
    assert {path.parent.name for path in before if after[path] != before[path]} == {"tex"}
    assert Path("out/scores.jsonl").read_bytes().startswith(scores)


@pytest.mark.parametrize("after", [0.0, 1.0, 2.0])
@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_bytes(prompts: str, lora: str, after: float) -> None:
    arguments = ["--variant", "base=tiny", "--variant", f"tex=tiny+{lora}", "--batch", "2"]
    assert evaluate(prompts, *arguments, out="whole") == 0
    command = [sys.executable, "-m", "texforce_cli", *command_of(prompts, "cut")]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(Path("cut").rglob("*.png")):
        time.sleep(0.05)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    Path("cut/scores.jsonl").parent.mkdir(exist_ok=True)
    with Path("cut/scores.jsonl").open("ab") as handle:
        handle.write(b'{"picture": "torn')
    assert run(["eval", "--out", "cut"]) == 0
    for name in ("summary.json", "summary.csv", "report/index.html"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name


@pytest.mark.parametrize("begun", ["pictures", "scores.jsonl"])
@pytest.mark.slow
def test_killed_with_processes_of_its_own_and_resumed_it_ends_with_the_same_bytes(prompts: str, begun: str) -> None:
    arguments = ["--variant", "base=tiny", "--variant", "two=tiny", "--batch", "2", "--num-processes", "2"]
    assert evaluate(prompts, *arguments, out="whole") == 0
    command = [sys.executable, "-m", "texforce_cli", *command_of(prompts, "cut"), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    place = Path("cut", begun)
    while process.poll() is None and not (list(place.rglob("*.png")) or (place.is_file() and place.stat().st_size)):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in Path("cut/pictures").rglob("*.png")}
    assert len(before) == 24 or begun == "pictures"
    assert run(["eval", "--out", "cut", "--num-processes", "2"]) == 0
    again = [path for path, then in before.items() if path.stat().st_mtime_ns != then]
    assert len(again) <= (4 if begun == "pictures" else 0)  # of each process the batch in flight
    for name in ("summary.json", "summary.csv", "report/index.html"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_stages_alone(prompts: str) -> None:
    arguments = ["--variant", "base=tiny", "--variant", "two=tiny"]
    assert evaluate(prompts, *arguments, "--images-only") == 0
    assert not Path("out/summary.json").exists()
    assert evaluate(prompts, *arguments, "--report-only") == 3  # nothing is scored
    assert summary()["rows"] == [r for r in summary()["rows"] if r["metric"] == "diversity"]
    assert run(["eval", "--out", "out", "--score-only"]) == 0
    assert row(summary(), "two", "brightness")["difference"] == 0
    scores = Path("out/scores.jsonl").read_bytes()
    shutil.rmtree("out/report")
    assert run(["eval", "--out", "out", "--report-only", "--single-file"]) == 0
    assert Path("out/scores.jsonl").read_bytes() == scores
    assert "data:image" in Path("out/report/index.html").read_text()


def test_missing_truncated_and_odd_pictures_leave_every_variant_and_are_told(prompts: str, capsys: Any) -> None:
    arguments = ["--variant", "base=tiny", "--variant", "two=tiny", "--variant", "three=tiny"]
    assert evaluate(prompts, *arguments, "--images-only") == 0
    two = sorted(Path("out/pictures/two").glob("*.png"))
    two[0].unlink()
    two[1].write_bytes(two[1].read_bytes()[:200])
    save_png(two[2], Image.open(two[2]).convert("RGBA"), Image.open(two[2]).info)
    save_png(two[3], Image.open(two[3]).quantize(8), Image.open(two[3]).info)
    save_png(two[4], Image.open(two[4]).resize((100, 80)), Image.open(two[4]).info)
    capsys.readouterr()
    assert evaluate(prompts, *arguments, "--score-only", "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert {entry["variant"] for entry in document["missing"]} == {"two"}
    assert any(entry["what"] == "no picture" for entry in document["missing"])
    assert any("no whole picture" in entry["what"] for entry in document["missing"])
    assert document["unpaired"]["brightness"] == 2
    assert row(document, "three", "brightness")["pictures"] == 10
    assert row(document, "base", "brightness")["pictures"] == 10


def test_pictures_of_others(prompts: str, capsys: Any) -> None:
    assert run(["sample", "a cat", "a dog", "two foxes in the park", "a red car", "--model", "tiny", "--seeds", "0:3", "--steps", "2", "--out", "drawn"]) == 0  # fmt: skip
    Path("indexed").mkdir()
    with Path("indexed/metadata.jsonl").open("w") as index:
        for number, text in enumerate(["a cat", "a dog"]):
            Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(f"indexed/{number}.jpg")
            index.write(json.dumps({"file_name": f"{number}.jpg", "text": text, "seed": 1}) + "\n")
    assert evaluate(prompts, "--images", "a=drawn", "--images", "b=indexed") == 3
    assert row(summary(), "b", "brightness")["pictures"] == 2
    assert len(summary()["missing"]) == 10
    assert "and 5 more are missing: out" in capsys.readouterr().err
    Path("empty").mkdir()
    assert evaluate(prompts, "--images", "a=drawn", "--images", "c=empty", out="other") == 2
    assert "nothing in 'empty' tells" in capsys.readouterr().err
    Path("indexed/metadata.jsonl").write_text('{"file_name": "../drawn/x.png", "prompt": "a cat"}\n')
    assert evaluate(prompts, "--images", "b=indexed", out="other") == 2
    assert "names a file outside" in capsys.readouterr().err
    Path("indexed/metadata.jsonl").write_text('{"file_name": "a\\u0000.png", "prompt": "a cat"}\n')
    assert evaluate(prompts, "--images", "b=indexed", out="other") == 2
    Path("blobs").mkdir()  # as the Hub's cache keeps a data set
    for number in range(2):
        Path(f"indexed/{number}.jpg").rename(f"blobs/{number}")
        Path(f"indexed/{number}.jpg").symlink_to(f"../blobs/{number}")
    Path("indexed/metadata.jsonl").write_text(
        '{"file_name": "0.jpg", "text": "a cat"}\n{"file_name": "1.jpg", "text": "a dog"}\n'
    )
    assert evaluate(prompts, "--images", "b=indexed", "--images", "a=drawn", out="linked") == 3
    assert row(summary("linked"), "b", "brightness")["pictures"] == 2


def test_a_metric_that_raises_on_one_picture_costs_one_picture(prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Brightness.score

    def picky(self: Any, images: Any, texts: Any, metadata: Any) -> Any:
        if any(text == "a red car" for text in texts):
            raise RuntimeError("no cars")
        return real(self, images, texts, metadata)

    monkeypatch.setattr(Brightness, "score", picky)
    assert evaluate(prompts, "--variant", "base=tiny", "--variant", "two=tiny") == 3
    found = summary()
    assert {entry["prompt"] for entry in found["missing"]} == {"a red car"}
    assert "no cars" in found["missing"][0]["what"]
    assert row(found, "two", "brightness")["pictures"] == 9
    assert row(found, "two", "jpeg-incompressibility")["pictures"] == 12


def test_several_processes_draw_the_same(prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--variant", "base=tiny", "--batch", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert evaluate(prompts, *arguments, out="one") == 0
    finally:
        torch.set_num_threads(before)
    assert evaluate(prompts, *arguments, "--num-processes", "2", out="two") == 0
    assert Path("one/summary.json").read_bytes() == Path("two/summary.json").read_bytes()
    command = [sys.executable, "-m", "texforce_cli", *command_of(prompts, "launched")]
    meeting = launcher()
    environments = [{**os.environ, **meeting, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    started = [subprocess.Popen([*command, *arguments], env=env, stderr=subprocess.PIPE) for env in environments]
    said = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "report: launched" in said[0] and said[1] == "" and "c10d" not in said[0]
    assert Path("launched/summary.json").read_bytes() == Path("one/summary.json").read_bytes()


def launcher() -> dict[str, str]:
    """Where the processes of a launcher meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


@pytest.mark.slow
@pytest.mark.parametrize("drawing", [False, True])
def test_a_launchers_process_that_dies_is_named_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, drawing: bool
) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    monkeypatch.setattr(processes, "_PULSELESS", 4.0)
    monkeypatch.setattr(processes, "PULSE", 1.0)
    for name, value in {**launcher(), "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dying = "from texforce_cli.team.start import joined; joined().be_patient(1e9); import os; os._exit(1)"
    if drawing:
        monkeypatch.setattr(sharing, "draw_share", for_a_minute)
    other = subprocess.Popen([sys.executable, "-c", dying], env={**os.environ, "RANK": "1"})
    assert compared(*BRIGHT, images=("a",)) == 1
    assert "process 1 of 2 ended or hangs" in (error := capsys.readouterr().err) and "run the command again" in error
    other.wait()


def for_a_minute(request: EvalRequest, shard: tuple[int, int], listener: Listener) -> None:
    """In the place of drawing."""
    for _ in range(300):
        listener(Progressed("drawing base", 0, 1))
        time.sleep(0.2)
    pytest.fail("nobody was missed")


def refusing(monkeypatch: pytest.MonkeyPatch, error: BaseException, when: Callable[[list[str]], bool]) -> list[int]:
    """Drawing raises the error `when` a batch's prompts say so; the sizes of all batches that were tried."""
    real, sizes = drawing.draw_pictures, []

    def attempt(policy: Any, scheduler: str, pairs: Any) -> Any:
        sizes.append(len(pairs))
        if when([text for text, _ in pairs]):
            raise error
        return real(policy, scheduler, pairs)

    monkeypatch.setattr(drawing, "draw_pictures", attempt)
    return sizes


def test_a_picture_that_cannot_be_drawn_is_missing_and_the_others_are_drawn(
    prompts: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        sizes = refusing(patch, TexforceError("not finite", "use --precision fp32"), lambda texts: "a red car" in texts)
        assert evaluate(prompts, "--variant", "base=tiny", "--images-only", "--json") == 3
        shown = capsys.readouterr()
        assert [entry["prompt"] for entry in json.loads(shown.out)["missing"]] == ["a red car"] * 3
        assert sizes == [8, 4, 2, 1, 1, 2, 1, 1]
        assert evaluate(prompts, "--variant", "base=tiny", "--json") == 3
        assert sizes[8:] == [1, 1, 1]  # none of its neighbours
        assert {file.read_text() for file in Path("out").rglob("*.failed")} == {"not finite; use --precision fp32\n"}
    document = json.loads(capsys.readouterr().out)
    reason = "it could not be drawn (not finite; use --precision fp32)"
    lacking = [("a red car", seed, reason) for seed in range(3)]
    assert [(entry["prompt"], entry["seed"], entry["what"]) for entry in document["missing"]] == lacking
    assert row(document, "base", "brightness")["pictures"] == 9
    assert evaluate(prompts, "--variant", "base=tiny") == 0  # what failed is tried again
    assert row(summary(), "base", "brightness")["pictures"] == 12
    assert not list(Path("out").rglob("*.failed"))


def test_where_the_memory_is_full_fewer_pictures_are_drawn_at_once(
    prompts: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sizes = refusing(monkeypatch, torch.OutOfMemoryError("full"), lambda texts: len(texts) > 3)
    assert evaluate(prompts, "--variant", "base=tiny", "--images-only") == 0
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert "too full for 8 images at once: it goes on with 4" in capsys.readouterr().err


def test_where_nothing_can_be_drawn_batches_are_no_longer_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    written("x\n")
    sizes = refusing(monkeypatch, RuntimeError(), lambda texts: True)
    assert run(["eval", "--variant", "a=tiny", "--prompts", "p.txt", "--seeds", "0:64", "--out", "out", *FAST]) == 3
    assert sizes == [8, 4, 2, 1, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1] * 2 + [8] * 6
    assert {entry["what"] for entry in summary()["missing"]} == {"it could not be drawn (RuntimeError)"}
    assert len(summary()["missing"]) == 64


@pytest.mark.parametrize(("error", "code"), [(UsageError("no"), 2), (Interrupted("stopped"), 130)])
def test_a_users_mistake_and_a_request_to_stop_end_the_drawing(
    prompts: str, monkeypatch: pytest.MonkeyPatch, error: TexforceError, code: int
) -> None:
    sizes = refusing(monkeypatch, error, lambda texts: True)
    assert evaluate(prompts, "--variant", "base=tiny") == code
    assert len(sizes) == 1


def test_a_picture_of_nan_is_missing_and_not_black(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    def broken(self: Any, latents: Any, **_: Any) -> tuple[torch.Tensor]:
        return (torch.full((len(latents), 3, 64, 64), torch.nan),)

    monkeypatch.setattr(AutoencoderTiny, "decode", broken)
    assert evaluate(prompts, "--variant", "base=tiny", "--scheduler", "euler") == 3
    assert {entry["what"] for entry in summary()["missing"]} == {
        "it could not be drawn (the VAE drew values that are not finite; use --precision fp32 or bf16)"
    }


def test_which_process_this_is() -> None:
    assert launched({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)
    for odd in ({}, {"RANK": "x"}, {"RANK": "4", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "0"}):
        assert launched(odd) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "holds no evaluation"),
        (["--variant", "base=tiny"], 2, "there are no prompts"),
        (["--variant", "base=tiny", "--prompts", "color"], 2, "there is no metric"),
        (["--variant", "base"], 2, "is not NAME=MODEL"),
        (["--variant", "../x=tiny"], 2, "is no name for a variant"),
        (["--variant", "a=tiny+"], 2, "has an empty part"),
        (["--variant", "a=tiny", "--variant", "a=tiny", "--prompts", "color"], 2, "given twice"),
        (["--variant", "a=tiny", "--baseline", "b"], 2, "baseline 'b' is no variant"),
        (
            ["--variant", "a=tiny+none.safetensors", "--prompts", "color", "--metric", "brightness"],
            2,
            "there is no LoRA",
        ),
        (["--variant", "a=tiny", "--prompts", "color", "--metric", "brightnes"], 2, "did you mean"),
        (["--images", "a=none"], 2, "there is no folder 'none'"),
        (["--images-only", "--score-only"], 2, "exclude each other"),
        (["--variant", "a=tiny", "--guidance", "nan"], 2, "--guidance nan is not between 1 and 100"),
        (["--variant", "a=tiny", "--eta", "nan"], 2, "--eta nan is not between 0 and 1"),
        (["--variants", "none.toml"], 2, "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], code: int, sentence: str, capsys: Any) -> None:
    assert run(["eval", *arguments, "--out", "out"]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_a_command_that_fails_draws_nothing_and_leaves_the_folder_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    written("x\n")
    assert evaluate("p.txt", "--variant", "base=tiny", "--seeds", "0:2") == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    monkeypatch.setattr(models, "load_pipeline", lambda *given, **named: pytest.fail("a model was loaded"))
    capsys.readouterr()
    for wrong, sentence in (
        (["--score-only", "--metric-option", "brightness.typo=1"], "it has no option 'typo'"),
        (["--report-only", "--metric-option", "brightness.typo=1"], "it has no option 'typo'"),
        (["--metric-option", "brightness.typo=1", "--seeds", "0:9"], "it has no option 'typo'"),
        (["--metric", "brightness:-1"], "the metric 'brightness:-1' has a weight"),
        (["--metric", "scores-file"], "the reward scores-file has no table"),
        (["--variant", "base=tiny+none.safetensors", "--prompts", "p.txt", *FAST], "there is no LoRA"),
        (["--variant", "base=tiny+none", "--prompts", "p.txt", "--report-only", *FAST], "there is no LoRA"),
        (["--variant", "base=tiny+unet=none", "--prompts", "p.txt", *FAST], "there is no folder or file 'none'"),
        (["--size", "9"], "the size 9 is not a positive multiple of 4"),
        (["--device", "gpu", "--steps", "7"], "the device 'gpu' is not available here"),
    ):
        assert run(["eval", "--out", "out", *wrong]) == 2
        assert sentence in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert evaluate("p.txt", "--variant", "base=tiny+none.safetensors", out="fresh") == 2
    assert not Path("fresh").exists()


def test_a_metric_that_has_scored_here_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    written('{"prompt": "x", "metadata": {"n": 1}}\n{"prompt": "y", "metadata": {"n": 2}}\n', "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    before = summary()
    made = json.loads(Path("out/eval.json").read_text())
    made["request"]["metrics"] = ["brightness:2"]  # as earlier versions took it
    Path("out/eval.json").write_text(json.dumps(made))
    monkeypatch.setattr(RewardInfo, "create", lambda *given: pytest.fail("it was made"))
    assert run(["eval", "--out", "out"]) == 0
    assert summary() == before


@pytest.mark.parametrize("name", ["diversity", "votes"])
def test_no_metric_is_called_as_what_eval_has_itself(name: str) -> None:
    registry = Registry({(name, ""): RewardInfo(name, "m:R", "third", "1")})
    with pytest.raises(UsageError, match=f"no metric can be called '{name}'"):
        metrics_of([TermSpec(name)], registry)


def test_a_dry_run_says_what_would_be_drawn_and_what_is_not_there_yet(prompts: str, lora: str, capsys: Any) -> None:
    arguments = [
        "--variant",
        "base=tiny",
        "--variant",
        f"a=tiny+{lora}",
        "--variant",
        "b=tiny+runs/later:0.5",
        "--dry-run",
    ]
    assert evaluate(prompts, *arguments, "--json") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [v["unet_calls"] for v in plan["variants"]] == [24, 24, 24]
    assert (plan["not_there_yet"], plan["prompts"]["count"]) == (["runs/later:0.5"], 4)
    assert evaluate(prompts, *arguments, "--guidance", "3") == 0
    assert "48 U-Net calls" in capsys.readouterr().out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--metric", "scores-file"], "--metric-option scores-file.path=FILE"),
        (
            ["--metric", "aesthetic", "--metric-option", "aesthetic.weights=no"],
            "--metric-option aesthetic.weights=PATH",
        ),
        (["--metric-option", "nope.x=1"], "; add --metric nope"),
        (["--metric", "brightness", "--metric", "brightness"], "; give it once\n"),
    ],
)
def test_a_remedy_names_no_option_that_eval_has_not(arguments: list[str], remedy: str, capsys: Any) -> None:
    elsewhere("a", GREYS)
    assert compared(*arguments, images=("a",), prompts=written("x\ny\n")) in (1, 2)
    error = capsys.readouterr().err
    assert remedy in error and "--reward" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--size", "9"], 2, "the size 9 is not a positive multiple of 4"),
        (["--device", "gpu"], 2, "the device 'gpu' is not available here"),
        (["--metric-option", "brightness.typo=1"], 2, "it has no option 'typo'"),
        (["--unet", "empty"], 2, "the folder 'empty' holds no weights"),
        (["--unet", "some/text_encoder"], 1, "'some/text_encoder' holds no unet, but text_encoder"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(arguments: list[str], code: int, sentence: str, capsys: Any) -> None:
    Path("empty").mkdir()
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    pipeline.text_encoder.save_pretrained("some/text_encoder")
    for dry in (["--dry-run"], []):
        assert evaluate("color", "--variant", "a=tiny", *arguments, *dry) == code
        assert sentence in capsys.readouterr().err


def test_whole_weights_of_every_variant_are_said_once(tmp_path: Path, capsys: Any) -> None:
    Path("v.toml").write_text('[[variants]]\nname = "own"\nmodel = "tiny"\nunet = "u2"\n')
    Path("g").mkdir()
    short = ["plain=tiny", "short=tiny+text-encoder=t2"]
    variants = gather_variants(short, Path("v.toml"), ["other=g"], unet="u1", text_encoder="t1")
    assert [(v.name, v.unet, v.text_encoder) for v in variants] == [
        ("plain", "u1", "t1"), ("short", "u1", "t2"), ("own", "u2", "t1"), ("other", None, None),
    ]  # fmt: skip
    assert evaluate("color", "--variant", "a=tiny", "--unet", "u1", "--text-encoder", "t1", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["not_there_yet"], plan["variants"][0]["description"]) == (["t1", "u1"], "tiny + unet u1 + text_encoder t1")  # fmt: skip
    assert run(["eval", "--out", "out", "--unet", "u1"]) == 2
    assert "--unet and --text-encoder are of no variant" in capsys.readouterr().err


def test_votes_are_one_more_judge(prompts: str, lora: str, capsys: Any) -> None:
    arguments = ["--variant", "base=tiny", "--variant", f"tex=tiny+{lora}"]
    assert evaluate(prompts, *arguments) == 0
    page = Path("out/report/index.html").read_text()
    data = re.search(r'"hash": ?"([0-9a-f]{64})"', page)
    assert data is not None
    items = items_of([Prompt(t) for t in ("a cat", "a dog", "two foxes in the park", "a red car")], [0, 1, 2])
    cast = [
        {"prompt": item.prompt_id, "seed": item.seed, "left": "tex", "right": "base", "winner": "left"}
        for item in items[:9]
    ] + [{"prompt": items[9].prompt_id, "seed": 0, "left": "base", "right": "tex", "winner": "left"}]
    document = {"texforce_votes": 1, "data": data[1], "votes": cast}
    Path("votes.json").write_text(json.dumps(document))
    assert run(["eval", "--out", "out", "--report-only", "--votes", "votes.json"]) == 0
    found = row(summary(), "tex", "votes")
    assert (found["win_rate"], found["prompts"], found["pictures"]) == (
        0.75,
        4,
        10,
    )  # of three prompts all, of one none
    assert summary()["wins"]["votes"] == {"tex": {"base": 0.75}, "base": {"tex": 0.25}}
    by_group = {r["group"]: r["win_rate"] for r in summary()["rows"] if r["metric"] == "votes"}
    assert by_group == {"all": 0.75, "seen": 1, "unseen": 0, "a": pytest.approx(2 / 3), "two": 1}
    capsys.readouterr()
    for wrong, sentence in (
        ({**document, "data": "0"}, "are about other pictures"),
        ({**document, "texforce_votes": 2}, "holds no votes"),
        ({**document, "votes": [{"prompt": 1}]}, "holds no votes"),
        ({**document, "votes": [{**cast[0], "seed": float("inf")}]}, "holds no votes"),
        ([], "holds no votes"),
    ):
        Path("wrong.json").write_text(json.dumps(wrong))
        assert run(["eval", "--out", "out", "--report-only", "--votes", "wrong.json"]) == 2
        assert sentence in capsys.readouterr().err


RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
ROWS = {
    "table1": ["original", "refl", "texforce", "refl-texforce"],
    "table1-hpsv2": ["original", "alignprop", "texforce", "alignprop-texforce"],
    "table2-sd15": ["original", "refl", "texforce", "refl-texforce"],
    "table2-sd21": ["original", "refl", "texforce", "refl-texforce"],
    "table3": ["original", "refl", "texforce", "refl-texforce", "joint"],
    **{
        f"fig5-{c}": ["original", "texforce", "ddpo", "ddpo-texforce"]
        for c in ("color", "composition", "count", "location")
    },
}
"""The rows of the paper's tables and of its figure 5."""


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets of the paper as if they had been fetched, with other prompts."""
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path / "home"))
    contents = {
        "imagereward-train": [json.dumps([{"text": f"{n}"} for n in range(9_000)])],
        "imagereward-100": [json.dumps([{"id": n, "prompt": f"{n}"} for n in range(100)])],
        "hpsv2-train-750": ["".join(f"{n}\n" for n in range(750)), "".join(f"new {n}\n" for n in range(50))],
    }
    for name, texts in contents.items():
        source = FETCHED[name]
        for file, text in zip((*source.seen, *source.unseen), texts):
            path = user_folder("cache") / "prompts" / source.commit / Path(file.path).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def test_every_table_of_the_paper_and_figure_5_have_a_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_commands_of_a_recipe_are_sound(name: str, fetched: None, capsys: Any) -> None:
    """Each with --dry-run: nothing is fetched, and what the rows need is what the commands make or a comment explains."""
    text = (RECIPES / f"{name}.toml").read_text()
    commands = [
        shlex.split(line.lstrip("# "))[1:] for line in text.splitlines() if line.lstrip("# ").startswith("texforce ")
    ]
    made = []
    for command in commands[1:]:
        assert command[0] == "train"
        assert run([*command, "--dry-run", "--json"]) == 0
        made.append(command[command.index("--out") + 1])
    capsys.readouterr()
    assert commands[0][:3] == ["eval", "--variants", f"docs/recipes/{name}.toml"]
    assert run(["eval", "--variants", str(RECIPES / f"{name}.toml"), *commands[0][3:], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [variant["name"] for variant in plan["variants"]] == ROWS[name]
    assert (plan["prompts"]["count"], len(plan["seeds"])) in ((100, 4), (50, 4), (2, 50))
    assert plan["metrics"] == ["hpsv2" if "hpsv2" in name else "image-reward"]
    others = [path for path in plan["not_there_yet"] if path.startswith("weights/")]
    assert sorted([*made, *others]) == plan["not_there_yet"]
    assert all(path in text.split("[[variants]]")[1] for path in others)  # in the comment above the row


def test_a_recipe_says_which_prompts_are_still_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    command = [
        "eval",
        "--variants",
        str(RECIPES / "table3.toml"),
        "--prompts",
        "imagereward-100",
        "--metric",
        "image-reward",
    ]
    assert run([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert "imagereward-100" in plan["not_there_yet"]
    assert (plan["prompts"]["count"], plan["variants"][0]["pictures"]) == (100, 400)
    assert run(command) == 1
    assert "the prompts 'imagereward-100' are not on this machine" in capsys.readouterr().err


def test_separators_survive_paths(tmp_path: Path) -> None:
    odd = tmp_path / "a+b=c:1"
    odd.mkdir()
    (odd / "x+y.safetensors").write_bytes(b"")
    variant = parse_variant(f"tex=sd15+{odd}/x+y.safetensors:te=0.5,unet=1+other:-2")
    assert (variant.name, variant.model) == ("tex", "sd15")
    assert variant.loras == (f"{odd}/x+y.safetensors:te=0.5,unet=1", "other:-2")
    assert variant.description == "sd15 + x+y.safetensors:te=0.5,unet=1 + other:-2"
    assert parse_variant(f"m={odd}").model == str(odd)
    at = tmp_path / "10:20:30"
    for path in (at, at / "adapter", odd):
        path.mkdir(exist_ok=True)
    loras = parse_variant(f"t=sd15+{at}/adapter+{odd}+{at}").loras
    assert loras == (f"{at}/adapter", f"{odd}:1", f"{at}:1")  # what is a weight by itself has one behind it
    whole = parse_variant(f"refl-tex=sd15+unet={odd}+text-encoder=tuned+runs/a:0.5")
    assert (whole.unet, whole.text_encoder, whole.loras) == (str(odd), "tuned", ("runs/a:0.5",))
    with pytest.raises(UsageError, match="no or two weights of its unet"):
        parse_variant("x=sd15+unet=a+unet=b")
    with pytest.raises(UsageError, match="no or two weights of its text_encoder"):
        parse_variant("x=sd15+text-encoder=")


@pytest.mark.parametrize(
    ("parts", "description"),
    [
        ("runs/unet-11/checkpoints/epoch_0010:0.5", "unet-11/epoch_0010:0.5"),
        ("/home/someone/runs/tex-12/checkpoints/epoch_0010/pytorch_lora_weights.safetensors", "tex-12/epoch_0010:1"),
        ("lora-out/checkpoint-500", "lora-out/checkpoint-500:1"),
        ("runs/tex-12/adapter", "tex-12:1"),
        ("runs/tex-12", "tex-12:1"),
        ("runs/tex.safetensors", "tex.safetensors:1"),
        ("epoch_0010", "epoch_0010:1"),
        ("unet=refl/checkpoint-9/unet/diffusion_pytorch_model.safetensors", "unet refl/checkpoint-9"),
        ("unet=unet", "unet unet"),
        ("../adapter", "adapter:1"),
        ("../epoch_0010", "epoch_0010:1"),
    ],
)
def test_a_description_tells_the_checkpoints_of_two_runs_apart(parts: str, description: str) -> None:
    assert parse_variant(f"x=sd15+{parts}").description == f"sd15 + {description}"


def test_variants_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "v.toml"
    path.write_text(
        '[[variants]]\nname = "refl"\nmodel = "sd15"\nunet = "u"\nloras = ["a:0.5"]\n[[variants]]\nname = "b"\n'
    )
    refl, base = read_variants(path)
    assert (refl.unet, refl.loras, base.model) == ("u", ("a:0.5",), "auto")
    for text, sentence in (
        ("x = 1", "has no"),
        ('[[variants]]\nname = "a"\nlora = "x"', "variant 1 of .* has 'lora'"),
        ('[[variants]]\nname = "a"\nloras = "x"', "is 'x'"),
        ('[[variants]]\nmodel = "a"', "has no name"),
        ('[[variants]]\nname = "a"\nmodel = "tiny"\nimages = "."', "has images and a model"),
        ("[", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            read_variants(path)


def test_what_a_lora_was_trained_on_is_told_through_fusions(lora: str) -> None:
    assert trained_on(f"{lora}:0.3") == {"brightness"}
    assert run(["fuse", f"{lora}:0.5", lora, "--out", "f.safetensors"]) == 0
    assert run(["fuse", "f.safetensors:0.5", "--out", "g.safetensors"]) == 0
    assert trained_on("g.safetensors") == {"brightness"}


def test_a_picture_is_read_as_rgb_on_white_and_a_broken_one_is_told(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").shape == (4, 4, 3)
    (tmp_path / "no.png").write_bytes(b"<svg/>")
    for name, sentence in (("no.png", "no whole picture"), ("none.png", "is missing")):
        with pytest.raises(TexforceError, match=sentence):
            read_picture(tmp_path / name)


def test_sixteen_bits_of_grey_are_read_as_eight(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 25_700, 65_535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 100, 255]


def test_cells_are_distinct_and_their_noise_is_fixed() -> None:
    items = items_of([Prompt("a"), Prompt("b"), Prompt("a")], [0, 1, 0])
    assert [(item.text, item.seed) for item in items] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len({item.noise for item in items}) == 4
    assert Item("a", 0).noise == items[0].noise


def test_scores_survive_a_torn_line_and_nonsense(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path / "s.jsonl")
    file.add([("p", "a cat", "m", "1", 0.5), ("p", "line\u2028end", "m", "1", 1 / 3)])
    with (tmp_path / "s.jsonl").open("ab") as handle:
        for value in ("NaN", "1" + "0" * 400, "[" * 100_000):
            handle.write(
                b'{"picture": "x", "prompt": "y", "metric": "m", "version": "1", "value": %s}\n' % value.encode()
            )
        handle.write(b'[1]\n{"torn')
    torn = (tmp_path / "s.jsonl").read_bytes()
    again = ScoreFile(tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_bytes() == torn  # reading changes nothing
    assert again.get("p", "a cat", "m", "1") == 0.5
    assert again.get("p", "line\u2028end", "m", "1") == 1 / 3
    assert again.get("x", "y", "m", "1") is None
    again.add([("q", "z", "m", "1", 2.0)])
    assert ScoreFile(tmp_path / "s.jsonl").get("q", "z", "m", "1") == 2.0
    assert len((tmp_path / "s.jsonl").read_bytes().split(b"\n")) == 2 + 4 + 1 + 1


def test_a_table_that_a_spreadsheet_opens_holds_no_formula(prompts: str) -> None:
    Path("hostile.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"a cat {i}", "category": c}) + "\n"
            for i, c in enumerate(["=cmd|' /C calc'!A0", "@x"])
        )
    )
    assert evaluate("hostile.jsonl", "--variant", "base=tiny") == 0
    for line in Path("out/summary.csv").read_text().splitlines()[1:]:
        assert not line.startswith(("=", "@", "+"))


# --- what must not happen unseen --------------------------------------------------------------------------------------


def elsewhere(folder: str, levels: Mapping[tuple[str, int], int], **more: str) -> None:
    """A folder of grey pictures that somebody else drew."""
    for (text, seed), level in levels.items():
        picture = Image.new("RGB", (32, 32), (level, level, level))
        save_png(Path(folder, f"{text}-{seed}.png"), picture, {"prompt": text, "seed": str(seed), **more})


def tear(path: Path) -> None:
    """Leave the text of a picture, and none of its pixels."""
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") + 8])


def written(lines: str, name: str = "p.txt") -> str:
    Path(name).write_text(lines)
    return name


def compared(*extra: str, images: tuple[str, ...] = ("a", "b"), prompts: str = "p.txt", seeds: str = "0:2") -> int:
    """Pictures of folders, by their brightness."""
    folders = [word for name in images for word in ("--images", f"{name}={name}")]
    return run(["eval", *folders, "--prompts", prompts, "--seeds", seeds, "--out", "out", *extra])


BRIGHT = ("--metric", "brightness")
GREYS = {("x", 0): 10, ("x", 1): 20, ("y", 0): 30, ("y", 1): 40}


class Counted:
    """Brightness that counts what it is asked for, and whose last bits depend on the place in the batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: str = "") -> None:
        self.pictures = 0
        real = Brightness.score

        def score(reward: Any, images: Any, texts: Any, metadata: Any) -> Any:
            if refused in texts:
                raise RuntimeError(f"no {refused}")
            self.pictures += len(images)
            return [float(v) + 1e-12 * place for place, v in enumerate(real(reward, images, texts, metadata))]

        monkeypatch.setattr(Brightness, "score", score)


def test_a_picture_that_an_isolated_reward_cannot_score_has_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], check=True)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    site = next(tmp_path.glob("env/lib/python*/site-packages"))
    (site / "paths.pth").write_text(f"{ours}\n")
    (site / "picky.py").write_text(
        "class R:\n    input = 'uint8'\n    def score(self, images, prompts, metadata):\n"
        "        assert not [p for p in prompts if 'bad' in p], 'not this one'\n        return [float(i.mean()) for i in images]\n"
    )
    create, place = RewardInfo.create, Place(str(tmp_path / "env/bin/python"))
    monkeypatch.setattr(RewardInfo, "create", lambda info, options, workers, _: create(info, options, workers, [place]))
    seen = {}
    for number, text in enumerate(["good", "bad", "fine", "too bad", "also bad"]):
        path = Path(f"{number}.png")
        Image.new("RGB", (8, 8), (number, number, number)).save(path)
        seen[Item(text, 0)] = Found(path, str(number), f"pixels {number}")
    info = RewardInfo("picky", "picky:R", "third", "1")
    metric = Metric(TermSpec("picky"), info)
    monkeypatch.setattr(running, "score_pictures", lambda *given, **named: settings.append(named["workers"]))
    settings: list[WorkerSettings] = []
    running._score(
        EvalRequest(Path()),
        metric,
        Registry(),
        ScoreFile(Path("s.jsonl")),
        {},
        running._Missing([]),
        lambda _: None,
        StopRequest(),
    )
    assert settings == [WorkerSettings(300.0, failures=math.inf, substitute=False)]
    told = []
    for _ in range(2):  # the second time they are asked among themselves
        told.append([])
        score_pictures(
            ScoreFile(Path("s.jsonl")),
            metric,
            Registry({("picky", ""): info}),
            {"one": seen},
            batch=8,
            workers=settings[0],
            failed=lambda variant, item, why: told[-1].append((variant, item.text, why)),
            progress=lambda done, total: None,
            check=lambda: None,
        )
    failed, again = told
    assert failed == again
    assert [(variant, text) for variant, text, _ in failed] == [
        ("one", text) for text in ("bad", "too bad", "also bad")
    ]
    assert "not this one" in failed[0][2]
    values = [ScoreFile(Path("s.jsonl")).get(*score_key("picky", "third 1", item, one)) for item, one in seen.items()]
    assert values == [0.0, None, 2.0, None, None]


def test_pictures_of_other_settings_are_missing(prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = ["--variant", "base=tiny", "--batch", "5"]
    assert evaluate(prompts, *variant) == 0
    whole = Path("out/summary.json").read_bytes()
    save, batches = draw.save_pictures, []

    def stopping(*given: Any) -> None:
        if batches:
            raise Interrupted("stopped", exit_code=130)
        batches.append(save(*given))

    with monkeypatch.context() as patch:
        patch.setattr(draw, "save_pictures", stopping)
        assert evaluate(prompts, *variant, "--steps", "3") == 130
    assert evaluate(prompts, *variant, "--steps", "3", "--report-only") == 3
    others = [entry for entry in summary()["missing"] if entry["what"] == "drawn with other settings"]
    assert len(others) == 7
    assert len(summary()["missing"]) == 7 + 2 * 5  # five are not scored by either metric
    assert evaluate(prompts, *variant, "--guidance", "2", "--score-only") == 3
    assert {entry["what"] for entry in summary()["missing"]} == {"drawn with other settings"}
    assert evaluate(prompts, *variant) == 0
    assert Path("out/summary.json").read_bytes() == whole


def test_a_lora_that_was_changed_makes_its_pictures_others_and_one_that_is_gone_does_not(
    prompts: str, lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(lora, "l.safetensors")
    arguments = ["--variant", "base=tiny", "--variant", "tex=tiny+l.safetensors"]
    assert evaluate(prompts, *arguments) == 0
    whole = Path("out/summary.json").read_bytes()

    def no_model(*given: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("texforce_cli.diffusion.models.load_pipeline", no_model)
    Path("l.safetensors").rename("kept")
    assert run(["eval", "--out", "out", "--report-only"]) == 0
    assert Path("out/summary.json").read_bytes() == whole  # the in-sample mark, too
    assert run(["fuse", f"{lora}:0.5", "--out", "l.safetensors"]) == 0
    assert run(["eval", "--out", "out", "--report-only"]) == 3
    assert {(e["variant"], e["what"]) for e in summary()["missing"]} == {("tex", "drawn with other settings")}


def test_a_variant_that_comes_later_is_drawn_in_the_batches_of_those_that_are_there(prompts: str) -> None:
    one, two = ["--variant", "one=tiny", "--images-only"], ["--variant", "two=tiny"]
    assert evaluate(prompts, *one, "--seeds", "0:2") == 0
    assert evaluate(prompts, *two, *one, "--seeds", "0:4") == 0
    first, second = (read_layout(Path("out"), name) for name in ("one", "two"))
    assert first and second and len(first.batches) == 2 and first.batches == second.batches


def test_pictures_of_other_versions_devices_or_noise_are_told(
    prompts: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert evaluate(prompts, "--variant", "one=tiny") == 0
    assert run(["sample", "a cat", "--model", "tiny", "--seeds", "0", "--steps", "2", "--out", "other"]) == 0
    assert evaluate(prompts, "--variant", "two=tiny", out="out") == 0
    assert evaluate(prompts, "--variant", "one=tiny", "--images", "copy=out/pictures/one", out="out") == 0
    said = (
        "not all pictures were drawn by the same",
        "nothing tells that the pictures of 'other' were drawn with the noise",
    )
    assert not any(sentence in capsys.readouterr().err for sentence in said)
    monkeypatch.setattr("texforce_cli.workflows.drawing.versions", lambda: {"torch": "9"})
    arguments = ["--variant", "one=tiny", "--variant", "later=tiny", "--images", "other=other"]
    assert evaluate(prompts, *arguments) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert all(sentence in told for sentence in said) and "'later' by torch 9 on cpu" in told


def test_what_pictures_are_drawn_without_is_told(lora: str, capsys: Any) -> None:
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    about = {"base": "tiny", "base_kind": "tiny", "uncond_embedding": "base"}
    exported = Adapter.insert(pipeline, "text-encoder", rank=1, alpha=1, seed=0).export()
    Path("kept.safetensors").write_bytes(lora_bytes(exported, {"texforce": json.dumps(about)}))
    written("x\n")
    drawn = ["--variant", "base=tiny", "--variant", f"both=tiny+kept.safetensors+{lora}", "--images-only"]
    assert evaluate("p.txt", *drawn) == 0
    assert "the first one decides" in capsys.readouterr().err
    assert evaluate("p.txt", *drawn, "--scheduler", "euler", "--eta", "0.5") == 0
    error = capsys.readouterr().err
    assert "--eta 0.5 is for --scheduler ddim; euler does not look at it" in error
    assert "--scheduler euler does not keep the base's embedding of the negative prompt" in error
    assert run(["sample", "x", "--model", "tiny", "--steps", "1", "--scheduler", "euler", "--eta", "0.5"]) == 0
    assert "--eta 0.5 is for" in capsys.readouterr().err


def test_a_negative_prompt_that_is_too_long_is_told(prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(prompts, "--variant", "base=tiny", "--negative-prompt", "an ugly dog, " * 12) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.count("tokens of the prompt 'an ugly dog, an ugly dog")
        == said.count("beyond the limit and are not seen")
        == 1
    )


def test_what_a_file_is_called_makes_no_other_pictures(prompts: str, lora: str) -> None:
    shutil.copy(lora, "l.safetensors")
    assert evaluate(prompts, "--variant", "tex=tiny+l.safetensors") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")}
    Path("l.safetensors").rename("renamed.safetensors")
    for stage in ([], ["--report-only"]):
        assert evaluate(prompts, "--variant", "tex=tiny+renamed.safetensors", *stage) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")} == before


def test_pictures_of_weights_or_a_model_that_was_changed_in_its_place_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written("x\n")
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    pipeline.save_pretrained("model")
    pipeline.text_encoder.save_pretrained("words")
    variants = ["--variant", "a=model", "--variant", "b=tiny+text-encoder=words"]
    assert evaluate("p.txt", *variants) == 0
    monkeypatch.setattr(models, "load_pipeline", lambda *given, **named: pytest.fail("a model was loaded"))

    def others() -> set[str]:
        code = run(["eval", "--out", "out", "--report-only"])
        missing = {(entry["variant"], entry["what"]) for entry in summary()["missing"]}
        assert code == (3 if missing else 0) and {what for _, what in missing} <= {"drawn with other settings"}
        return {name for name, _ in missing}

    assert others() == set()
    scheduler = Path("model/scheduler/scheduler_config.json")
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "sample"}))
    pipeline.text_encoder.get_input_embeddings().weight.data += 1
    pipeline.text_encoder.save_pretrained("words")
    assert others() == {"a", "b"}
    shutil.rmtree("words")
    assert others() == {"a"}  # what is gone hinders no report
    for name in "ab":
        Path(f"out/pictures/{name}/drawing.json").write_text("{}")
    assert others() == {"a", "b"}
    old = Layout("asked", {"loras": [], "model": {"unet": "1"}}, 8)
    assert old.makes({**old.settings, "configs": "2"}) and not old.makes({"loras": [], "model": {"unet": "2"}})


def test_the_version_of_a_metric_has_the_contents_of_its_files(capsys: Any) -> None:
    elsewhere("a", GREYS)
    grey = {level: picture_hash(Image.new("RGB", (32, 32), (level, level, level))) for level in GREYS.values()}

    def table(factor: int) -> None:
        written("picture,score\n" + "".join(f"{name},{factor * level}\n" for level, name in grey.items()), "t.csv")

    written("x\ny\n")
    table(1)
    arguments = ["--metric", "scores-file", "--metric-option", "scores-file.path=t.csv"]
    assert compared(*arguments, images=("a",)) == 0
    assert row(summary(), "a", "scores-file")["mean"] == 25
    table(2)
    assert compared(*arguments, images=("a",)) == 0
    assert row(summary(), "a", "scores-file")["mean"] == 50
    Path("t.csv").unlink()
    assert run(["eval", "--out", "out", "--report-only"]) == 0
    assert row(summary(), "a", "scores-file")["mean"] == 50
    info = RewardInfo("m", "m:R", "texforce", "1")
    metric, none = Metric(TermSpec("m", options={"weights": "w"}), info), ScoreFile(Path("none"))
    before = metric.version(none)
    assert before == "texforce 1 weights=w"
    Path("w/deep").mkdir(parents=True)
    versions = [before, metric.version(none)]
    for content in ("one", "two"):
        Path("w/deep/x").write_text(content)
        versions.append(metric.version(none))
    assert len(set(versions)) == 4


def test_a_score_is_of_the_metadata_that_the_reward_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brightness, "score", lambda reward, images, texts, metadata: [m["level"] for m in metadata])
    elsewhere("a", GREYS)
    for level in (0.25, 0.5):
        written("".join(json.dumps({"prompt": text, "level": level}) + "\n" for text in "xy"), "p.jsonl")
        assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
        assert row(summary(), "a", "brightness")["mean"] == level


def test_scores_that_were_kept_by_the_files_hash_are_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", GREYS, variant="b")
    written("x\ny\n")
    assert compared(*BRIGHT) == 0
    lines = []
    for line in Path("out/scores.jsonl").read_text().splitlines():
        found = json.loads(line)
        for path in sorted(Path().glob("[ab]/*.png")):
            found.pop("batch", None)
            if found["metric"] == "brightness" and picture_hash(read_picture(path)) == found["picture"]:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lines.append(json.dumps({**found, "picture": digest, "value": 0.5 + 1e-9 * len(lines)}) + "\n")
    assert len(lines) == 8
    Path("out/scores.jsonl").write_text("".join(lines))
    counted = Counted(monkeypatch)
    assert run(["eval", "--out", "out"]) == 0
    line = row(summary(), "b", "brightness")
    assert (counted.pictures, line["difference"], round(line["mean"], 6)) == (0, 0, 0.5)


def test_one_more_seed_draws_what_is_missing_and_a_torn_batch_is_drawn_whole(
    prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stopped in the middle of a batch and went on is the same, to the byte, as what was not."""

    def arguments(out: str, seeds: str) -> list[str]:
        return ["eval", "--prompts", prompts, "--variant", "base=tiny", "--seeds", seeds, "--out", out, "--images-only", *FAST]  # fmt: skip

    def drawn(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(out, "pictures/base").glob("*.png")}

    save, sizes = draw.save_pictures, []

    def counting(folder: Path, variant: str, items: Any, *more: Any) -> None:
        sizes.append(len(items))
        save(folder, variant, items, *more)

    def tearing(folder: Path, variant: str, items: Any, *more: Any) -> None:
        save(folder, variant, items[:3], *more)
        raise Interrupted("stopped", exit_code=130)

    monkeypatch.setattr(draw, "save_pictures", counting)
    assert run(arguments("whole", "0:3")) == 0
    assert run(arguments("whole", "0:4")) == 0
    assert sizes == [8, 4, 4]
    monkeypatch.setattr(draw, "save_pictures", tearing)
    assert run(arguments("torn", "0:3")) == 130
    assert len(drawn("torn")) == 3
    monkeypatch.setattr(draw, "save_pictures", counting)
    sizes.clear()
    assert run(arguments("torn", "0:4")) == 0
    assert sizes == [8, 4, 4]
    assert drawn("torn") == drawn("whole")
    sizes.clear()
    assert run(arguments("torn", "0:4")) == 0
    assert not sizes


def test_processes_that_begin_at_different_times_share_out_the_same_batches(tmp_path: Path) -> None:
    items = items_of([Prompt(text) for text in "abcde"], range(3))
    wished = Layout("asked", {"steps": 1}, 4)
    first = wished.covering(items, None)
    late = wished.covering(items, first)  # by then the first process has written its own
    assert late == first
    shares = [first.wanting(tmp_path, "v", items, (index, 2)) for index in range(2)]
    assert sorted(item.name for share in shares for part in share for item in part) == sorted(i.name for i in items)
    more = wished.covering(items_of([Prompt(text) for text in "abcdef"], range(4)), first)
    assert more.batches[: len(first.batches)] == first.batches
    assert sum(map(len, more.batches)) == 24
    write_layout(tmp_path, "v", first)
    assert read_layout(tmp_path, "v") == first
    path = tmp_path / "pictures/v/drawing.json"
    path.write_text(path.read_text().replace('"batch": 4', '"batch": 1e400'))
    assert read_layout(tmp_path, "v") is None
    other = Layout("asked", {"steps": 1}, 5).covering(items, first)
    assert (len(other.batches), other.batches[0]) == (3, tuple(item.name for item in items[:5]))


def test_constant_scores_and_a_constant_difference_are_numbers_or_null(capsys: Any) -> None:
    elsewhere("a", dict.fromkeys(GREYS, 51))
    elsewhere("b", dict.fromkeys(GREYS, 102))
    elsewhere("c", dict.fromkeys(GREYS, 51), variant="c")
    written("x\ny\n")
    assert compared(*BRIGHT, images=("a", "b", "c")) == 0
    found = json.loads(Path("out/summary.json").read_text(), parse_constant=pytest.fail)
    better, same = row(found, "b", "brightness"), row(found, "c", "brightness")
    assert (better["effect"], better["detectable"], better["win_rate"]) == (None, None, 1)
    assert better["difference"] == pytest.approx(0.2)
    assert [better[end] for end in ("low", "high", "difference_low", "difference_high")] == [None] * 4
    assert (same["difference"], same["difference_low"], same["effect"], same["p"]) == (0, 0, 0, 1)
    shown = capsys.readouterr().out
    assert re.search(r"brightness +b +0\.4 +\+0\.2 +none +100%", shown) and "inf" not in shown
    page = Path("out/report/index.html").read_text()
    assert page.count('class="verdict same"') == 2 and 'class="verdict better"' not in page
    assert "inf" not in Path("out/summary.csv").read_text()
    assert compared(*BRIGHT, prompts=written("x\n"), seeds="0") == 0
    shown = capsys.readouterr().out
    assert "none" in shown and "inf" not in shown


def test_equal_pictures_have_exactly_the_same_score(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        for name in "ab":
            save_png(Path(name, f"{seed}.png"), noise, {"prompt": "a cat", "seed": str(seed), "variant": name})
    written("a cat\n")
    counted = Counted(monkeypatch)
    assert compared(*BRIGHT, "--metric", "tiny-clip", "--batch", "3", seeds="0:5") == 0
    assert counted.pictures == 5
    for metric in ("brightness", "tiny-clip"):
        line = row(summary(), "b", metric)
        assert (line["difference"], line["difference_low"], line["difference_high"]) == (0, 0, 0)
        assert (line["p"], line["win_rate"]) == (1, 0.5)


def test_only_what_has_no_score_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", {cell: level + 100 for cell, level in GREYS.items()})
    written("x\ny\n")
    tear(Path("a/x-1.png"))
    with monkeypatch.context() as patch:
        counted = Counted(patch, refused="y")
        assert compared(*BRIGHT) == 3
        assert counted.pictures == 3
    counted = Counted(monkeypatch)
    assert compared(*BRIGHT) == 3
    assert counted.pictures == 4  # those of y, and no neighbour of theirs
    assert compared(*BRIGHT) == 3  # one picture cannot be read
    elsewhere("a", {("x", 2): 50})
    elsewhere("b", {("x", 2): 150})
    assert compared(*BRIGHT, seeds="0:3") == 3
    assert counted.pictures == 6


def test_the_page_has_every_picture_that_can_be_read_with_or_without_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", GREYS)
    written("x\ny\n")
    tear(Path("b/y-1.png"))
    pages = []
    write = running.write_page
    monkeypatch.setattr(running, "write_page", lambda page, *given, **named: pages.append(page) or write(page, *given, **named))  # fmt: skip
    for stage in (["--report-only"], []):
        assert compared(*BRIGHT, *stage) == 3
    request = EvalRequest(
        Path("out"), variants=gather_variants([], None, ["a=a", "b=b"]), prompts="p.txt", seeds=(0, 1), recorded=False
    )
    pages.append(running.pictures_of(request).page)
    assert [len(page.pictures) for page in pages] == [7, 7, 7]
    assert len({pictures_hash(page) for page in pages}) == 1


def test_how_much_of_the_page_is_written_is_told() -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    told: list[Any] = []
    images = gather_variants([], None, ["a=a"])
    request = EvalRequest(Path("out"), variants=images, prompts="p.txt", seeds=(0, 1), metrics=("brightness",))
    running.evaluate(request, told.append)
    pages = [event for event in told if isinstance(event, Progressed) and event.phase == "report"]
    assert [(event.done, event.total) for event in pages] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_is_given_beside_a_folder_counts() -> None:
    elsewhere("a", GREYS)
    elsewhere("b", {cell: level + 100 for cell, level in GREYS.items()})
    written("x\ny\n")
    assert compared(*BRIGHT) == 0
    assert (summary()["baseline"], summary()["seeds"]) == ("a", [0, 1])
    assert run(["eval", "--out", "out", "--report-only", "--baseline", "b", "--seeds", "1"]) == 0
    assert (summary()["baseline"], summary()["seeds"]) == ("b", [1])
    assert run(["eval", "--out", "out", "--baseline", "c"]) == 2
    assert (
        run(["eval", "--out", "out", "--metric", "jpeg-incompressibility", "--prompts", written("x\n", "q.txt")]) == 0
    )
    assert {r["metric"] for r in summary()["rows"]} == {"jpeg-incompressibility"}
    assert row(summary(), "a", "jpeg-incompressibility")["prompts"] == 1
    assert json.loads(Path("out/eval.json").read_text())["request"]["steps"] is None
    record = json.loads(Path("out/eval.json").read_text())
    for versions, stage in (({"torch": "1"}, ["--report-only"]), (record["versions"], [])):
        Path("out/eval.json").write_text(json.dumps({**record, "versions": {"torch": "1"}}))
        assert run(["eval", "--out", "out", *stage]) == 0
        assert json.loads(Path("out/eval.json").read_text())["versions"] == versions
    assert run(["eval", "--out", "out", "--steps", "7", "--batch", "2"]) == 0
    request = json.loads(Path("out/eval.json").read_text())["request"]
    assert (request["steps"], request["batch"], request["seeds"]) == (7, 2, [1])


@pytest.mark.parametrize(
    ("change", "code", "sentence"),
    [
        ({"variants": [{"name": "../../x", "model": "tiny"}]}, 2, "'../../x' is no name for a variant"),
        ({"variants": [{"name": 5}]}, 2, "'name' of variant 1 of 'out/eval.json' is 5"),
        ({"variants": [{"name": "a", "images": "gone"}]}, 2, "there is no folder 'gone'"),
        ({"variants": 5}, 1, "'out/eval.json' cannot be read"),
        ({"seeds": "abc"}, 1, "'out/eval.json' cannot be read"),
        ({"seeds": [True]}, 1, "'out/eval.json' cannot be read"),
        ({"metrics": [5]}, 1, "'out/eval.json' cannot be read"),
        ({"prompts": 5}, 1, "'out/eval.json' cannot be read"),
        ({"votes": [3]}, 1, "'out/eval.json' cannot be read"),
        ({"precision": "fp8"}, 1, "'out/eval.json' cannot be read"),
        ({"batch": 0}, 2, "--batch 0 is not between"),
        ({"steps": json.loads("[" * 500 + "]" * 500)}, 1, "'out/eval.json' cannot be read"),
    ],
)
def test_a_folder_of_somebody_else_is_read_with_care(
    change: dict[str, Any], code: int, sentence: str, capsys: Any
) -> None:
    """Above all, no name in it becomes a path outside."""
    elsewhere("a", GREYS)
    written("x\ny\n")
    assert compared(*BRIGHT, images=("a",)) == 0
    document = json.loads(Path("out/eval.json").read_text())
    Path("out/eval.json").write_text(json.dumps({**document, "request": {**document["request"], **change}}))
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert run(["eval", "--out", "out"]) == code
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert sorted(Path().rglob("*")) == before
    Path("out/eval.json").write_text("[" * 100_000)
    assert run(["eval", "--out", "out"]) == 1


def test_each_process_draws_on_a_gpu_of_its_own() -> None:
    launcher = {"RANK": "5", "WORLD_SIZE": "8"}
    assert [draw.gpu_of(index, 2, {}) for index in range(4)] == [0, 1, 0, 1]
    assert draw.gpu_of(5, 4, {**launcher, "LOCAL_RANK": "3"}) == 3
    assert draw.gpu_of(5, 4, launcher) == 1
    assert draw.gpu_of(1, 2, {"LOCAL_RANK": "0"}) == 1  # left over from something else
    before = torch.get_num_threads()
    sharing._begin(before + 1)
    try:
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_of_a_launchers_processes_the_first_scores_reports_and_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    shares: list[tuple[int, int]] = []

    class Apart(Team):
        """A place among two that hears of nobody."""

        size = 2

        def __init__(self) -> None:
            self.rank = int(os.environ["RANK"])

        def part(self) -> None:
            """Go."""

        close = part

    monkeypatch.setattr(sharing, "joined", Apart)
    monkeypatch.setattr(sharing, "draw_share", lambda request, shard, listener: shares.append(shard))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, documents in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        assert compared(*BRIGHT, "--json", images=("a",)) == 0
        assert capsys.readouterr().out.count("texforce_eval") == documents
        assert Path("out/eval.json").exists() == Path("out/summary.json").exists() == bool(documents)
        assert run(["eval", "--out", "out", "--report-only", "--json"]) == 0
        assert capsys.readouterr().out.count("texforce_eval") == documents
        assert compared(*BRIGHT, "--dry-run", "--json", images=("a",)) == 0
        assert capsys.readouterr().out.count("plan") == documents
    assert shares == [(1, 2), (0, 2)]

    def failing(*given: Any) -> None:
        assert json.loads(Path("out/eval.json").read_text())["request"]["seeds"] == [1]
        raise Interrupted("stopped", exit_code=130)

    monkeypatch.setattr(sharing, "draw_share", failing)
    assert compared(*BRIGHT, images=("a",), seeds="1") == 130


def test_votes_about_pictures_that_changed_are_left_out_with_a_word(capsys: Any) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", {cell: level + 100 for cell, level in GREYS.items()})
    written("x\ny\n")
    assert compared(*BRIGHT) == 0
    data = re.search(r'"hash": ?"([0-9a-f]{64})"', Path("out/report/index.html").read_text())
    assert data is not None
    cast = [{"prompt": Item("x", 0).prompt_id, "seed": 0, "left": "a", "right": "b", "winner": "left"}]
    Path("votes.json").write_text(json.dumps({"texforce_votes": 1, "data": data[1], "votes": cast}))
    assert run(["eval", "--out", "out", "--votes", "votes.json"]) == 0
    assert run(["eval", "--out", "out"]) == 0
    assert row(summary(), "b", "votes")["mean"] == 0
    elsewhere("b", {("y", 1): 200})
    capsys.readouterr()
    assert run(["eval", "--out", "out"]) == 0
    assert "the votes in 'votes.json' are about other pictures; they are left out" in capsys.readouterr().err
    assert not [r for r in summary()["rows"] if r["metric"] == "votes"]
    assert run(["eval", "--out", "out", "--votes", "votes.json"]) == 2
    assert run(["eval", "--out", "out", "--votes", "none.json"]) == 2
    assert "there is no file 'none.json'" in capsys.readouterr().err


def test_a_folder_keeps_its_prompts_and_votes(capsys: Any) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", {cell: level + 100 for cell, level in GREYS.items()})
    rows = [{"prompt": "x", "category": "ex"}, {"prompt": "y", "split": "unseen"}]
    written("".join(json.dumps(row) + "\n" for row in rows), "p.jsonl")
    pictures = [hashlib.sha256(Path(name, "x-0.png").read_bytes()).hexdigest() for name in "ab"]
    cast = {
        "prompt": Item("x", 0).prompt_id,
        "seed": 0,
        "left": "a",
        "right": "b",
        "winner": "left",
        "pictures": pictures,
    }
    written(json.dumps({"texforce_votes": 1, "data": "", "votes": [cast]}), "votes.json")
    assert compared(*BRIGHT, "--votes", "votes.json", prompts="p.jsonl") == 0
    whole = [Path("out", name).read_bytes() for name in ("summary.json", "report/index.html")]
    Path("p.jsonl").unlink()
    about_others = [{**cast, "pictures": pictures[::-1]}]  # the page of another evaluation makes a votes.json, too
    written(json.dumps({"texforce_votes": 1, "data": "", "votes": about_others}), "votes.json")
    assert run(["eval", "--out", "out", "--report-only"]) == 0
    assert run(["eval", "--out", "out", "--report-only", "--votes", "votes.json"]) == 2
    assert [Path("out", name).read_bytes() for name in ("summary.json", "report/index.html")] == whole
    Path("votes.json").unlink()
    capsys.readouterr()
    for _ in range(2):
        assert run(["eval", "--out", "out", "--report-only"]) == 0
        assert [Path("out", name).read_bytes() for name in ("summary.json", "report/index.html")] == whole
    assert capsys.readouterr().err == "writing the report\nreport: out/report/index.html\n" * 2
    assert run(["eval", "--out", "out", "--prompts", "p.jsonl"]) == 2  # what is named has to be there
    written('{"prompt": "z"}\n', "out/prompts.jsonl")
    assert run(["eval", "--out", "out", "--report-only"]) == 2  # and what is kept as it was
    written('{"prompt": "x"}\n', "p.jsonl")
    assert run(["eval", "--out", "out"]) == 0  # and one that was changed counts
    assert {line["prompts"] for line in summary()["rows"]} == {1}


def test_votes_outlive_what_is_added_and_go_with_their_pictures(capsys: Any) -> None:
    levels = {(text, seed): 10 * seed for text in "xy" for seed in range(4)}
    elsewhere("a", levels)
    elsewhere("b", {cell: level + 100 for cell, level in levels.items()})
    elsewhere("c", {cell: level + 200 for cell, level in levels.items()})
    written("x\ny\n")
    sha = {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path().glob("?/*.png")}
    cast = [
        {"prompt": Item(text, 0).prompt_id, "seed": 0, "left": "a", "right": "b", "winner": "right"}
        | {"pictures": [sha[f"{name}/{text}-0.png"] for name in "ab"]}
        for text in "xy"
    ]
    Path("votes.json").write_text(json.dumps({"texforce_votes": 1, "data": "of another page", "votes": cast}))
    assert compared(*BRIGHT, "--votes", "votes.json") == 0
    assert compared(*BRIGHT, "--votes", "votes.json", images=("a", "b", "c"), seeds="0:4") == 0
    assert "votes" not in capsys.readouterr().err
    assert row(summary(), "b", "votes")["prompts"] == 2
    elsewhere("b", {("y", 0): 7})
    assert run(["eval", "--out", "out"]) == 0
    assert "1 of 2 votes in 'votes.json' are about other pictures; they are left out" in capsys.readouterr().err
    assert row(summary(), "b", "votes")["prompts"] == 1
    Path("votes.json").write_text("{}")
    assert compared(*BRIGHT, "--votes", "votes.json", "--dry-run") == 2


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (b'{"file_name": "x-0.png", "prompt": "x", "seed": Infinity}', "line 1 of 'a/metadata.jsonl' is no row"),
        (b'{"file_name": "x-0.png", "prompt": "\xff"}', "cannot be read as UTF-8 text"),
        (b'{"file_name": "x\\u0000.png", "prompt": "x", "seed": 0}', "line 1 of 'a/metadata.jsonl' is no row"),
        (b'{"file_name": ".", "prompt": "x", "seed": 0}', ""),
        (b'{"file_name": "' + b"x" * 5000 + b'", "prompt": "x", "seed": 0}', ""),
        (b'{"file_name": "x-0.png", "prompt": "x", "seed": 0.7}', "line 1 of 'a/metadata.jsonl' is no row"),
        (b'{"file_name": "x-0.png", "prompt": "x", "seed": false}', "line 1 of 'a/metadata.jsonl' is no row"),
        (b"", "nothing in 'a' tells"),
    ],
)
def test_a_hostile_folder_is_one_sentence(index: bytes, sentence: str, capsys: Any) -> None:
    elsewhere("a", {("x", 0): 1})
    written("x\n")
    Path("a/metadata.jsonl").write_bytes(index)
    assert compared(*BRIGHT, images=("a",), seeds="0") == (2 if sentence else 3)
    assert sentence in capsys.readouterr().err


def test_blanks_around_a_prompt_are_no_part_of_it() -> None:
    elsewhere("a", {(" x ", 0): 1})
    elsewhere("b", {("x", 0): 1})
    Path("b/metadata.jsonl").write_text('{"file_name": "x-0.png", "prompt": " x", "seed": 0}\n')
    written("x\n")
    assert compared(*BRIGHT, seeds="0") == 0


@pytest.mark.parametrize("seed", ["\u00b2", "9" * 5000, "-1", "\u0663"])
def test_what_is_no_seed_is_passed_over(seed: str) -> None:
    elsewhere("a", {("x", 0): 1})
    picture = Image.new("RGB", (8, 8))
    save_png(Path("a/odd.png"), picture, {"prompt": "x", "seed": seed})
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("prompt", "x" * 2_000_000, zip=True)  # more than Pillow reads
    picture.save("a/long.png", pnginfo=chunks)
    written("x\n")
    assert compared(*BRIGHT, images=("a",), seeds="0") == 0


def test_a_prompt_of_more_letters_than_a_text_chunk_holds_is_drawn_and_known_again() -> None:
    written("a cat " * 3000 + "\n")
    arguments = ["--variant", "base=tiny", "--seeds", "0"]
    for _ in range(2):
        assert evaluate("p.txt", *arguments) == 0
        assert row(summary(), "base", "brightness")["pictures"] == 1


def test_one_model_at_a_time_is_in_memory(prompts: str, lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Any = models.load_pipeline
    loaded: list[weakref.ref[Any]] = []

    def loading(*given: Any, **named: Any) -> Any:
        assert not [one for one in loaded if one() is not None]
        pipeline = load(*given, **named)
        loaded.append(weakref.ref(pipeline.unet))
        return pipeline

    monkeypatch.setattr(models, "load_pipeline", loading)
    variants = ["--variant", "base=tiny", "--variant", f"tex=tiny+{lora}", "--variant", "more=tiny"]
    assert evaluate(prompts, *variants, "--images-only", "--seeds", "0") == 0
    assert len(loaded) == 3


def test_whole_weights_of_a_component_are_put_in_the_place_of_the_models(prompts: str) -> None:
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    for name in ("unet", "text_encoder"):
        component = getattr(pipeline, name)
        component.save_pretrained(f"same/{name}")
        for parameter in component.parameters():
            parameter.data *= 1.1
        component.save_pretrained(f"other/{name}")
    Path("v.toml").write_text(
        "".join(
            f'[[variants]]\nname = "{kind}-{name}"\nmodel = "tiny"\n{name} = "{kind}/{name}"\n'
            for kind in ("same", "other")
            for name in ("unet", "text_encoder")
        )
    )
    one = ["--variant", "base=tiny", "--variants", "v.toml", "--seeds", "0", "--images-only"]
    assert evaluate(prompts, *one) == 0
    pixels = {
        folder.name: [picture_hash(read_picture(path)) for path in sorted(folder.glob("*.png"))]
        for folder in Path("out/pictures").iterdir()
    }
    assert pixels["same-unet"] == pixels["same-text_encoder"] == pixels["base"]
    assert len({tuple(pixels[name]) for name in ("base", "other-unet", "other-text_encoder")}) == 3


def test_a_folder_that_cannot_be_is_one_sentence(capsys: Any) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    Path("out").write_text("")
    assert compared(*BRIGHT, images=("a",)) == 1
    error = capsys.readouterr().err
    assert "'out/.lock' could not be written" in error and len(error.strip().splitlines()) == 1


def test_two_evaluations_do_not_work_in_one_folder(capsys: Any) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    with held(Path("out")):
        assert compared(*BRIGHT, images=("a",)) == 1
    assert "another process works in 'out'" in capsys.readouterr().err
    assert compared(*BRIGHT, images=("a",)) == 0


def test_prompts_may_all_be_unseen_and_none_is_both(capsys: Any) -> None:
    elsewhere("a", GREYS)
    rows = [{"prompt": text, "split": "unseen"} for text in "xy"]
    written("".join(json.dumps(r) + "\n" for r in rows), "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    assert row(summary(), "a", "brightness")["prompts"] == 2
    written("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": "x"}]), "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 2
    assert "'x' is seen and unseen in 'p.jsonl'" in capsys.readouterr().err


def test_a_category_that_is_called_as_a_group_has_rows_of_its_own() -> None:
    elsewhere("a", GREYS)
    rows = [{"prompt": "x", "category": "all"}, {"prompt": "y", "category": "seen"}]
    written("".join(json.dumps(r) + "\n" for r in rows), "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    counted = {r["group"]: r["prompts"] for r in summary()["rows"] if r["metric"] == "brightness"}
    assert counted == {"all": 2, "category all": 1, "category seen": 1}


def test_a_text_of_two_categories_counts_in_both() -> None:
    elsewhere("a", GREYS)
    rows = [("x", "one"), ("y", "one"), ("x", "two"), ("x", "one")]
    written("".join(json.dumps({"prompt": p, "category": c}) + "\n" for p, c in rows), "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    counted = {r["group"]: r["prompts"] for r in summary()["rows"] if r["metric"] == "brightness"}
    assert counted == {"all": 2, "one": 2, "two": 1}
    assert 'a,x,0,seen,"one, two",brightness' in Path("out/scores.csv").read_text()
    assert '"categories":["one","two"]' in Path("out/report/index.html").read_text().replace(" ", "")


def test_a_category_that_is_not_every_prompt_has_rows_and_diversity_counts_its_pictures() -> None:
    elsewhere("a", {**GREYS, ("x", 2): 50})
    elsewhere("b", {**GREYS, ("x", 2): 50})
    written('{"prompt": "x", "category": "hard"}\n{"prompt": "y"}\n', "p.jsonl")
    assert compared(*BRIGHT, prompts="p.jsonl", seeds="0:3") == 3
    counted = {(r["group"], r["metric"]): (r["prompts"], r["pictures"]) for r in summary()["rows"]}
    assert counted == {(g, m): n for g, n in (("all", (2, 5)), ("hard", (1, 3))) for m in ("brightness", "diversity")}
    written('{"prompt": "x", "category": "hard"}\n', "p.jsonl")
    assert compared(*BRIGHT, prompts="p.jsonl", seeds="0,0") == 0
    assert {(r["group"], r["metric"]) for r in summary()["rows"]} == {("all", "brightness")}
    assert summary()["unpaired"] == {"brightness": 0}


def test_the_negation_of_what_a_lora_was_trained_on_is_in_sample(prompts: str) -> None:
    pipeline = load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
    exported = Adapter.insert(pipeline, "text-encoder", rank=1, alpha=1, seed=0).export()
    about = {"rewards": ["jpeg-compressibility"]}
    Path("l.safetensors").write_bytes(lora_bytes(exported, {"texforce": json.dumps(about)}))
    assert evaluate(prompts, "--variant", "tex=tiny+l.safetensors", "--report-only") == 3
    assert summary()["variants"][0]["in_sample"] == ["jpeg-compressibility", "jpeg-incompressibility"]


def test_every_score_is_in_a_table(prompts: str) -> None:
    rows = [{"prompt": "x", "category": "=1+1"}, {"prompt": "y", "split": "unseen"}]
    written("".join(json.dumps(r) + "\n" for r in rows), "p.jsonl")
    elsewhere("a", {("x", 0): 51, ("x", 1): 102, ("y", 0): 153, ("y", 1): 204})
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    with Path("out/scores.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    bright = [
        (r["variant"], r["prompt"], r["seed"], r["split"], r["category"], round(float(r["value"]), 3))
        for r in found
        if r["metric"] == "brightness"
    ]
    assert bright == [
        ("a", "x", "0", "seen", "'=1+1", 0.2),
        ("a", "x", "1", "seen", "'=1+1", 0.4),
        ("a", "y", "0", "unseen", "", 0.6),
        ("a", "y", "1", "unseen", "", 0.8),
    ]
    assert [(r["prompt"], r["seed"]) for r in found if r["metric"] == "diversity"] == [("x", ""), ("y", "")]


# --- what a stranger tries --------------------------------------------------------------------------------------------


def test_metrics_are_on_the_gpu_that_was_named_also_where_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    claimed, ones, score = [], torch.ones, Brightness.score

    def scoring(*given: Any) -> Any:
        assert claimed == ["cuda:1"]
        return score(*given)

    monkeypatch.setattr(Brightness, "score", scoring)
    monkeypatch.setattr(torch, "ones", lambda size, device=None: ones(size))
    monkeypatch.setattr(torch.cuda, "set_device", claimed.append)
    assert compared(*BRIGHT, "--score-only", "--device", "cuda:1", images=("a",)) == 0
    assert row(summary(), "a", "brightness")["pictures"] == 4


def test_two_pictures_of_the_same_prompt_and_seed_are_not_chosen_from(capsys: Any) -> None:
    elsewhere("a/base", GREYS)
    written("x\ny\n")
    assert compared(*BRIGHT, images=("a",)) == 0
    elsewhere("a/tuned", {("z", 0): 1})  # nobody asks for it
    elsewhere("a/tuned/more", {("z", 0): 1})
    assert compared(*BRIGHT, images=("a",)) == 0
    for hidden in (".x-0.0123abcd.tmp.png", "._x-0.png", ".ipynb_checkpoints/x-0.png"):
        Path("a/base", hidden).parent.mkdir(exist_ok=True)
        shutil.copy("a/base/x-0.png", Path("a/base", hidden))
    assert compared(*BRIGHT, images=("a",)) == 0
    elsewhere("a/tuned", {("y", 1): 90})
    assert compared(*BRIGHT, images=("a",)) == 2
    assert "two pictures of 'y' with seed 1, 'base/y-1.png' and 'tuned/y-1.png'" in capsys.readouterr().err
    rows = [{"file_name": f"tuned/{name}.png", "prompt": "y", "seed": 1} for name in ("y-1", "y-1")]
    Path("a/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert compared(*BRIGHT, images=("a",)) == 3  # one line twice is one picture
    assert row(summary(), "a", "brightness")["mean"] == pytest.approx(90 / 255)


def test_wherever_a_kill_cuts_off_the_scores_a_batch_counts_whole_or_not_at_all(tmp_path: Path) -> None:
    whole = ScoreFile(tmp_path / "whole")
    batches = [[(name, "a cat", "m", "1", 0.5) for name in names] for names in ("abc", "d", "ef")]
    for batch in batches:
        whole.add(batch)
    data = (tmp_path / "whole").read_bytes()
    known = set()
    for end in range(len(data) + 1):
        (tmp_path / "cut").write_bytes(data[:end])
        cut = ScoreFile(tmp_path / "cut")
        known.add("".join(name for name in "abcdef" if cut.get(name, "a cat", "m", "1") is not None))
        assert (cut.versions("m") == ["1"]) == (cut.get("a", "a cat", "m", "1") is not None)
        cut.add(batches[0])  # what is scored again counts, beside what was cut off
        assert ScoreFile(tmp_path / "cut").get("c", "a cat", "m", "1") == 0.5
    assert known == {"", "abc", "abcd", "abcdef"}


def test_scores_that_were_cut_off_within_a_batch_end_in_the_same_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, more in (("a", 0), ("b", 100)):
        elsewhere(name, {(text, seed): 7 * seed + len(text) + more for text in ("x", "yy") for seed in range(5)})
    written("x\nyy\n")
    counted = Counted(monkeypatch)
    assert compared(*BRIGHT, "--batch", "8", seeds="0:5") == 0
    whole, scores = Path("out/summary.json").read_bytes(), Path("out/scores.jsonl").read_bytes()
    for lines in (3, 8, 11):
        Path("out/scores.jsonl").write_bytes(b"".join(scores.splitlines(keepends=True)[:lines]))
        counted.pictures = 0
        assert run(["eval", "--out", "out"]) == 0
        assert Path("out/summary.json").read_bytes() == whole
        assert counted.pictures == (20 if lines == 3 else 12)


def test_another_version_or_option_of_a_reward_is_scored_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    counted = Counted(monkeypatch)
    for version, pictures in (("1", 4), ("1", 4), ("2", 8), ("1", 8)):
        monkeypatch.setattr("texforce_cli.rewards.registry.__version__", version)
        assert compared(*BRIGHT, images=("a",)) == 0
        assert counted.pictures == pictures

    def version_of(package: str, **options: str) -> str:
        return Metric(TermSpec("m", options=options), RewardInfo("m", "m:R", *package.split())).version(
            ScoreFile(Path("none"))
        )

    versions = [
        version_of("third 1"), version_of("third 2"), version_of("other 1"), version_of("third 1", a="1", b="2"),
        version_of("third 1", a="1,b=2"), version_of("third 1", a="1,,b=2"), version_of("third 1", a="1"),
    ]  # fmt: skip
    assert len(set(versions)) == len(versions)


def test_the_report_alone_makes_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    assert compared(*BRIGHT, "--metric", "tiny-clip", images=("a",)) == 0
    whole = Path("out/summary.json").read_bytes()
    elsewhere("a", {("y", 1): 90})
    monkeypatch.setattr(RewardInfo, "create", lambda *given: pytest.fail("a reward was made"))
    monkeypatch.setattr("texforce_cli.devices.resolve_device", lambda name: pytest.fail("a device was asked for"))
    assert run(["eval", "--out", "out", "--report-only", "--device", "cuda:1"]) == 3
    assert [entry["what"] for entry in summary()["missing"]] == ["brightness: not scored", "tiny-clip: not scored"]
    elsewhere("a", {("y", 1): 40})
    assert run(["eval", "--out", "out", "--report-only"]) == 0
    assert Path("out/summary.json").read_bytes() == whole


def test_the_report_alone_needs_neither_the_version_nor_the_plugin_that_scored(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    elsewhere("a", GREYS)
    written("".join(json.dumps({"prompt": text, "level": 1}) + "\n" for text in "xy"), "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    whole = Path("out/summary.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("texforce_cli.rewards.registry.__version__", "999")
        assert run(["eval", "--out", "out", "--report-only"]) == 0
        said = f"the scores of brightness are those of 'texforce {__version__}', which is not what is installed"
        assert said in capsys.readouterr().err and Path("out/summary.json").read_bytes() == whole
    monkeypatch.setattr(running, "load_registry", Registry)
    assert run(["eval", "--out", "out", "--report-only"]) == 0
    assert said in capsys.readouterr().err and Path("out/summary.json").read_bytes() == whole
    assert run(["eval", "--out", "out"]) == 2
    Path("out/summary.json").unlink()
    assert run(["eval", "--out", "out", "--report-only"]) == 2
    assert "unknown reward 'brightness'" in capsys.readouterr().err


def test_what_one_variant_lacks_leaves_all_of_them_and_is_counted(capsys: Any) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", {cell: level + 100 for cell, level in GREYS.items() if cell != ("x", 0)})
    elsewhere("c", {cell: level + 200 for cell, level in GREYS.items() if cell != ("y", 1)})
    written("x\ny\nz\n")  # nobody has z
    assert compared(*BRIGHT, images=("a", "b", "c")) == 3
    found = summary()
    assert found["unpaired"] == {"brightness": 4, "diversity": 3}
    sentence = "brightness: 4 pictures of each variant are left out"
    assert sentence in capsys.readouterr().err and sentence in Path("out/report/index.html").read_text()
    assert [(r["prompts"], r["pictures"]) for r in found["rows"] if r["metric"] == "brightness"] == [(2, 2)] * 3
    assert row(found, "a", "brightness")["mean"] == pytest.approx(25 / 255)  # of 20 and 30 alone
    assert len(found["missing"]) == 2 + 3 * 2


def test_p_is_adjusted_over_every_variant_and_metric_of_a_group() -> None:
    about = [
        ("all", "b", "m", 0.01), ("all", "b", "n", 0.04), ("all", "c", "m", 0.03), ("all", "a", "m", None),
        ("seen", "b", "m", 0.01), ("seen", "c", "m", 1.0),
    ]  # fmt: skip
    fields = Row.__dataclass_fields__
    rows = [
        Row(**{**dict.fromkeys(fields), "group": group, "variant": variant, "metric": metric, "p": p})
        for group, variant, metric, p in about
    ]
    assert [r.p_holm for r in adjusted(rows)] == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06), None, 0.02, 1]  # fmt: skip


def test_what_is_a_single_value_is_no_test_that_others_are_adjusted_for() -> None:
    elsewhere("a", {("x", seed): 10 for seed in range(3)})
    elsewhere("b", {("x", seed): 20 + seed for seed in range(3)})
    written("x\n")
    assert compared(*BRIGHT, seeds="0:3") == 0
    assert [(r["metric"], r["p"], r["p_holm"]) for r in summary()["rows"] if r["variant"] == "b"] == [
        ("brightness", 0.25, 0.25),
        ("diversity", None, None),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variant", "a=tiny+~nobody-is-called-so/x+y"], "~nobody-is-called-so/x"),
        (
            ["--variant", "a=tiny+" + "+".join(f"lora_number_{n}.safetensors:0.5" for n in range(12))],
            "there is no LoRA",
        ),
        (["--variant", "a=tiny+unet=~nobody-is-called-so/x"], "is not there yet"),
        (["--images", "a=~nobody-is-called-so/x"], "there is no folder"),
        (["--images", "a=" + "x" * 300], "there is no folder"),
        (["--variant", "a=tiny", "--votes", "~nobody-is-called-so/votes.json"], "there is no file"),
        (["--variant", "a=tiny", "--votes", "x" * 300], "there is no file"),
        (["--variant", "a=tiny", "--prompts", "~nobody-is-called-so/p.txt"], "there is no file"),
        (["--variant", "a=tiny", "--prompts", "x" * 300 + ".txt"], "cannot be read"),
        (["--variants", "deep.toml"], "cannot be read"),
    ],
)
def test_a_path_that_cannot_be_is_one_sentence(arguments: list[str], sentence: str, capsys: Any) -> None:
    Path("deep.toml").write_text("variants = " + "[" * 100_000)
    planned = ["--dry-run"] if "yet" in sentence else []
    assert run(["eval", "--prompts", "color", *BRIGHT, "--out", "out", *arguments, *planned]) == (0 if planned else 2)
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1


def test_a_path_that_ends_as_if_with_a_weight_is_whole(tmp_path: Path) -> None:
    for name in ("runs/a:1", "runs/b+c:0.5", "both", "both:2"):
        Path(name).mkdir(parents=True)
    Path("unet=x.safetensors").write_bytes(b"")
    assert parse_variant("x=tiny+unet=x.safetensors:2+unet=y.safetensors").loras == ("unet=x.safetensors:2",)
    variant = parse_variant("x=tiny+runs/a:1+runs/b+c:0.5+runs/b+c:0.5:-2+both:2+none:3")
    assert variant.loras == ("runs/a:1:1", "runs/b+c:0.5:1", "runs/b+c:0.5:-2", "both:2", "none:3")
    assert [parse_lora(text).source for text in variant.loras] == ["runs/a:1", "runs/b+c:0.5", "runs/b+c:0.5", "both", "none"]  # fmt: skip
    (tmp_path / "v.toml").write_text('[[variants]]\nname = "x"\nloras = ["runs/a:1"]\n')
    assert read_variants(tmp_path / "v.toml")[0].loras == ("runs/a:1:1",)


def test_the_words_of_a_set_are_those_of_the_loras_base_whatever_this_machine_would_choose(
    lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_automatic", lambda device: models.known_model("sd15"))

    def first(*variants: str) -> str:
        request = EvalRequest(Path("out"), variants=gather_variants(variants, None, []), prompts="color")
        return prompts_of(request).seen[0].text

    assert first("base=auto") == first("base=sd15") == "A green colored rabbit"
    assert first("base=auto", "gone=auto+none.safetensors", f"tex=auto+{lora}") == first("base=tiny")


def test_the_words_of_a_set_are_those_of_the_pictures_where_nothing_is_drawn() -> None:
    drawn = ["--variant", "base=tiny", "--prompts", "color", "--seeds", "0", "--steps", "1", "--guidance", "1"]
    assert run(["eval", *drawn, "--images-only", "--out", "a"]) == 0
    assert compared(*BRIGHT, images=("a",), prompts="color", seeds="0") == 0
    words = load_prompts("color", "tiny", to_train=False)
    assert row(summary(), "a", "brightness")["prompts"] == len({p.text for p in (*words.seen, *words.unseen)})


def test_votes_on_the_same_pictures_are_averaged_before_they_are_counted() -> None:
    items = items_of([Prompt("x")], range(4))
    votes = [Vote(items[0].prompt_id, seed, "b", "a", points) for seed, points in enumerate((1.0, 1.0, 1.0, 0.0))]
    once = count_votes(votes, ("a", "b"), "a", items, frozenset())
    assert once[1][0].difference_low is not None and once[1][0].label == "for this prompt only"
    assert (
        count_votes(votes * 5, ("a", "b"), "a", items, frozenset())[1:] == once[1:]
    )  # a file that is given five times
    strange = [Vote(items[0].prompt_id, 0, "a", "a", 1.0), Vote("other", 0, "a", "b", 1.0), Vote(items[0].prompt_id, 0, "a", "z", 1.0)]  # fmt: skip
    assert count_votes([*votes, *strange], ("a", "b"), "a", items, frozenset()) == once
    assert once[0].version == "4 votes"


def test_votes_alone_are_a_metric(capsys: Any) -> None:
    elsewhere("a", GREYS)
    elsewhere("b", {cell: level + 100 for cell, level in GREYS.items()})
    written("x\ny\n")
    assert compared(*BRIGHT, seeds="0") == 0
    data = re.search(r'"hash": ?"([0-9a-f]{64})"', Path("out/report/index.html").read_text())
    assert data is not None
    cast = [
        {"prompt": Item(text, 0).prompt_id, "seed": 0, "left": "b", "right": "a", "winner": "left"} for text in "xy"
    ]
    Path("votes.json").write_text(json.dumps({"texforce_votes": 1, "data": data[1], "votes": cast}))
    assert compared("--votes", "votes.json", seeds="0") == 0
    assert [(r["variant"], r["metric"], r["win_rate"]) for r in summary()["rows"]] == [("b", "votes", 1)]
    for document in (b"[" * 100_000, b'{"texforce_votes": 1, "data": "", "votes": [' + b"9" * 5000 + b"]}", b"\xff"):
        Path("votes.json").write_bytes(document)
        capsys.readouterr()
        assert compared("--votes", "votes.json", seeds="0") == 2
        assert "'votes.json' holds no votes" in capsys.readouterr().err
    with Path("votes.json").open("wb") as file:
        file.truncate(64_000_001)
    assert compared("--votes", "votes.json", seeds="0") == 2
    assert "it is too large" in capsys.readouterr().err


def test_a_category_may_be_a_number() -> None:
    elsewhere("a", GREYS)
    written('{"prompt": "x", "category": 1}\n{"prompt": "y", "category": " 2 "}\n', "p.jsonl")
    assert compared(*BRIGHT, images=("a",), prompts="p.jsonl") == 0
    assert {r["group"] for r in summary()["rows"] if r["metric"] == "brightness"} == {"all", "1", "2"}
    assert '"categories":["2"]' in Path("out/report/index.html").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_draws_ends_with_the_one_that_began_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def drawing_on() -> None:
        sharing._begin(1)
        writer.send("begun")
        time.sleep(60)

    def killed() -> None:
        context.Process(target=drawing_on).start()
        reader.recv()
        os.kill(os.getpid(), signal.SIGKILL)

    parent = context.Process(target=killed)
    parent.start()
    writer.close()
    parent.join()
    assert reader.poll(20)
    with pytest.raises(EOFError):  # nobody is left who could write
        reader.recv()


def test_a_branch_of_the_hub_is_its_commit_from_the_first_picture_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder, commit = tmp_path / "hub" / "models--someone--model", "c" * 40

    def download(repository: str, file: str, *, revision: str) -> None:
        for path, text in ((f"snapshots/{commit}/{file}", "{}"), (f"refs/{revision}", commit)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    request = EvalRequest(Path("out"), variants=(parse_variant("a=someone/model"),))
    first, again = (draw.recipes(request, to_draw=True)[0].settings["model"] for _ in range(2))
    assert first == again == {"revision": commit}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere these are no names of files")
def test_files_may_be_called_anything(capsys: Any) -> None:
    elsewhere("a", GREYS)
    written("x\ny\n")
    for number, path in enumerate(sorted(Path("a").iterdir())):
        path.rename(os.fsdecode(b"a/\xff\n[red]{{ 7 * 7 }}<script>\"'%d.png" % number))
    wide = Image.new("RGB", (20_000, 1))
    save_png(Path(os.fsdecode(b"a/\xff\n[red]<script>large.png")), wide, {"prompt": "x", "seed": "2"})
    assert compared(*BRIGHT, "--json", images=("a",), seeds="0:3") == 3
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert row(document, "a", "brightness")["pictures"] == 4
    (reason,) = [entry["what"] for entry in document["missing"] if entry["prompt"] == "x"]
    assert reason == "'\udcff\n[red]<script>large.png' has 20000 x 1 pixels"
    assert summary()["missing"] == document["missing"]
    assert "large.png' has 20000 x 1 pixels" in shown.err and "\x1b" not in shown.err
    assert "[red]&lt;script&gt;large.png" in Path("out/report/index.html").read_text()
