"""The manners of the command line: quick, one sentence for a mistake, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from lora_files import kohya

import texforce_cli
from texforce_cli.cli import console, evaluate
from texforce_cli.cli.app import make_app, run
from texforce_cli.errors import UsageError

HEAVY = ("torch", "diffusers", "transformers", "peft", "matplotlib", "numpy", "PIL", "asyncio")
UNUSED_BY_A_PIPED_LIST = ("rich.console", "rich.table", "hashlib", "texforce_cli.config")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["train", "--help"], ["sample", "--help"], ["rewards"], ["--show-completion"], []],
)
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    unwanted = HEAVY + (UNUSED_BY_A_PIPED_LIST if arguments == ["rewards"] else ())
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['texforce', *{arguments!r}]\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {unwanted!r} if m in sys.modules]))\n"
        "from texforce_cli.__main__ import main\n"
        "main()\n"
    )
    told = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=told)
    assert "HEAVY []" in result.stdout, result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_help_shows_the_ten_that_matter_first_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    first = text.index("The ones that matter first")
    assert first < min(text.index(panel) for panel in (" Model ", " Sampling ", " Optimisation ", " Output "))
    assert "texforce train --reward jpeg-incompressibility" in text
    assert "Go on with this run." in text and "[@REVISION]" in "".join(text.split())
    assert "MISSING" not in text and "<str>" not in text


def test_no_arguments_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "sample", "demo", "rewards"))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"texforce {texforce_cli.__version__}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_command_does_not_listen_for_is_a_sentence(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from texforce_cli.workflows import sample as workflow

    monkeypatch.setattr(workflow, "sample", lambda request, listener: signal.raise_signal(number))
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    try:
        before = signal.getsignal(number)
        assert run(["sample", "a cat"]) == run(["sample", "a cat", "--json"]) == code
        assert signal.getsignal(number) == before
    finally:
        signal.signal(signal.SIGINT, ours)
    said = capsys.readouterr()
    assert said.err == "stopped: what was finished is kept\n" * 2
    assert json.loads(said.out)["error"]["exit_code"] == code


def test_rewards_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rewards"]) == 0
    assert "jpeg-incompressibility" in capsys.readouterr().out
    assert run(["rewards", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"brightness", "jpeg-compressibility"} <= {reward["name"] for reward in document["rewards"]}


def with_and_without_rich(
    say: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[tuple[str, str], tuple[str, str]]:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    say()
    without = capsys.readouterr()
    monkeypatch.setattr(console, "plain", lambda stream: False)
    say()
    return without, capsys.readouterr()


def test_a_piped_list_of_rewards_is_the_table_of_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without, with_rich = with_and_without_rich(lambda: print(run(["rewards"])), monkeypatch, capsys)
    assert without == with_rich and "jpeg-incompressibility" in without[0]


@pytest.mark.parametrize(
    "cells",
    [
        ("a :cat: [bold]b[/bold]", "x"),
        ("猫猫", "two columns a letter"),
        ("several\nlines", "x"),
        ("word " * 50, "x"),
        ("\x1b[2J", "x"),
    ],
)
def test_columns_are_set_as_rich_sets_them(
    cells: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [cells, ("brightness", console.Dim("not installed")), ("", "")]
    without, with_rich = with_and_without_rich(
        lambda: console.show_columns(("name", "state"), rows, unbroken=("state",)), monkeypatch, capsys
    )
    assert without == with_rich and "not installed" in without[0]


def test_remarks_without_a_terminal_are_what_rich_would_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say() -> None:
        console.note("[red]a[/red] :cat: \x1b[2J " + "word " * 60)
        console.warn("two\nlines [b]")
        console.show_error(UsageError("no 'a[b]\n.txt'", "write [c]"), as_json=False)

    without, with_rich = with_and_without_rich(say, monkeypatch, capsys)
    assert without == with_rich and "error: no 'a[b] .txt'; write [c]" in without[1]


def test_who_says_that_there_is_a_terminal_gets_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console.show_columns(("name",), [(console.Dim("a"),)])
    assert "\x1b[2ma\x1b[0m" in capsys.readouterr().out


TRAIN = ["train", "--reward", "brightness", "--model", "tiny"]


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (["train"], ["no reward was given"]),
        (["train", "--reward", "brightnes"], ["unknown reward 'brightnes'", "did you mean 'brightness'"]),
        (["train", "--reward", "brightness:x"], ["the weight 'x'"]),
        ([*TRAIN, "--model", "sd-15"], ["unknown model 'sd-15'", "did you mean 'sd15'"]),
        ([*TRAIN, "--model", "stabilityai/stable-diffusion-xl-base-1.0"], ["is SDXL"]),
        ([*TRAIN, "--model", "runwayml/stable-diffusion-v1-5"], ["was taken down", "--model sd15"]),
        ([*TRAIN, "--model", "a.ckpt"], ["'a.ckpt' is not a .safetensors file", "can run code"]),
        ([*TRAIN, "--model", "a.safetensors"], ["there is no file 'a.safetensors'"]),
        ([*TRAIN, "--prompts", "animal"], ["unknown prompts 'animal'", "did you mean 'animals'"]),
        ([*TRAIN, "--prompts", "empty.txt"], ["'empty.txt' is empty"]),
        ([*TRAIN, "--prompts", "binary.txt"], ["'binary.txt' is binary"]),
        ([*TRAIN, "--out", "full"], ["'full' exists already", "--resume full"]),
        ([*TRAIN, "--out", "empty.txt"], ["'empty.txt' exists already"]),
        ([*TRAIN, "--rank", "0"], ["--rank 0 (flag) must be above 0"]),
        ([*TRAIN, "--epochs", "-3"], ["--epochs -3 (flag) must be above 0"]),
        ([*TRAIN, "--lr", "nan"], ["--lr 'nan' (flag) is not a number"]),
        ([*TRAIN, "--preset", "tinny"], ["did you mean 'tiny'"]),
        ([*TRAIN, "--device", "cuda:7"], ["the device 'cuda:7' is not available here"]),
        ([*TRAIN, "--size", "66"], ["is not a positive multiple of 4"]),
        ([*TRAIN, "--init-lora", "nowhere"], ["there is no LoRA 'nowhere'"]),
        ([*TRAIN, "--init-lora", "nowhere", "--dry-run"], ["there is no LoRA 'nowhere'"]),
        ([*TRAIN, "--config", "bad.toml"], ["2 mistakes", "unknown key 'stepz'", "did you mean 'steps'", "--rank 0"]),
        ([*TRAIN, "--config", "none.toml"], ["there is no file 'none.toml'"]),
        ([*TRAIN, "--reward-option", "brightness.x=1"], ["has no option 'x'"]),
        ([*TRAIN, "--nonsense"], ["No such option"]),
        ([*TRAIN, "--fit-micro-batch", "--dry-run"], ["No such option"]),
        (["trian"], ["No such command"]),
        (["demo", "--images", "1"], ["256"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentences: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"a\x00b")
    Path("bad.toml").write_text("stepz = 5\nrank = 0\n")
    Path("a.ckpt").write_bytes(b"x")
    Path("full").mkdir()
    Path("full/a").write_text("")
    before = sorted(str(path) for path in Path().rglob("*"))
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert all(sentence in error for sentence in sentences), error
    assert "Traceback" not in error
    assert sorted(str(path) for path in Path().rglob("*")) == before  # nothing is left behind


def test_an_unwritable_folder_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert run([*TRAIN, "--out", "file/run"]) == 1
    error = capsys.readouterr().err
    assert "file/run" in error.replace("\\", "/") and "choose another folder with --out" in error


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("fuse {lora} --out=~/x.safetensors", "{home}/x.safetensors"),
        ("fuse --extract {full0} {full1} --rank 1 --out=~/x.safetensors", "{home}/x.safetensors"),
        ("sample cat --model tiny --steps 1 --seeds 1 --out=~/x", "{home}/x"),
        ("rewards new sharp --out=~/x", "{home}/x"),
        ("eval --report-only --out=~/x", "'{home}/x' holds no evaluation"),
        ("train --config=~/x.toml", "{home}/x.toml"),
    ],
)
def test_a_home_is_understood_where_the_shell_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    """bash does not expand the ~ of --out=~/x."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for value in (0, 1):
        safetensors.numpy.save_file(
            {"conv_in.weight": np.full((2, 2, 3, 3), value, np.float32)}, f"full{value}.safetensors"
        )
    names = {"lora": kohya(tmp_path / "y")[0], "full0": "full0.safetensors", "full1": "full1.safetensors"}
    run(command.format(**names).split())
    assert str(Path(said.format(home=home))) in "".join(capsys.readouterr()).replace("\n", "")
    assert not Path("~").exists()


