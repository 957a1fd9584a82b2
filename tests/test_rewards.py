"""Rewards: the grammar, the door for plugins, and what happens to one that misbehaves."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from texforce_cli.cli.app import run
from texforce_cli.errors import Terminated, TexforceError, UsageError
from texforce_cli.judging.offline import ClipJudge
from texforce_cli.rewards.environments import Environment
from texforce_cli.rewards.hookspecs import hookimpl
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.registry import Registry, RewardInfo, load_registry
from texforce_cli.rewards.terms import RewardSet, TermSpec, parse_hosts, parse_terms
from texforce_cli.workflows import assembly
from texforce_cli.workflows.check_reward import check_reward
from texforce_cli.workflows.evaluation.scores import Metric, ScoreFile
from texforce_cli.workflows.plan import plan
from texforce_cli.workflows.run_folder import RunFolder


def pictures(*levels: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])


def test_the_grammar() -> None:
    terms = parse_terms(["brightness", "jpeg-compressibility:-0.5"], ["jpeg-compressibility.quality=80"])
    assert terms == [TermSpec("brightness", 1.0, {}), TermSpec("jpeg-compressibility", -0.5, {"quality": "80"})]
    assert [str(term) for term in terms] == ["brightness", "jpeg-compressibility:-0.5"]


@pytest.mark.parametrize(
    ("rewards", "options", "sentence"),
    [
        (["a", "a:2"], [], "given twice"),
        (["a:x"], [], "is not a finite number"),
        (["a:nan"], [], "is not a finite number"),
        (["a:"], [], "is not a finite number"),
        (["a:0"], [], "other than 0"),
        (["a"], ["b.x=1"], "belongs to no reward"),
        (["a"], ["x=1"], "is not NAME.key=value"),
        (["a"], ["a.x"], "is not NAME.key=value"),
    ],
)
def test_bad_grammar_is_named(rewards: list[str], options: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_terms(rewards, options)


@given(st.text(st.characters(exclude_characters=":", exclude_categories=["Cs"]), min_size=1), st.floats(0.001, 1e6))
def test_a_name_with_a_weight_is_read_back(name: str, weight: float) -> None:
    assert parse_terms([f"{name}:{weight!r}"]) == [TermSpec(name, weight)]


def test_the_built_in_rewards_by_hand() -> None:
    rewards = RewardSet(parse_terms(["brightness", "jpeg-incompressibility", "jpeg-compressibility"]), load_registry())
    red = np.zeros((1, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    found = rewards.score(np.concatenate([pictures(0, 255), red]), ["a", "b", "c"], [{}, {}, {}])
    assert found["brightness"] == pytest.approx([0.0, 1.0, 0.299])
    buffer = io.BytesIO()
    Image.fromarray(red[0]).save(buffer, "JPEG", quality=95)
    assert found["jpeg-incompressibility"][2] == len(buffer.getvalue()) / 1000
    assert found["jpeg-compressibility"] == pytest.approx(-found["jpeg-incompressibility"])


def test_a_picture_to_check_is_read_as_eval_reads_it(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert check_reward("brightness", [], tmp_path / "clear.png", "", 60).score == 1.0
    with pytest.raises(UsageError, match="is missing; check --image"):
        check_reward("brightness", [], tmp_path / "none.png", "", 60)


def test_every_built_in_reward_says_its_licence_and_what_it_is() -> None:
    ours = [info for info in load_registry().rewards.values() if info.origin == "texforce"]
    assert [info.name for info in ours if not (info.licence and info.summary)] == []


def test_weights_signs_and_normalisation() -> None:
    def info(name: str, higher: bool) -> RewardInfo:
        return RewardInfo(name, "texforce_cli.rewards.builtin.pictures:Brightness", "x", "1", higher_is_better=higher)

    registry = Registry({("up", ""): info("up", True), ("down", ""): info("down", False)})
    terms = {"up": np.array([1.0, 3.0]), "down": np.array([10.0, 30.0])}
    plain = RewardSet([TermSpec("up", 2.0), TermSpec("down", 1.0)], registry)
    assert plain.total(terms).total.tolist() == [2 - 10, 6 - 30]
    standard = RewardSet([TermSpec("up", 2.0), TermSpec("down", 1.0)], registry, normalize=True)
    # both become -1 and 1; 2 * (-1) - (-1) = -1
    assert standard.total(terms).total == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_options_are_typed_and_checked() -> None:
    registry = load_registry()

    def make(text: str) -> RewardSet:
        return RewardSet(parse_terms(["jpeg-compressibility"], [f"jpeg-compressibility.{text}"]), registry)

    assert make("quality=30")
    with pytest.raises(UsageError, match=r"has no option 'qualty'; its options: quality"):
        make("qualty=30")
    with pytest.raises(UsageError, match="'high' is no value"):
        make("quality=high")
    with pytest.raises(TexforceError, match="quality 0 is not between 1 and 100"):
        make("quality=0")


def test_an_unknown_reward_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown reward .brightnes.; did you mean .brightness."):
        RewardSet(parse_terms(["brightnes"]), load_registry())


# plugins


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install distributions for the length of a test: `plugins(name, register-function or exception)`."""
    entries: list[Any] = []

    class Entry:
        def __init__(self, name: str, load: Callable[[], Any]) -> None:
            self.name, self.value, self.load = name, name, load
            self.dist = types.SimpleNamespace(metadata={"Name": name, "Version": "1.0"})

    def install(name: str, hook: Callable[..., None] | Exception, attribute: str = "texforce_register_rewards") -> None:
        def load() -> Any:
            if isinstance(hook, Exception):
                raise hook
            module = types.ModuleType(name.replace("-", "_"))
            setattr(module, attribute, hookimpl(hook))
            return module

        entries.append(Entry(name, load))

    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **kw: entries if kw.get("group") == "texforce" else real(**kw)
    )
    yield install


