"""Rankings: statistics by hand and against other software, and `texforce gpt4v-rank` through the real command."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import choix
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from texforce_cli.cli.app import run
from texforce_cli.core.ranking import (
    RIDGE,
    Duel,
    bradley_terry,
    detectable_rate,
    kendall_w,
    krippendorff_alpha,
    position_effect,
    sign_test,
    win_rates,
)
from texforce_cli.errors import TexforceError
from texforce_cli.judging.answers import Opinion
from texforce_cli.judging.ledger import Ledger
from texforce_cli.judging.questions import Case, Mode, Question, questions_of
from texforce_cli.report.verdicts import ranking_tabs
from texforce_cli.workflows.ranking import run as ranking_run
from texforce_cli.workflows.ranking.summary import case_ranks, rank, settled_duels, shown_duels

VARIANTS = ["bright", "dark", "middle"]
KEY = "sk-never-to-be-seen-1234567890"

# statistics -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_strengths_are_those_of_choix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = list("abcd")
    games = [tuple(rng.permutation(4)[:2]) for _ in range(40)]
    duels = [Duel(str(k % 7), names[i], names[j], 1.0) for k, (i, j) in enumerate(games)]
    ours = [value.mean for value in bradley_terry(duels, names).values()]
    theirs = choix.opt_pairwise(4, [(int(i), int(j)) for i, j in games], alpha=RIDGE)
    assert ours == pytest.approx(list(theirs - theirs.mean()), abs=1e-5)


def test_the_strength_of_one_win_by_hand() -> None:
    # the minimum of log(1 + e^-2s) + 2 r s^2 where the two strengths are s and -s: 1 / (1 + e^2s) = 2 r s
    found = bradley_terry([Duel("p", "a", "b", 1.0)], ["a", "b"])
    s = found["a"].mean
    assert 1 / (1 + math.exp(2 * s)) == pytest.approx(2 * RIDGE * s)
    assert found["b"].mean == pytest.approx(-s)
    assert found["a"].low == -math.inf  # one prompt says nothing of others


def test_separable_data_have_finite_strengths_and_nobody_judged_has_none() -> None:
    duels = [Duel(str(k), "a", "b", 1.0) for k in range(500)]
    found = bradley_terry(duels, ["a", "b", "c"])
    assert 2 < found["a"].mean < 10
    assert found["a"].low == -math.inf  # every resample is the same: how much stronger, nobody can say
    assert (found["c"].mean, found["c"].low) == (pytest.approx(0, abs=1e-9), -math.inf)
    assert bradley_terry([], ["a", "b"])["a"].mean == 0


def test_intervals_are_of_prompts_and_not_of_judgments() -> None:
    few = [Duel(str(k), "a", "b", float(k % 3 > 0)) for k in range(30)]
    one, many = bradley_terry(few, ["a", "b"], ridge=1e-6), bradley_terry(few * 10, ["a", "b"], ridge=1e-5)
    assert bradley_terry(few[:19], ["a", "b"])["a"].low == -math.inf  # too few prompts for a bootstrap
    assert one["a"].low == pytest.approx(many["a"].low, abs=1e-3)
    assert one["a"].low < one["a"].mean < one["a"].high


def test_agreement_is_that_of_the_textbook() -> None:
    # Siegel, Nonparametric Statistics (1956), chapter 9: three executives rank six applicants, W = 0.16
    ranks = np.array([[1, 6, 3, 2, 5, 4], [1, 5, 6, 4, 2, 3], [6, 3, 2, 5, 4, 1]], dtype=float)
    assert kendall_w(ranks) == pytest.approx(0.162, abs=5e-4)
    assert kendall_w(np.array([[1.0, 2.0, 3.0]] * 4)) == 1
    assert kendall_w(np.array([[1.0, 2.0], [2.0, 1.0]])) == 0
    assert kendall_w(np.array([[1.0, 2.5, 2.5]] * 2)) == 1  # ties that all share are agreement
    assert math.isnan(kendall_w(np.array([[1.5, 1.5]] * 3)))
    assert math.isnan(kendall_w(np.array([[1.0, 2.0]])))


def test_alpha_is_that_of_its_author() -> None:
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C and D: four observers, twelve units
    nan = math.nan
    values = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
            [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
        ]
    )
    assert krippendorff_alpha(values) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(np.array([[1.0, 2.0, 3.0]] * 2)) == 1
    assert math.isnan(krippendorff_alpha(np.ones((2, 3))))
    assert math.isnan(krippendorff_alpha(np.full((2, 3), nan)))
    assert math.isnan(krippendorff_alpha(np.array([[1.0, 2.0]])))


def test_sign_tests_by_hand() -> None:
    duels = [Duel(str(k), "a", "b", 1.0) for k in range(6)] + [Duel("6", "b", "a", 0.5)]
    found = sign_test(duels, "b", "a")
    assert (found.rate, found.prompts) == (0.5 / 7, 7)
    assert found.p == pytest.approx(2 / 64)  # six of six; the tie is left out
    assert sign_test([], "a", "b").prompts == 0
    assert win_rates(duels, ["a", "b"])["a"]["b"] == pytest.approx(6.5 / 7)


def test_a_judge_of_positions_is_seen() -> None:
    always_first = [Duel(str(k), *pair, 1.0, 1) for k in range(20) for pair in (("a", "b"), ("b", "a"))]
    effect = position_effect(always_first)
    assert effect.rate == 1 and effect.p < 1e-5
    fair = [Duel(str(k), "a", "b", 1.0, slots) for k in range(20) for slots in (1, -1)]
    assert position_effect(fair).rate == 0.5 and position_effect(fair).p == 1


@pytest.mark.parametrize("prompts, rate", [(100, 0.645), (200, 0.602), (800, 0.55)])
def test_what_so_many_prompts_can_show(prompts: int, rate: float) -> None:
    assert detectable_rate(prompts) == pytest.approx(rate, abs=2e-3)
    draws = np.random.default_rng(0).binomial(prompts, rate, 20_000)
    from scipy import stats

    found = np.mean([stats.binomtest(int(k), prompts).pvalue <= 0.05 for k in draws[:2000]])
    assert found == pytest.approx(0.8, abs=0.03)
    assert math.isnan(detectable_rate(5))


# questions ------------------------------------------------------------------------------------------------------------


def cases(count: int) -> list[Case]:
    pictures = {name: (Path(f"{name}.png"), name * 2) for name in VARIANTS}
    return [Case(f"id{k}", f"prompt {k}", 0, pictures) for k in range(count)]


def test_pairs_come_in_both_orders_and_lists_in_every_order() -> None:
    pairs = questions_of(cases(10), "pairwise", 1, 0, placebos=0)
    assert len(pairs) == 60
    assert {q.variants for q in pairs if q.prompt_id == "id3"} == set(itertools.permutations(VARIANTS, 2))
    lists = questions_of(cases(200), "listwise", 3, 0, placebos=0)
    assert len(lists) == 600
    firsts = [q.variants[0] for q in lists]
    assert all(150 < firsts.count(name) < 250 for name in VARIANTS)
    assert lists == questions_of(cases(200), "listwise", 3, 0, placebos=0)
    assert len(questions_of(cases(2), "pointwise", 3, 0)) == 18


def test_a_share_of_placebos_shows_the_same_bytes_twice() -> None:
    placebos = [q for q in questions_of(cases(1000), "pairwise", 1, 0) if q.placebo]
    assert 30 < len(placebos) < 70
    assert all(q.hashes[0] == q.hashes[1] for q in placebos)


def test_a_missing_picture_leaves_its_variant_out() -> None:
    case = Case("id", "a cat", 0, {"a": (Path("a.png"), "1"), "b": (Path("b.png"), "2")})
    lonely = Case("id2", "a dog", 0, {"a": (Path("a.png"), "1")})
    assert {q.prompt_id for q in questions_of([case, lonely], "listwise", 1, 0, placebos=0)} == {"id"}


def question(mode: Mode, variants: tuple[str, ...], number: int = 0) -> Question:
    return Question(mode, "p", "text", 0, number, variants, tuple(Path(v) for v in variants), variants)


def test_a_verdict_that_flips_with_the_order_is_a_tie() -> None:
    first = Opinion(ranks=(1.0, 2.0))
    flipped = [(question("pairwise", ("a", "b")), first), (question("pairwise", ("b", "a")), first)]
    assert [duel.points for duel in settled_duels(flipped)] == [0.5]
    agreed = [flipped[0], (question("pairwise", ("b", "a")), Opinion(ranks=(2.0, 1.0)))]
    assert [(duel.first, duel.points) for duel in settled_duels(agreed)] == [("a", 1.0)]
    assert settled_duels(flipped[:1]) == []  # half a pair would carry the bias of its order
    assert case_ranks(agreed, ["a", "b"]) == {"p": {0: {0: {"a": 1.0, "b": 2.0}}}}


def test_ranks_of_lists_and_scores() -> None:
    listed = [(question("listwise", ("c", "a", "b")), Opinion(ranks=(2.5, 1.0, 2.5)))]
    assert case_ranks(listed, ["a", "b", "c"])["p"][0][0] == {"a": 1.0, "b": 2.5, "c": 2.5}
    scored = [(question("pointwise", (name,)), Opinion(scores=(s,))) for name, s in (("a", 3.0), ("b", 7.0))]
    assert case_ranks(scored, ["a", "b"])["p"][0][0] == {"a": 2.0, "b": 1.0}
    assert case_ranks(scored[:1], ["a", "b"]) == {}


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def pictures() -> list[str]:
    """Twelve prompts by three variants whose brightness is what a truthful judge goes by."""
    prompts = [f"a cat number {k}" for k in range(12)]
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    rng = np.random.default_rng(0)
    for name, light in (("bright", 200), ("dark", 50), ("middle", 120)):
        Path(name).mkdir()
        for k, prompt in enumerate(prompts):
            texts = PngInfo()
            texts.add_text("prompt", prompt)
            texts.add_text("seed", "0")
            texts.add_text("secret", f"made by {name}")
            noise = rng.integers(-20, 20, (16, 16, 3))
            Image.fromarray((light + noise).astype(np.uint8)).save(f"{name}/{k}.png", pnginfo=texts)
    return [argument for name in VARIANTS for argument in ("--images", f"{name}={name}")] + [
        "--prompts",
        "prompts.jsonl",
    ]


def ranking(folder: str = "out", judge: str = "clip", mode: str = "pairwise") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((rank_folder(folder, judge, mode) / "summary.json").read_text())
    return found


def rank_folder(folder: str = "out", judge: str = "openai-judge", mode: str = "pairwise") -> Path:
    (found,) = Path(folder, "ranks").glob(f"{judge}*-{mode}")
    return found


def mean_ranks(found: dict[str, Any], criterion: str = "alignment") -> dict[str, float]:
    return {name: row["all"]["mean"] for name, row in found["results"][criterion]["mean_rank"].items()}


@pytest.mark.parametrize("mode", ["pairwise", "listwise", "pointwise"])
def test_an_offline_judge_gives_back_the_true_order(pictures: list[str], mode: str, capsys: Any) -> None:
    command = ["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness", "--mode", mode]
    assert run(command) == 0
    found = ranking(mode=mode)
    assert mean_ranks(found) == {"bright": 1, "middle": 2, "dark": 3}
    result = found["results"]["alignment"]
    assert result["wins"]["bright"]["dark"] == 1
    assert all(test["p"] == pytest.approx(2 / 2**12) for test in result["tests"])
    assert result["bradley_terry"]["bright"]["mean"] > result["bradley_terry"]["middle"]["mean"] > 0.0 - 1e-9
    assert found["absent"] == ["aesthetic"]
    assert "aesthetic: this judge does not know it" in capsys.readouterr().out
    page = Path("out/report/index.html").read_text()
    tab = page[page.index('id="more-rank-clip') :]
    assert "brightness: A" in tab
    # every verdict with its pictures: 3 pairs in 2 orders, or 3 rounds of 3 pictures
    assert tab.count('src="media/') == 12 * (2 * 6 if mode == "pairwise" else 9)
    rows = list(csv.DictReader(Path(f"out/ranks/clip-{mode}/summary.csv").read_text().splitlines()))
    assert [row["mean_rank_round_1"] for row in rows] == ["1.0", "3.0", "2.0"]
    assert rows[0]["wins_against_dark"] == "1.0" and rows[0]["wins_against_bright"] == ""


def test_a_second_criterion_is_shown_as_absent_and_never_copied(pictures: list[str]) -> None:
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness"]) == 0
    assert list(ranking()["results"]) == ["alignment"]


def test_votes_of_people_are_a_judge(pictures: list[str]) -> None:
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness"]) == 0
    first = json.loads((Path("out/ranks/clip-pairwise/verdicts.jsonl").read_text()).splitlines()[0])
    vote = {"prompt": first["prompt_id"], "seed": 0, "left": "dark", "right": "bright", "winner": "left"}
    document = {"texforce_votes": 1, "data": ranking()["pictures"], "votes": [vote]}
    Path("votes.json").write_text(json.dumps(document))
    command = ["gpt4v-rank", "out", *pictures, "--judge", "votes", "--judge-option", "file=votes.json"]
    assert run(command) == 3  # the other pairs have no votes
    found = ranking(judge="votes")
    assert found["results"]["preference"]["wins"]["dark"]["bright"] == 1
    assert found["missing_by_variant"]["refused"]["middle"] == 48
    votes = [{**vote, "prompt": row["prompt_id"], "left": one, "right": two} for row in rows_of() for one, two in PAIRS]
    Path("votes.json").write_text(json.dumps({**document, "votes": votes}))
    assert run([*command, "--placebos", "1"]) == 0  # identical pictures are a tie, nobody has to say so
    found = ranking(judge="votes")
    assert found["missing_by_variant"] == {} and found["results"]["preference"]["placebo"]["ties"] == 1
    Path("votes.json").write_text(json.dumps({**document, "data": "0" * 64}))
    assert run(command) == 2
    sha = [hashlib.sha256(Path(name, "0.png").read_bytes()).hexdigest() for name in ("dark", "bright")]
    named = {**vote, "prompt": hashlib.sha256(b"a cat number 0").hexdigest()[:10], "pictures": sha}
    Path("votes.json").write_text(json.dumps({**document, "data": "0" * 64, "votes": [vote, named]}))
    assert run(command) == 3
    assert ranking(judge="votes")["results"]["preference"]["wins"]["dark"]["bright"] == 1


PAIRS = list(itertools.combinations(VARIANTS, 2))


def rows_of() -> list[dict[str, Any]]:
    """The verdicts of the judge clip."""
    return [json.loads(line) for line in Path("out/ranks/clip-pairwise/verdicts.jsonl").read_text().splitlines()]


def test_a_line_separator_in_a_prompt_does_not_cost_the_page(pictures: list[str]) -> None:
    text = "a cat\u2028with\u0085a hat"
    Path("prompts.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    for name in VARIANTS:
        Path(name, "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "prompt": text, "seed": 0}) + "\n")
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness"]) == 0
    assert 'id="more-rank-clip' in Path("out/report/index.html").read_text()


def test_rankings_by_other_options_lie_side_by_side(pictures: list[str], capsys: Any) -> None:
    command = ["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option"]
    assert run([*command, "reward=jpeg-compressibility", "--report-only"]) == 2
    assert "has no ranking of 'clip' with these options" in " ".join(capsys.readouterr().err.split())
    for name in ("brightness", "jpeg-compressibility", "brightness"):
        assert run([*command, f"reward={name}"]) == 0
    first, second = sorted(Path("out/ranks").iterdir())
    assert first.name == "clip-pairwise" and second.name.startswith("clip-pairwise-")
    said = ["brightness", "jpeg-compressibility"]
    assert [json.loads((path / "summary.json").read_text())["models"] for path in (first, second)] == [
        [s] for s in said
    ]
    page = Path("out/report/index.html").read_text()
    assert all(f"clip ({name}), pairwise" in page for name in said)
    assert run([*command, "reward=jpeg-compressibility", "--report-only"]) == 0
    assert len(list(Path("out/ranks").iterdir())) == 2


def test_the_judge_clip_takes_weights_of_ones_own(pictures: list[str], capsys: Any) -> None:
    options = [part for text in ("reward=clip-score", "weights=nowhere") for part in ("--judge-option", text)]
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "clip", *options]) in (1, 2)
    assert "nowhere" in capsys.readouterr().err


def test_a_judge_of_a_plugin_is_asked_and_a_broken_plugin_is_named(
    pictures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    Path("fair.py").write_text(PLUGIN)
    Path("broken.py").write_text("raise RuntimeError('half installed')")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    real = importlib.metadata.entry_points
    entries = [importlib.metadata.EntryPoint(name, name, "texforce") for name in ("fair", "broken")]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **kw: entries if kw.get("group") == "texforce" else real(**kw)
    )
    command = ["gpt4v-rank", "out", *pictures, "--judge", "fair", "--judge-option"]
    assert run([*command, "winner=B", "--placebos", "0", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["judge"] == "fair" and "hello" in shown.err  # what plugins print is not data
    assert ranking(judge="fair")["results"]["manners"]["position"]["first_shown_won"] == 0
    assert run([*command, "winner=B", "--placebos", "0", "--json", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["criteria"] == ["manners"]
    assert run([*command, "colour=red"]) == 2
    assert "colour" in capsys.readouterr().err
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "fairr"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "did you mean 'fair'" in said and "half installed" in said
    monkeypatch.setattr("fair.Fair.__init__", lambda self, winner: sys.exit(0))
    assert run([*command, "winner=B"]) == 1
    assert "judge 'fair' could not start: SystemExit: 0" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("TEXFORCE_STRICT_PLUGINS", "1")
    assert run([*command, "winner=B"]) == 1
    assert "plugin 'broken' is broken" in " ".join(capsys.readouterr().err.split())


PLUGIN = """
import json
import pluggy
from texforce_cli.judging.judge import Reply