def test_a_line_break_in_a_name_makes_no_second_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse", "no such\nfile.safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_with_json_is_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--reward", "nothing", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["message"].startswith("unknown reward")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fuse", "a.safetensors", "--rank", "0"], "Invalid value for '--rank': 0 is not in the range x>=1"),
        (["train", "--bogus"], "No such option: --bogus"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_a_command_that_is_not_understood_is_a_document_with_json(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"].startswith(told) and error["exit_code"] == 2
    assert run(arguments) == 2
    told_to_people = capsys.readouterr()
    assert told in told_to_people.err and not told_to_people.out


def test_debug_shows_the_traceback() -> None:
    from texforce_cli.errors import UsageError

    with pytest.raises(UsageError):
        run(["train", "--reward", "nothing", "--debug"])


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "texforce_cli", "rewards", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(60) == 0, error
    assert "Traceback" not in error and "BrokenPipe" not in error


def test_the_python_interface() -> None:
    from texforce_cli import TexforceError, resume, sample, train

    result = train(
        "brightness", model="tiny", epochs=1, samples_per_epoch=8, group_size=4, micro_batch=4, grad_accum=1, steps=2,
        train_steps="first:1", eval_images=2, out="a",
    )  # fmt: skip
    drawn = sample(["a cat"], loras=[result.adapter], seeds=range(2), out="p")
    assert len(drawn.files) == 2
    assert resume("a").epochs == 1
    with pytest.raises(TexforceError, match="unknown option 'step'"):
        train("brightness", step=3)


def test_a_command_does_not_wait_for_the_options_of_the_others() -> None:
    def names(arguments: list[str]) -> list[str | None]:
        app = make_app(arguments)
        return [one.name for one in (*app.registered_commands, *app.registered_groups)]

    assert names(["rewards"]) == ["rewards"]
    assert names(["--debug", "train", "--reward", "fuse"]) == ["train"]
    assert (
        names([]) == names(["trian"]) == ["train", "sample", "eval", "gpt4v-rank", "fuse", "demo", "doctor", "rewards"]
    )


def test_names_in_the_table_of_an_evaluation_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    row = types.SimpleNamespace(
        group="[red]all",
        metric="m",
        variant="[i]b",
        prompts=2,
        mean=1.0,
        difference=None,
        difference_low=None,
        difference_high=None,
        win_rate=None,
        p_holm=None,
        label="",
    )
    other = types.SimpleNamespace(**{**vars(row), "group": "seen"})
    summary: Any = types.SimpleNamespace(rows=[row, other], baseline="[bold]a", about={})
    evaluate._show(summary)
    out = capsys.readouterr().out
    assert "[red]all" in out and "difference to [bold]a" in out and "[i]b" in out