def registers(name: str, factory: str = "nowhere:X", **about: Any) -> Callable[..., None]:
    def hook(register: Callable[..., None]) -> None:
        register(name, factory, **{"summary": "", "api_version": 1} | about)

    return hook


def test_a_plugin_is_found_and_stays_lazy(plugins: Callable[..., None]) -> None:
    plugins("third-party", registers("sharpness", "not_there:Sharpness", unit="x"))
    found = load_registry().find("sharpness")
    assert (found.origin, found.version, found.unit) == ("third-party", "1.0", "x")
    with pytest.raises(TexforceError, match=r"reward 'sharpness'.*could not be imported: ModuleNotFoundError"):
        found.create({})


def test_broken_plugins_break_only_themselves(plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    plugins("good", registers("fine", something_of_a_later_version=1))
    plugins("broken-import", ImportError("no module named moon"))
    plugins("too-new", registers("future", api_version=2))
    plugins("no-version", lambda register: register("x", "y:Z"))
    plugins("taken", registers("brightness"))
    plugins("taken-too", registers("fine"))
    plugins("misspelt", registers("y"), attribute="texforce_register_reward")
    plugins("mistyped", registers("z", higher_is_beter=False))
    registry = load_registry()
    assert registry.find("fine").origin == "good"
    assert registry.find("brightness").origin == "texforce"
    assert set(registry.broken) == {
        "broken-import",
        "too-new",
        "no-version",
        "taken",
        "taken-too",
        "misspelt",
        "mistyped",
    }
    assert "both 'texforce' and 'taken'" in registry.broken["taken"]
    assert "both 'good' and 'taken-too'" in registry.broken["taken-too"]
    assert "is 'higher_is_better' meant?" in registry.broken["mistyped"]
    assert "API version 2" in registry.broken["too-new"]
    with pytest.raises(UsageError, match="no module named moon"):
        registry.find("moon")
    monkeypatch.setenv("TEXFORCE_BLOCK_PLUGINS", "Broken_Import, taken")
    assert not {"broken-import", "taken"} & set(load_registry().broken)
    monkeypatch.setenv("TEXFORCE_STRICT_PLUGINS", "1")
    with pytest.raises(TexforceError, match="plugin 'too-new' is broken"):
        load_registry()


FINE = {
    "METADATA": b"Metadata-Version: 2.1\nName: The.Thing\nVersion: 1.0\n",
    "entry_points.txt": b"[texforce]\nthing=thing\n",
}


@pytest.mark.parametrize(
    ("files", "origin", "why"),
    [
        ({}, "the-thing 1.0", ""),
        ({"METADATA": b"Metadata-Version: 2.1\nVersion: 1.0\n"}, "thing 1.0", ""),
        ({"METADATA": b"Metadata-Version: 2.1\nName: thing\n"}, "thing ", ""),
        ({"METADATA": b""}, "thing ", ""),
        ({"METADATA": b"Name: \xe9\nVersion: 1.0\n"}, "thing ", ""),
        (
            {"entry_points.txt": b"[texforce]\nthing=a b\n"},
            "the-thing",
            "its entry point 'thing = a b' names no module",
        ),
        ({"entry_points.txt": b"[texforce]\nthing=nowhere_at_all\n"}, "the-thing", "No module named 'nowhere_at_all'"),
        ({"entry_points.txt": b"[texforce]\nthing=thing:nothing\n"}, "the-thing", "no attribute 'nothing'"),
        ({"entry_points.txt": b"[texforce]\nthing\n"}, "the-thing", "its entry_points.txt is damaged: TypeError"),
        ({"entry_points.txt": b"\xff\xfe"}, "the-thing", "its entry_points.txt is damaged: UnicodeDecodeError"),
    ],
)
def test_a_distribution_whose_files_are_damaged_breaks_at_most_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes], origin: str, why: str
) -> None:
    for name, contents in (("thing", FINE | files), ("good", {"entry_points.txt": b"[texforce]\ngood=good\n"})):
        (tmp_path / f"{name}.py").write_text(
            "import pluggy\n\n@pluggy.HookimplMarker('texforce')\ndef texforce_register_rewards(register):\n"
            f"    register('a-{name}', 'x:Y', api_version=1)\n"
        )
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        for file, content in contents.items():
            (tmp_path / f"{name}-1.0.dist-info" / file).write_bytes(content)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        registry = load_registry()
    finally:
        sys.modules.pop("thing", None), sys.modules.pop("good", None)
    assert registry.find("a-good").origin == "good"
    if why:
        assert list(registry.broken) == [origin] and why in registry.broken[origin]
    else:
        found = registry.find("a-thing")
        assert f"{found.origin} {found.version}" == origin and registry.broken == {}