print("hello")
hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_judges(register):
    register("fair", "fair:Fair", summary="always the same slot", api_version=1)


class Fair:
    criteria, modes = ("manners",), ("pairwise",)

    def __init__(self, winner: str = "A"):
        self.identity = f"fair {winner}"
        self._winner = winner

    def prepare(self, cases, data):
        print("hello")

    def close(self):
        print("hello")

    def ask(self, question, repairs=()):
        print("hello")
        return Reply(json.dumps({"manners": {"reason": "so", "winner": self._winner}}))
"""


def test_a_model_that_is_cut_off_while_it_thinks_is_given_up_soon_and_explained(
    pictures: list[str], capsys: Any
) -> None:
    with JudgeServer("length") as server:
        for prompts in (5, 9):  # what was cut in the run before is no answer; of one prompt some was left
            assert run(openai_command(pictures, server, "--workers", "1", "--placebos", "0")) == 3
            assert len({seen.prompt for seen in server.seen}) == prompts
    said = " ".join(capsys.readouterr().err.split())
    assert "5 questions in a row got no answer; the last: the answer was cut off before its verdict" in said
    assert {seen.attempt for seen in server.seen} == {0}
    assert (
        f"{len(server.seen)} answers were cut at 1000 tokens, before their verdict; give --max-output-tokens 4000"
        in said
    )


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("modes = ('pairwise', 'by feel')", "modes"),
        ("modes = ()", "modes"),
        ("criteria = 'manners'", "criteria"),
        ("identity = property(lambda self: None, lambda self, value: None)", "identity"),
        ("ask = None", "ask"),
    ],
)
def test_a_judge_that_lacks_what_a_judge_has_is_named(
    pictures: list[str], line: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from texforce_cli.judging.offline import ClipJudge

    class Odd(ClipJudge):
        exec(line)

        def __setattr__(self, name: str, value: Any) -> None:
            if name != word:
                super().__setattr__(name, value)

    monkeypatch.setattr("texforce_cli.judging.offline.ClipJudge", Odd)
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness"]) == 1
    assert f"judge 'clip' has no {word} that can be used" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_told_in_a_sentence(pictures: list[str], capsys: Any) -> None:
    for extra, words in (
        (["--judge", "clop"], "did you mean 'clip'"),
        ([], "no judge is given"),
        (["--judge", "openai:gpt-4o"], "OPENAI_API_KEY"),
        (["--judge", "openai:unheard-of"], "--price"),
        (["--judge", "clip", "--seeds", "7"], "no prompt with two pictures"),
        (["--judge", "clip", "--judge-option", "reward"], "KEY=VALUE"),
        (["--judge", "clip", "--judge-option", "colour=red"], "colour"),
        (["--judge", "openai"], "openai:MODEL"),
        (["--judge", "clip", "--protocol", "paper", "--mode", "pairwise"], "three rounds"),
        (["--judge", "openai:gpt-4o", "--price", "1,1", "--max-cost", "inf"], "limit of inf"),
        (
            ["--judge", "openai:x", "--price", "1,1", "--max-cost", "1", "--base-url", "http://127.0.0.1:9"],
            "IN,OUT,IMAGE",
        ),
        (["--judge", "openai:gpt-4o", "--judge-option", "timeout=nan"], "timeout"),
        (["--judge", "openai:gpt-4o", "--judge-option", "criteria=a,a"], "distinct"),
        (["--judge", "votes", "--judge-option", "file=none.json"], "holds no votes"),
        (["--judge", "clip", "--judge-option", "reward=jpeg-compressibility", "--mode", "pointwise"], "pointwise"),
    ):
        assert run(["gpt4v-rank", "out", *pictures, *extra]) == 2, extra
        assert words in capsys.readouterr().err
    assert run(["gpt4v-rank", "nowhere", "--judge", "clip"]) == 2


def openai_command(pictures: list[str], server: JudgeServer, *extra: str) -> list[str]:
    return ["gpt4v-rank", "out", *pictures, "--judge", "openai:judge", "--base-url", server.url, *extra]


def test_a_server_gives_back_the_true_order_and_learns_no_names(pictures: list[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    forbidden = ["bright.png", "middle", "made by", "secret", str(Path.cwd()), "seed"]
    with JudgeServer(forbidden=forbidden) as server:
        assert run(openai_command(pictures, server, "--protocol", "paper")) == 0
    assert server.faults == []
    found = ranking(judge="openai-judge", mode="listwise")
    assert mean_ranks(found, "aesthetic") == mean_ranks(found) == {"bright": 1, "middle": 2, "dark": 3}
    assert found["results"]["alignment"]["agreement_of_rounds"] == 1
    assert found["results"]["alignment"]["alpha_of_rounds"] == 1
    assert found["models"] == ["judge-2026"]
    assert any("reconstruction" in sentence for sentence in found["warnings"])
    written = b"".join(path.read_bytes() for path in Path("out").rglob("*") if path.is_file())
    assert KEY.encode() not in written


@pytest.mark.parametrize("how", ["truthful", "401", "500", "echo", "echo escaped"])
def test_the_key_is_in_no_output_and_no_file(
    pictures: list[str], how: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("texforce_cli.judging.gate.Gate.backoff", lambda gate, failures: 0.0)
    with JudgeServer(how) as server:
        for extra in (["--json"], ["--debug"]):
            with contextlib.suppress(TexforceError):  # --debug lets it through
                run(openai_command(pictures, server, "--max-requests", "20", *extra))
    assert server.seen[0].key == KEY
    shown = capsys.readouterr()
    assert shown.err and KEY not in shown.out + shown.err
    files = [path.read_text() for path in Path("out").rglob("*") if path.is_file() and path.suffix != ".webp"]
    assert files and not any(KEY in text or KEY in unescaped(text) for text in files)


def unescaped(text: str) -> str:
    return re.sub(r"\\+u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)


def test_a_judge_of_slots_gives_ties_and_is_called_biased(pictures: list[str], capsys: Any) -> None:
    with JudgeServer("first") as server:
        assert run(openai_command(pictures, server, "--placebos", "1")) == 0
    found = ranking(judge="openai-judge")
    assert set(mean_ranks(found).values()) == {2}
    result = found["results"]["aesthetic"]
    assert all(test["p_holm"] == 1 for test in result["tests"])
    assert result["position"]["biased"] and result["position"]["first_shown_won"] == 1
    assert result["flipped"] == 1
    assert result["placebo"]["ties"] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the judge is biased" in said and "of two identical pictures the judge prefers one in 100%" in said


@pytest.mark.parametrize("mode", ["listwise", "pointwise"])
def test_a_judge_of_slots_decides_nothing_in_the_other_modes(pictures: list[str], mode: str) -> None:
    with JudgeServer("first") as server:
        assert run(openai_command(pictures, server, "--mode", mode)) == 0
    result = ranking(judge="openai-judge", mode=mode)["results"]["aesthetic"]
    assert all(test["p_holm"] > 0.05 for test in result["tests"])
    if mode == "listwise":
        assert result["position"]["biased"] and result["position"]["first_shown_won"] == 1
    else:  # one at a time there is no first slot, and all are worth the same
        assert {row["all"]["mean"] for row in result["mean_rank"].values()} == {2}


def test_refusals_are_counted_by_variant_and_the_rest_is_ranked(pictures: list[str]) -> None:
    with JudgeServer(lambda seen: "refusal" if seen.prompt.endswith(" 3") else "truthful") as server:
        assert run(openai_command(pictures, server, "--placebos", "0")) == 3
        asked = len(server.seen)
        assert run(openai_command(pictures, server, "--placebos", "0")) == 3
        assert len(server.seen) == asked
    found = ranking(judge="openai-judge")
    assert found["missing_by_variant"] == {"refused": {"bright": 4, "dark": 4, "middle": 4}}
    assert found["results"]["aesthetic"]["prompts"] == 11


def test_the_report_is_made_anew_without_a_server(pictures: list[str]) -> None:
    with JudgeServer() as server:
        assert run(openai_command(pictures, server)) == 0
        asked = len(server.seen)
    before = (rank_folder() / "summary.json").read_bytes()
    (rank_folder() / "summary.json").unlink()
    assert run([*openai_command(pictures, server), "--report-only"]) == 0
    assert (rank_folder() / "summary.json").read_bytes() == before
    assert len(server.seen) == asked


def test_a_report_on_no_answers_does_not_replace_one_that_has_some(pictures: list[str], capsys: Any) -> None:
    command = ["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness"]
    assert run(command) == 0
    folder = rank_folder(judge="clip")
    before = {name: (folder / name).read_bytes() for name in ("summary.json", "rank.json", "verdicts.jsonl")}
    (folder / "judgments.jsonl").unlink()
    assert run([*command, "--report-only"]) == 2
    assert "has no answer to these questions" in " ".join(capsys.readouterr().err.split())
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_dry_run_asks_nothing_and_tells_the_cost(pictures: list[str], capsys: Any) -> None:
    with JudgeServer() as server:
        extra = ["--dry-run", "--json", "--price", "2,8,1000", "--placebos", "0"]
        assert run(openai_command(pictures, server, *extra)) == 0
        assert server.seen == []
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["questions"], plan["requests"], plan["pictures"]) == (72, 72, 144)
    worst = (plan["text_tokens_at_most"] + 144_000) * 2 / 1e6 + plan["output_tokens_at_most"] * 8 / 1e6
    assert plan["usd_at_most_without_repairs"] == pytest.approx(worst, abs=1e-4)
    assert not Path("out/ranks").exists()


def test_a_limit_in_dollars_stops_with_a_partial_report(pictures: list[str], capsys: Any) -> None:
    with JudgeServer(usage=(600, 50)) as server:
        extra = ["--price", "10,10,300", "--max-cost", "0.25", "--placebos", "0"]
        assert run(openai_command(pictures, server, *extra)) == 3
        spent = ranking(judge="openai-judge")["spent"]
        assert 0 < spent["usd"] <= 0.25
        assert spent["requests"] == len(server.seen) < 72
    assert "$0.25 allowed" in capsys.readouterr().err


def test_a_limit_is_for_all_runs_of_a_ranking(pictures: list[str], capsys: Any) -> None:
    with JudgeServer(usage=(600, 50)) as server:  # each $0.0065
        command = openai_command(pictures, server, "--price", "10,10,300", "--placebos", "0")
        assert run([*command, "--max-cost", "0.25"]) == 3
        first = len(server.seen)
        assert f"all runs of this ranking: {first} requests, ${first * 0.0065:.4f}" in capsys.readouterr().err
        assert run([*command, "--max-cost", "0.25"]) == 3
        assert run([*command, "--max-requests", str(first)]) == 3
        assert len(server.seen) == first
        capsys.readouterr()
        assert run([*command, "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        assert (plan["requests_before"], plan["usd_before"]) == (first, pytest.approx(first * 0.0065, abs=1e-4))
        assert run([*command, "--max-cost", "0.35"]) == 3
        assert first < len(server.seen) <= 0.35 / 0.0065
        (rank_folder() / "spending.jsonl").unlink()  # the answers are there all the same
        asked = len(server.seen)
        assert run([*command, "--max-cost", "0.35"]) == 3
        assert len(server.seen) == asked
        assert run(command) == 0 and len(server.seen) == 72


@pytest.mark.parametrize("how", ["slow", "cut"])
def test_an_answer_that_was_lost_counts_in_the_runs_to_come(pictures: list[str], how: str) -> None:
    with JudgeServer(how) as server:
        command = openai_command(pictures, server, "--price", "10,10,300", "--judge-option", "timeout=0.1")
        assert run([*command, "--max-cost", "0.05"]) == 3
        lost = len(server.seen)
        assert lost >= 1 and run([*command, "--max-cost", "0.05"]) == 3
        assert len(server.seen) == lost


@pytest.mark.parametrize("after", [3, 20, 45])
def test_a_killed_ranking_goes_on_to_the_same_summary(pictures: list[str], after: int) -> None:
    with JudgeServer(lambda seen: "slow" if seen.number % 5 == 0 else "truthful") as server:
        command = openai_command(pictures, server, "--workers", "4")
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        process = subprocess.Popen([sys.executable, "-m", "texforce_cli", *command], env=environment)
        while len(server.seen) < after and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = rank_folder() / "judgments.jsonl"
        kept = journal.read_text().count("\n")
        before = len(server.seen)
        booked = Ledger(rank_folder() / "spending.jsonl").before.requests
        assert before <= booked <= before + 4  # what the server saw was written down before it was sent
        assert run(command) == 0
        total = ranking(judge="openai-judge")["questions"]
        assert len(server.seen) - before == total - kept  # nothing on the disk is asked again
        assert before - kept <= 4  # at most what was in flight repeats
        resumed = (rank_folder() / "summary.json").read_bytes()
        Path("out").rename("killed")
        assert run(command) == 0
    assert (rank_folder() / "summary.json").read_bytes() == resumed
    assert KEY not in "".join(path.read_text(errors="replace") for path in Path("killed/ranks").rglob("*.json*"))


def test_rounds_are_compared_within_a_seed() -> None:
    # three rounds that agree wholly, on two pictures whose orders differ: the mean over seeds would tie everything
    opinions = [
        (dataclasses.replace(question("listwise", ("a", "b", "c")), seed=seed, round=number), Opinion(ranks=ranks))
        for seed, ranks in ((0, (1.0, 2.0, 3.0)), (1, (3.0, 1.0, 2.0)))
        for number in range(3)
    ]
    assert rank(opinions, ["a", "b", "c"], 3)["agreement_of_rounds"] == 1


def test_half_a_pair_is_no_sign_of_bias() -> None:
    first = Opinion(ranks=(1.0, 2.0))
    lonely = [(question("pairwise", ("a", "b")), first)]
    assert shown_duels(lonely) == []
    both = [*lonely, (question("pairwise", ("b", "a")), Opinion(ranks=(2.0, 1.0)))]
    assert [(duel.points, duel.slots) for duel in shown_duels(both)] == [(1.0, 1), (0.0, 1)]


def test_names_that_differ_little_do_not_share_a_folder_and_the_page_keeps_both(pictures: list[str]) -> None:
    with JudgeServer() as server:
        for name in ("openai:Qwen-VL", "openai:qwen-vl", "openai:qwen/vl"):
            command = ["gpt4v-rank", "out", *pictures, "--judge", name, "--base-url", server.url]
            assert run(command) == 0
    assert len(list(Path("out/ranks").iterdir())) == 3
    assert Path("out/report/index.html").read_text().count('role="tab" id="tab-more') == 3


def test_a_damaged_summary_of_old_pictures_or_another_version_does_not_break_the_page(pictures: list[str]) -> None:
    command = ["gpt4v-rank", "out", *pictures, "--judge", "clip", "--judge-option", "reward=brightness"]
    assert run(command) == 0
    path = rank_folder(judge="clip") / "summary.json"
    summary = json.loads(path.read_text())
    for key in ("spent", "rounds", "missing_by_variant", "results"):
        path.write_text(json.dumps({k: v for k, v in summary.items() if k != key}))
        assert ranking_tabs(Path("out")) == ()
    path.write_text(json.dumps(summary))
    (tab,) = ranking_tabs(Path("out"), "other pictures")
    assert callable(tab.html_safe) and "about other pictures" in tab.html_safe({})


def test_an_evaluation_is_not_overwritten_by_other_pictures(pictures: list[str], capsys: Any) -> None:
    Path("out").mkdir()
    Path("out/eval.json").write_text("{}")
    assert run(["gpt4v-rank", "out", *pictures, "--judge", "clip"]) == 2
    assert "evaluation of its own" in capsys.readouterr().err


def test_a_password_in_an_address_is_not_written(pictures: list[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with JudgeServer() as server:
        url = server.url.replace("http://", "http://user:hunter2@")
        run(["gpt4v-rank", "out", *pictures, "--judge", "openai:judge", "--base-url", url])
    assert b"hunter2" not in b"".join(path.read_bytes() for path in Path("out").rglob("*") if path.is_file())


def test_a_judge_that_breaks_is_named_and_what_was_answered_is_kept(
    pictures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from texforce_cli.judging.offline import ClipJudge

    real, calls = ClipJudge.ask, []

    def breaking(self: ClipJudge, question: Question, repairs: Any = ()) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyError("colour")
        return real(self, question, repairs)

    monkeypatch.setattr(ClipJudge, "ask", breaking)
    command = [
        "gpt4v-rank",
        "out",
        *pictures,
        "--judge",
        "clip",
        "--judge-option",
        "reward=brightness",
        "--workers",
        "1",
    ]
    assert run(command) == 1
    assert "the judge failed (KeyError" in capsys.readouterr().err
    assert len((rank_folder(judge="clip") / "judgments.jsonl").read_text().splitlines()) == 4
    assert run(command) == 0


def test_the_default_judge_ranks_an_evaluation_of_the_embedded_model_offline(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    Path("p.txt").write_text("a red cat\ntwo blue foxes in the park\n")
    variants = ["--variant", "base=tiny", "--variant", "again=tiny"]
    drawing = ["--prompts", "p.txt", "--seeds", "0:2", "--steps", "1", "--metric", "brightness", "--out", "evals/color"]
    assert run(["eval", *variants, *drawing]) == 0
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run(["gpt4v-rank", "evals/color", "--judge", "clip"]) == 0
    found = ranking("evals/color")
    assert (found["models"], found["mode"], found["questions"]) == (["tiny-judge"], "pairwise", 4)
    assert set(mean_ranks(found).values()) == {1.5}  # the same model twice
    assert 'id="more-rank-clip' in Path("evals/color/report/index.html").read_text()
    assert "alignment" in capsys.readouterr().out

    def evaluated_meanwhile(*arguments: Any, **options: Any) -> Any:
        assert run(["eval", "--out", "evals/color", "--metric", "jpeg-compressibility"]) == 0
        return asked(*arguments, **options)

    asked = ranking_run.ask_all
    monkeypatch.setattr(ranking_run, "ask_all", evaluated_meanwhile)
    assert run(["gpt4v-rank", "evals/color", "--judge", "clip"]) == 0
    for name in ("eval.json", "summary.json", "report/index.html"):
        assert "jpeg-compressibility" in Path("evals/color", name).read_text()
