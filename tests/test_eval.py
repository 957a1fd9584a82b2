"""`texforce eval` through the real command on the embedded model."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from texforce_cli.cli.app import run
from texforce_cli.diffusion.adapters import Adapter
from texforce_cli.diffusion.models import load_pipeline, resolve_model
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.lora.write import lora_bytes
from texforce_cli.prompts import Prompt
from texforce_cli.report.pictures import read_picture
from texforce_cli.team import launched
from texforce_cli.workflows.evaluation.pictures import Item, items_of
from texforce_cli.workflows.evaluation.scores import ScoreFile
from texforce_cli.workflows.evaluation.variants import parse_variant, read_variants
from texforce_cli.workflows.loras import trained_on

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
    lines = Path("out/summary.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found["rows"])
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
    Image.open(two[2]).convert("RGBA").save(two[2])
    Image.open(two[3]).quantize(8).save(two[3])
    Image.open(two[4]).resize((100, 80)).save(two[4])
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
    assert "10 are missing" in capsys.readouterr().err.replace("5 more", "10") or summary()["missing"]
    Path("empty").mkdir()
    assert evaluate(prompts, "--images", "a=drawn", "--images", "c=empty", out="other") == 2
    assert "nothing in 'empty' tells" in capsys.readouterr().err
    Path("indexed/metadata.jsonl").write_text('{"file_name": "../drawn/x.png", "prompt": "a cat"}\n')
    assert evaluate(prompts, "--images", "b=indexed", out="other") == 2
    assert "names a file outside" in capsys.readouterr().err


def test_a_metric_that_raises_on_one_picture_costs_one_picture(prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from texforce_cli.rewards.builtin.pictures import Brightness

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
    import os

    environments = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = [subprocess.Popen([*command, *arguments], env=env, stderr=subprocess.DEVNULL) for env in environments]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert Path("launched/summary.json").read_bytes() == Path("one/summary.json").read_bytes()
    assert not list(Path("launched").glob(".drawn*"))


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
        (["--variants", "none.toml"], 2, "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], code: int, sentence: str, capsys: Any) -> None:
    assert run(["eval", *arguments, "--out", "out"]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


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
    capsys.readouterr()
    for wrong, sentence in (
        ({**document, "data": "0"}, "are about other pictures"),
        ({**document, "texforce_votes": 2}, "holds no votes"),
        ({**document, "votes": [{"prompt": 1}]}, "holds no votes"),
        ([], "holds no votes"),
    ):
        Path("wrong.json").write_text(json.dumps(wrong))
        assert run(["eval", "--out", "out", "--report-only", "--votes", "wrong.json"]) == 2
        assert sentence in capsys.readouterr().err


RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_papers_tables_is_sound(recipe: Path, capsys: Any) -> None:
    """Its command, on other prompts, with --dry-run: nothing is fetched."""
    command = next(line for line in recipe.read_text().splitlines() if "texforce eval" in line)
    arguments = command.split("texforce ")[1].split()
    arguments[arguments.index("--variants") + 1] = str(recipe)
    assert arguments[arguments.index("--prompts") + 1] == "imagereward-100"
    arguments[arguments.index("--prompts") + 1] = "color"
    assert run([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [v["name"] for v in plan["variants"]][:4] == ["original", "refl", "texforce", "refl-texforce"]
    assert plan["metrics"] == ["image-reward"]
    assert len(plan["not_there_yet"]) in (2, 3)


def test_separators_survive_paths(tmp_path: Path) -> None:
    odd = tmp_path / "a+b=c:1"
    odd.mkdir()
    (odd / "x+y.safetensors").write_bytes(b"")
    variant = parse_variant(f"tex=sd15+{odd}/x+y.safetensors:te=0.5,unet=1+other:-2")
    assert (variant.name, variant.model) == ("tex", "sd15")
    assert variant.loras == (f"{odd}/x+y.safetensors:te=0.5,unet=1", "other:-2")
    assert variant.description == "sd15 + x+y.safetensors:te=0.5,unet=1 + other:-2"
    assert parse_variant(f"m={odd}").model == str(odd)


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
    assert trained_on("none") == set()


def test_a_picture_is_read_as_rgb_on_white_and_a_broken_one_is_told(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").shape == (4, 4, 3)
    (tmp_path / "no.png").write_bytes(b"<svg/>")
    for name, sentence in (("no.png", "no whole picture"), ("none.png", "is missing")):
        with pytest.raises(TexforceError, match=sentence):
            read_picture(tmp_path / name)


def test_cells_are_distinct_and_their_noise_is_fixed() -> None:
    items = items_of([Prompt("a"), Prompt("b"), Prompt("a")], [0, 1, 0])
    assert [(item.text, item.seed) for item in items] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len({item.noise for item in items}) == 4
    assert Item("a", 0).noise == items[0].noise


def test_scores_survive_a_torn_line_and_nonsense(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path / "s.jsonl")
    file.add([("p", "a cat", "m", "1", 0.5), ("p", "line\u2028end", "m", "1", 1 / 3)])
    with (tmp_path / "s.jsonl").open("ab") as handle:
        handle.write(b'[1]\n{"picture": "x", "prompt": "y", "metric": "m", "version": "1", "value": NaN}\n{"torn')
    again = ScoreFile(tmp_path / "s.jsonl")
    assert again.get("p", "a cat", "m", "1") == 0.5
    assert again.get("p", "line\u2028end", "m", "1") == 1 / 3
    assert again.get("x", "y", "m", "1") is None
    again.add([("q", "z", "m", "1", 2.0)])
    assert ScoreFile(tmp_path / "s.jsonl").get("q", "z", "m", "1") == 2.0
    assert math.isclose(len((tmp_path / "s.jsonl").read_bytes().splitlines()), 5, abs_tol=1)


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