def test_a_second_folder_of_one_distribution_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("twice-1.0.dist-info", "~wice-0.9.dist-info"):  # the latter as an interrupted uninstall leaves it
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "METADATA").write_text("Metadata-Version: 2.1\nName: twice\nVersion: 1.0\n")
        (tmp_path / folder / "entry_points.txt").write_text("[texforce]\ntwice = json\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_registry().broken == {}


def test_a_module_with_two_entry_points_registers_once(plugins: Callable[..., None]) -> None:
    for name in ("glow", "shine"):
        plugins(name, registers("glow"))
    for entry in importlib.metadata.entry_points(group="texforce"):
        entry.value, entry.dist.metadata = "both", {"Name": "both", "Version": "1.0"}  # type: ignore[misc]
    registry = load_registry()
    assert registry.broken == {} and registry.find("glow").origin == "both"


def test_code_that_its_author_changes_is_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = tmp_path / "env" / "lib" / "python3" / "site-packages"
    folder = site / "made_by_hand"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    with contextlib.suppress(OSError):  # not for everybody on Windows
        (folder / ".#reward.py").symlink_to("somebody@somewhere.1:2")  # Emacs' lock
    monkeypatch.syspath_prepend(str(site))
    somewhere = Environment("hand", "0.1.0", tmp_path / "env", ())
    said = set()
    for code in ("1", "2"):
        (folder / "reward.py").write_text(f"class R:\n    def score(self, *batch):\n        return [{code}]\n")
        here, away = (
            RewardInfo("glow", "made_by_hand.reward:R", "hand", "0.1.0", environment=e) for e in (None, somewhere)
        )
        registry = Registry({("glow", ""): here})
        monkeypatch.setattr("texforce_cli.judging.offline.load_registry", lambda registry=registry: registry)
        judge = ClipJudge("glow")
        judge.prepare([], "")
        exact = RewardSet([TermSpec("glow")], registry).packages["hand"]
        assert exact.startswith("0.1.0+") and exact in judge.identity and exact == away.exact_version
        assert Metric(TermSpec("glow"), here).version(ScoreFile(tmp_path / "none")) == f"hand {exact}"
        said.add(exact)
    assert len(said) == 2


@pytest.mark.parametrize("problem", [RuntimeError("out of luck"), SystemExit(0), KeyError("x")])
def test_a_plugin_that_raises_while_it_registers_leaves_nothing_behind(
    plugins: Callable[..., None], problem: BaseException
) -> None:
    def half(register: Callable[..., None]) -> None:
        register("glow", "x:Y", api_version=1)
        raise problem

    plugins("half", half)
    plugins("good", registers("fine"))
    registry = load_registry()
    assert registry.broken["half"].startswith(type(problem).__name__)
    assert "glow" not in registry.names and "fine" in registry.names


class Speechless(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_that_cannot_be_printed_is_named_by_its_kind(plugins: Callable[..., None]) -> None:
    plugins("odd", Speechless())
    assert load_registry().broken == {"odd": "Speechless"}


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> RewardInfo:
    """A module `name` with a reward class `R`, and the reward that it registers."""
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return RewardInfo(name, f"{name}:R", name, "1")


def leaves(*_: Any) -> Any:
    sys.exit(0)


@pytest.mark.parametrize("where", ["__init__", "score"])
def test_a_reward_that_ends_the_program_is_named(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    info = module(monkeypatch, "quits", R=type("R", (), {where: leaves}))
    with pytest.raises(TexforceError, match=r"reward 'quits' (could not start|failed): SystemExit: 0"):
        RewardSet([TermSpec("quits")], Registry({("quits", ""): info})).score(pictures(1), ["a"], [{}])


def test_a_signal_that_comes_while_a_plugin_works_is_not_its_fault(
    plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: Any) -> Any:
        raise Terminated

    for where in ("__init__", "score"):
        info = module(monkeypatch, "slow", R=type("R", (), {where: told}))
        with pytest.raises(Terminated):
            RewardSet([TermSpec("slow")], Registry({("slow", ""): info})).score(pictures(1), ["a"], [{}])
    plugins("slow", lambda register: told())
    with pytest.raises(Terminated):
        load_registry()


def test_a_module_that_ends_the_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "quits_at_once.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TexforceError, match=r"reward 'x' \(y\) could not be imported: SystemExit: 0"):
        RewardInfo("x", "quits_at_once:R", "y", "1").create({})


def test_options_that_cannot_be_read_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class R:
        def __init__(self, size: nowhere.Size = 3) -> None:  # type: ignore[name-defined]  # noqa: F821
            pass

    info = module(monkeypatch, "odd", R=R)
    for read in (info.options, lambda: info.create({"size": "4"})):
        with pytest.raises(TexforceError, match="the options of reward 'odd' cannot be read: NameError"):
            read()


def test_what_a_plugin_prints_goes_to_stderr(
    plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class R:
        def __init__(self) -> None:
            print("made")

        def score(self, images: Any, prompts: Any, metadata: Any) -> list[float]:
            print("scored")
            return [1.0] * len(prompts)

        def close(self) -> None:
            print("closed")

    def hook(register: Callable[..., None]) -> None:
        print("registered")
        register("loud", "loud_reward:R", api_version=1)

    module(monkeypatch, "loud_reward", R=R)
    plugins("loud", hook)
    rewards = RewardSet(parse_terms(["loud"]), load_registry())
    rewards.score(pictures(1), ["a"], [{}])
    rewards.close()
    assert capsys.readouterr() == ("", "registered\nmade\nscored\nclosed\n")


@pytest.mark.parametrize("room", [3, 0])
def test_a_reward_for_which_the_memory_is_too_full_scores_fewer_pictures_at_once(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from texforce_cli.rewards.builtin.pictures import Brightness

    whole, asked, rewards = Brightness.score, list[int](), RewardSet([TermSpec("brightness")], load_registry())

    def score(self: Brightness, images: Any, *about: Any) -> list[float]:
        asked.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return list(whole(self, images, *about))

    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 3), 20, np.uint8)
    expected = rewards.score(images, ["a"] * 7, [{}] * 7)
    monkeypatch.setattr(Brightness, "score", score)
    if not room:
        with pytest.raises(TexforceError, match=r"reward 'brightness' failed: OutOfMemoryError"):
            rewards.score(images, ["a"] * 7, [{}] * 7)
        return
    found = rewards.score(images, ["a"] * 7, [{}] * 7)
    assert found["brightness"].tolist() == expected["brightness"].tolist()
    assert asked == [7, 3, 3, 1]
    assert rewards.warnings() == [
        "the memory was too full for reward 'brightness' and 7 images at once: it goes on with 3"
    ]
    assert not rewards.warnings()


def test_a_reward_that_fails_at_its_end_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    class Good:
        def close(self) -> None:
            ended.append("good")

    def fails(self: Any) -> None:
        raise RuntimeError("stuck")

    infos = {
        ("bad", ""): module(monkeypatch, "bad", R=type("R", (), {"close": fails})),
        ("good", ""): module(monkeypatch, "good", R=Good),
    }
    rewards = RewardSet(parse_terms(["bad", "good"]), Registry(infos))
    with pytest.warns(RuntimeWarning, match="reward 'bad' could not be closed: RuntimeError: stuck"):
        rewards.close()
    assert ended == ["good"]


@pytest.mark.parametrize("wanted", ["uint8", "pil"])
def test_what_a_reward_does_to_its_pictures_stays_with_it(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    class Writes:
        input = wanted

        def score(self, images: Any, prompts: Any, metadata: Any) -> list[float]:
            if wanted == "pil":
                images[0].paste((0, 0, 0), (0, 0, 8, 8))
            else:
                images[0] = 0
            return [1.0]

    infos = {("writes", ""): module(monkeypatch, "writes", R=Writes), **load_registry().rewards}
    batch = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    before = batch.copy()
    terms = ["writes", "brightness"] if wanted == "uint8" else ["writes", "jpeg-incompressibility"]
    rewards = RewardSet(parse_terms(terms), Registry(infos))
    if wanted == "uint8":
        with pytest.raises(TexforceError, match=r"reward 'writes' failed: ValueError: .*read-only"):
            rewards.score(batch, ["a"], [{}])
    else:
        alone = RewardSet(parse_terms(terms[1:]), Registry(infos)).score(batch, ["a"], [{}])
        assert rewards.score(batch, ["a"], [{}])[terms[1]] == alone[terms[1]]
    assert np.array_equal(batch, before)


class Fake:
    """A reward whose behaviour a test sets."""

    answer: Any = None
    closed = False

    def __init__(self, weights: str = "") -> None:
        pass

    def score(self, images: Any, prompts: Any, metadata: Any) -> Any:
        answer = type(self).answer
        return answer(images, prompts, metadata) if callable(answer) else answer

    def close(self) -> None:
        type(self).closed = True


@pytest.fixture
def fake(plugins: Callable[..., None]) -> Iterator[type[Fake]]:
    """A registered reward `fake`."""
    module = types.ModuleType("fake_reward")
    module.Fake = Fake  # type: ignore[attr-defined]
    sys.modules["fake_reward"] = module
    plugins("fakes", registers("fake", "fake_reward:Fake"))
    yield Fake
    del sys.modules["fake_reward"]


def raises(images: Any, prompts: Any, metadata: Any) -> Any:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([1.0], "returned 1 values for 2 images"),
        ([1.0, math.nan], "returned nan for the prompt 'b'"),
        ([math.inf, 1.0], "returned inf for the prompt 'a'"),
        ([[1.0, 2.0]], "failed: TypeError"),
        (["x", "y"], "failed: ValueError"),
        (None, "failed: TypeError"),
        (raises, "failed: RuntimeError: out of luck"),
    ],
)
def test_a_reward_that_misbehaves_is_named(fake: type[Fake], answer: Any, sentence: str) -> None:
    fake.answer = staticmethod(answer) if callable(answer) else answer
    rewards = RewardSet(parse_terms(["fake"]), load_registry())
    with pytest.raises(TexforceError, match=f"reward 'fake' {sentence}"):
        rewards.score(pictures(0, 1), ["a", "b"], [{}, {}])


def test_what_a_reward_is_given(fake: type[Fake]) -> None:
    seen: list[Any] = []

    def remember(images: Any, prompts: Any, metadata: Any) -> list[float]:
        seen.append((images, prompts, metadata))
        return [float(np.asarray(image).mean()) for image in images]

    fake.answer = staticmethod(remember)
    rewards = RewardSet(parse_terms(["fake"]), load_registry())
    found = rewards.score(pictures(9, 7), ["a", "b"], [{"k": 1}, {}])
    assert found["fake"].tolist() == [9.0, 7.0]
    images, prompts, metadata = seen[0]
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert (prompts, metadata) == (["a", "b"], [{"k": 1}, {}])
    rewards.close()
    assert fake.closed


# where rewards run


def test_hosts_belong_to_a_reward_or_to_all_isolated_ones() -> None:
    terms = parse_terms(["a", "b:2"])
    hosts = parse_hosts(["a=ann@one:/x/python", "bob@two", "a=three"], terms)
    assert [(place.host, place.python) for place in hosts["a"]] == [("ann@one", "/x/python"), ("three", "python3")]
    assert [(place.host, place.python) for place in hosts[""]] == [("bob@two", "python3")]
    with pytest.raises(UsageError, match=r"'c=x' belongs to no reward of this run; add --reward c"):
        parse_hosts(["c=x"], terms)


def test_what_a_run_says_of_workers_and_hosts_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(assembly, "RewardSet", lambda terms, registry, **settings: given.update(settings))
    numbers = {"reward_timeout": 9.0, "reward_workers": 3, "reward_memory": 8.0}
    made = plan({"reward": ["brightness"], "model": "tiny", "reward_host": ["brightness=ann@far:/x"], **numbers})
    assembly.make_rewards(made.config, load_registry())
    assert given["workers"] == WorkerSettings(timeout=9, workers=3, memory_gb=8)
    assert given["hosts"] == {"brightness": [Place("/x", "ann@far")]}


def test_a_reward_has_several_backends_under_one_name(plugins: Callable[..., None]) -> None:
    plugins("authors", registers("brightness", "nowhere:Original", backend="original"))
    registry = load_registry()
    assert registry.broken == {}
    assert registry.find("brightness").origin == "texforce"
    assert registry.find("brightness", "original").origin == "authors"
    with pytest.raises(UsageError, match=r"has no backend 'other'; its backends: 'original'"):
        registry.find("brightness", "other")
    spec = parse_terms(["brightness"], ["brightness.backend=original"])
    with pytest.raises(TexforceError, match="could not be imported"):
        RewardSet(spec, registry)


def test_the_only_backend_needs_no_naming(plugins: Callable[..., None]) -> None:
    plugins("authors", registers("glow", backend="original"))
    assert load_registry().find("glow").backend == "original"


@pytest.mark.parametrize(
    "about", [{"range": 3}, {"summary": 7}, {"higher_is_better": "yes"}, {"range": (0, "x")}, {"range": (1,)}]
)
def test_what_a_plugin_says_of_its_reward_is_checked(plugins: Callable[..., None], about: dict[str, Any]) -> None:
    plugins("odd", registers("glow", **about))
    assert set(load_registry().broken) == {"odd"}


@pytest.mark.parametrize("name", ["a:b", "a=b", "", "a b", "../x"])
def test_a_name_that_the_command_line_could_not_say_is_refused(plugins: Callable[..., None], name: str) -> None:
    plugins("odd", registers(name))
    assert set(load_registry().broken) == {"odd"}


def test_a_plugin_that_is_slow_to_register_is_named(
    plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("texforce_cli.rewards.registry.SLOW_SECONDS", 0.01)

    def slow(register: Callable[..., None]) -> None:
        time.sleep(0.02)
        register("glow", "x:Y", api_version=1)

    plugins("sleepy", slow)
    assert load_registry().slow["sleepy"] > 0.01


def test_rewards_choose_their_prompts_and_warn_of_drawings(plugins: Callable[..., None]) -> None:
    plugins("faces", registers("beauty", prompts="face", domain="photo"))
    made = plan({"reward": ["brightness", "beauty"], "model": "tiny"})
    assert (made.config.prompts, made.origins["prompts"]) == ("face", "reward beauty")
    first, second = made.advice()
    assert "prompts: 'face', which go with reward beauty" in first
    assert "beauty was made for photographs" in second
    asked = plan({"reward": ["beauty"], "model": "tiny", "prompts": "animals"})
    assert asked.config.prompts == "animals"
    assert len(asked.advice()) == 1


def test_a_run_says_where_its_rewards_are_of_other_versions_than_it_began_with(
    fake: type[Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answer = staticmethod(lambda images, prompts, metadata: [float(np.asarray(image).mean()) for image in images])
    small = "--samples-per-epoch 4 --group-size 4 --micro-batch 4 --grad-accum 1 --steps 2 --epochs 1 --eval-images 4"
    (weights := tmp_path / "weights").write_text("1")
    command = ["train", "--model", "tiny", "--reward", "brightness", "--watch", "fake", *small.split()]
    assert run([*command, "--reward-option", f"fake.weights={weights}", "--out", str(tmp_path / "a")]) == 0
    begun = RunFolder(tmp_path / "a")
    record = begun.read_record()
    assert record["versions"]["fakes"] == "1.0"
    begun.write_record({**record, "versions": {**record["versions"], "fakes": "0.9"}})
    weights.write_text("2")
    assert run(["train", "--resume", str(begun.path)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    changed = r"fakes 0\.9 then, 1\.0 now; fake files [0-9a-f]{16} then, [0-9a-f]{16} now"
    assert re.search(f"began with: {changed}; it may end with other bits and be rewarded differently", said)


def test_batches_that_are_submitted_finish_in_order(fake: type[Fake]) -> None:
    fake.answer = staticmethod(lambda images, prompts, metadata: [float(np.asarray(image).mean()) for image in images])
    rewards = RewardSet(parse_terms(["fake"]), load_registry())
    futures = [rewards.submit(pictures(i), ["p"], [{}]) for i in range(3)]
    assert all(future.done() for future in futures)  # in this process nothing is left for later
    assert [future.result()["fake"].tolist() for future in futures] == [[0.0], [1.0], [2.0]]


def test_beside_another_device_rewards_of_this_process_score_while_it_draws(fake: type[Fake]) -> None:
    drawn, seen = threading.Event(), []

    def answer(images: Any, prompts: Any, metadata: Any) -> list[float]:
        assert drawn.wait(10)
        seen.append(float(np.asarray(images[0]).mean()))
        return [seen[-1]]

    fake.answer = staticmethod(answer)
    rewards = RewardSet(parse_terms(["fake", "brightness"]), load_registry(), ahead=True)
    futures = [rewards.submit(pictures(i), ["p"], [{}]) for i in range(3)]
    assert not any(future.done() for future in futures)
    drawn.set()  # the next images, drawn meanwhile
    assert [future.result()["fake"].tolist() for future in futures] == [[0.0], [1.0], [2.0]]
    assert seen == [0.0, 1.0, 2.0] and set(futures[0].result()) == {"fake", "brightness"}
    fake.answer = staticmethod(lambda images, prompts, metadata: [math.nan])
    with pytest.raises(TexforceError, match="reward 'fake' returned nan"):
        rewards.submit(pictures(1), ["p"], [{}]).result()
    rewards.close()
