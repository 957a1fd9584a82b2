"""Environments of rewards: whole or not at all, listed without importing, kept apart from each other."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest

from texforce_cli.cli.app import run
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.rewards import environments, isolation
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.scaffold import write_plugin
from texforce_cli.rewards.terms import RewardSet, parse_terms
from texforce_cli.testing import pictures


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own TEXFORCE_HOME, pip as the installer."""
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TEXFORCE_INSTALLER", "pip")
    return tmp_path / "home"


def manifest(package: str, *names: str, **about: object) -> Path:
    """An environment with the interpreter of the tests, as an install leaves it."""
    folder = environments.root() / package / "env-0"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    rewards = [
        {"name": n, "factory": "texforce_cli.rewards.builtin.pictures:Brightness", "api_version": 1} for n in names
    ]
    content = {
        "texforce_environment": 1,
        "package": package,
        "version": "1.2",
        "folder": "env-0",
        "python": "3.11.7",
        "rewards": rewards,
        **about,
    }
    path = folder.parent / "manifest.json"
    path.write_text(json.dumps(content))
    return path


def test_an_environment_is_listed_from_its_manifest_alone() -> None:
    manifest("some-package", "glow")
    found = load_registry().find("glow")
    assert (found.origin, found.version, found.state) == ("some-package", "1.2", "isolated")
    assert found.environment is not None
    assert found.environment.python == environments.root() / "some-package" / "env-0" / "bin" / "python"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"texforce_environment": 2}, "another version of texforce"),
        ({"rewards": 7}, "manifest is damaged"),
        ({"folder": "../../elsewhere"}, "interpreter is gone"),
        ({"rewards": [{"name": "x", "factory": "y:Z", "api_version": 9}]}, "API version 9"),
        ({"rewards": [{"name": "x", "factory": "y:Z", "api_version": 1, "range": [None, 1]}]}, "range="),
        (
            {"rewards": [{"name": "brightness", "factory": "y:Z", "api_version": 1}]},
            "registered by both 'texforce' and",
        ),
    ],
)
def test_a_damaged_manifest_breaks_only_its_own_package(damage: dict[str, object], why: str) -> None:
    manifest("good", "glow")
    manifest("bad", "gloom", **damage)
    registry = load_registry()
    assert registry.find("glow").origin == "good"
    assert registry.find("brightness").origin == "texforce"
    assert why in registry.broken["bad"]


def test_a_manifest_that_is_no_json_is_said(home: Path) -> None:
    path = manifest("bad", "gloom")
    path.write_text("{")
    assert list(load_registry().broken) == ["bad"]


def test_removing_one_leaves_the_others_and_refuses_what_is_in_use() -> None:
    manifest("one", "a-one")
    manifest("two", "a-two")
    environment = load_registry().find("a-one").environment
    assert environment is not None
    with environment.in_use(), pytest.raises(TexforceError, match="'one' is in use by a run"):
        environments.remove("one")
    assert environments.remove("one") > 0
    registry = load_registry()
    assert registry.find("a-two")
    with pytest.raises(UsageError, match="unknown reward 'a-one'"):
        registry.find("a-one")
    with pytest.raises(UsageError, match=r"no environment of 'one'; there are: two"):
        environments.remove("one")


def test_removing_by_the_name_of_a_reward_is_confirmed(capfd: pytest.CaptureFixture[str]) -> None:
    manifest("one", "a-one")
    assert run(["rewards", "remove", "a-one"]) == 2
    assert "Delete the environment of 'one'?" in capfd.readouterr().err
    assert load_registry().find("a-one")
    assert run(["rewards", "remove", "a-one", "--yes"]) == 0
    assert environments.installed() == ([], {})


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
@pytest.mark.parametrize(("answer", "code", "stays"), [("n", 1, True), ("", 1, True), ("y", 0, False)])
def test_on_a_terminal_yes_has_to_be_said(answer: str, code: int, stays: bool) -> None:
    import pty

    manifest("one", "a-one")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "texforce_cli", "rewards", "remove", "a-one"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as asked:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        assert asked.wait(60) == code
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "Delete the environment of 'one'? [y/N]" in said and "Traceback" not in said
    assert bool(environments.installed()[0]) == stays


def test_an_environment_can_be_blocked_even_a_damaged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest("good", "glow")
    manifest("bad", "gloom").write_text("{")
    monkeypatch.setenv("TEXFORCE_BLOCK_PLUGINS", "good, bad")
    registry = load_registry()
    assert "glow" not in registry.names and registry.broken == {}


@pytest.mark.parametrize("package", ["", ".", "..", "../data", ".new-1", "/", "ABSOLUTE"])
def test_remove_touches_nothing_but_an_environment(package: str, tmp_path: Path) -> None:
    manifest("one", "a-one")
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(UsageError, match="no environment of"):
        environments.remove(str(precious) if package == "ABSOLUTE" else package)
    assert precious.exists()
    assert load_registry().find("a-one")


def test_what_no_manifest_names_is_swept_away_unless_the_manifest_cannot_be_read(tmp_path: Path) -> None:
    good, torn = manifest("good", "glow"), manifest("torn", "gloom")
    torn.write_text("{")
    for home in (good.parent, torn.parent, environments.root() / "left"):
        (home / "env-old").mkdir(parents=True)
    environments._sweep()
    assert sorted(path.parent.name + "/" + path.name for path in environments.root().glob("*/env-*")) == [
        "good/env-0",
        "torn/env-0",
        "torn/env-old",
    ]


def test_an_environment_that_was_replaced_stays_while_a_run_uses_it() -> None:
    folder = manifest("one", "a-one").parent / "env-old"
    folder.mkdir()
    with environments._lock(folder, shared=True):
        environments._sweep()
        assert folder.exists()
    environments._sweep()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("face-iqua", "unknown reward 'face-iqua'; did you mean 'face-iqa'"),
        ("texforce-handd", "did you mean 'hand'.*: texforce-handd==1.0"),
        ("texforce-exampl", "did you mean 'texforce-example'"),
        ("clipscore", "did you mean 'clip-score'"),
        ("hspv2", "did you mean 'hpsv2'"),
        ("texforce-face-aqi", "did you mean 'face-iqa'"),
        ("pickscore", "'pickscore' is built in, there is nothing to install"),
        ("Tiny_CLIP", "'Tiny_CLIP' is built in"),
        ("scores-file", "is built in"),
        ("./nothing", "holds no Python package"),
        ("--index-url=x", "is no name of a package"),
        ("a b", "is no name of a package"),
    ],
)
def test_a_name_is_never_guessed_at(asked: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        environments.resolve(asked)


def test_names_of_ours_come_from_the_table_and_strangers_are_strangers(tmp_path: Path) -> None:
    assert environments.resolve("mean-colour").ours
    for spelt, package in (
        ("Face_IQA", "texforce-face-iqa"),
        ("HPSv2-1", "texforce-hpsv2"),
        ("Texforce.Hand", "texforce-hand"),
    ):
        assert Path(environments.resolve(spelt).requirement).name == package
    assert Path(environments.resolve("texforce-example").requirement).name == "texforce-example"
    for stranger in (
        "somebodys-reward>=2",
        "texforce-sharpness",
        "texforce-anime",
        "texforce-text",
        "hpsv3",
        "handd==1.0",
    ):
        assert not environments.resolve(stranger).ours
    folder = write_plugin("sharp-edges", tmp_path / "p")
    assert environments.resolve(str(folder)) == environments.Source(str(folder), False, "p")


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "no space left"),
        (
            "WARNING: Retrying ... NewConnectionError ... \nERROR: Could not find a version that satisfies x",
            r"index could not be reached \(ERROR: Could not find a version",
        ),
        ("error: Failed to write to the distribution cache\n  Caused by: No space ... (os error 28)", "no space left"),
        ("error: failed to create directory\n  Caused by: Disk quota exceeded (os error 122)", "no space left"),
        (
            "WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'ConnectTimeoutError(<...>, 'Connection to "
            "10.0.0.1 timed out. (connect timeout=15)')': /simple/x/\nERROR: No matching distribution found for x",
            r"index could not be reached \(ERROR: No matching distribution",
        ),
        (
            "WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'ProxyError('Cannot connect to proxy.', "
            "OSError('Tunnel connection failed: 403'))': /simple/x/\nERROR: No matching distribution found for x",
            "index could not be reached",
        ),
        (
            "error: Failed to fetch: `https://x/simple/y/`\n  Caused by: dns error: failed to lookup address",
            r"index could not be reached \(error: Failed to fetch",
        ),
        ("ERROR: nope from https://me:secret@host/simple", r"refused: ERROR: nope from https://\*\*\*@host"),
        ("", "refused: no output"),
        ("/usr/bin/python3.11: No module named pip", "has no pip to make an environment with"),
        (
            "because ensurepip is not available.\n\nFailing command: /x/bin/python3.11",
            "has no pip to make an environment",
        ),
    ],
)
def test_what_the_installer_says_becomes_one_sentence_without_passwords(output: str, sentence: str) -> None:
    with pytest.raises(TexforceError, match=sentence):
        raise environments._refusal(output)


def fake_interpreter(tmp_path: Path, body: str) -> str:
    """An "interpreter" whose every call runs `body` (Python), to see what a failed install leaves."""
    path = tmp_path / "python-fake"
    path.write_text(f"#!{sys.executable}\nimport sys, os\n{textwrap.dedent(body)}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("sys.exit('OSError: [Errno 28] No space left on device')", "no space left on the disk"),
        ("sys.exit('error: NewConnectionError')", "could not be reached"),
        ("sys.exit('fatal: something else')", "the installer refused: fatal: something else"),
    ],
)
def test_nothing_half_made_stays(tmp_path: Path, body: str, sentence: str) -> None:
    source = environments.Source("whatever", True, "whatever")
    python = fake_interpreter(tmp_path, f"os.makedirs(sys.argv[3]); open(sys.argv[3] + '/half', 'w').close(); {body}")
    with pytest.raises(TexforceError, match=sentence):
        environments.install_isolated(source, python=python, variant="cpu", say=lambda text: None)
    assert list(environments.root().iterdir()) == []


def test_a_full_disk_is_said_also_where_the_installer_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "Error: Command '[...ensurepip...]' returned non-zero exit status 1."  # venv shows no more of pip's own error
    )
    python, source = fake_interpreter(tmp_path, f"sys.exit({said!r})"), environments.Source("x", True, "x")
    for free, sentence in ((3_000_000, "no space left on the disk"), (10**12, "the installer refused: Error: Command")):
        monkeypatch.setattr(environments.shutil, "disk_usage", lambda path, free=free: mock.Mock(free=free))
        with pytest.raises(TexforceError, match=sentence):
            environments.install_isolated(source, python=python, variant="cpu", say=lambda text: None)
        assert list(environments.root().iterdir()) == []


def test_no_space_for_the_manifest_leaves_the_environment_before_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = manifest("one", "a-one").read_bytes()
    reward = {"name": "a-one", "factory": "x:Y", "api_version": 1}
    monkeypatch.setattr(environments, "write_json", full)
    for package in ("one", "another"):
        told = {"rewards": [{**reward, "distribution": package}], "python": "3.11.7"}
        monkeypatch.setattr(isolation, "ask_once", lambda place, header, told=told: told)
        folder = environments.root() / ".new-1" / "env-1"
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(TexforceError, match="no space left on the disk"):
            environments._adopt(folder, "")
    assert sorted(path.name for path in environments.root().iterdir()) == [".new-1", "one"]
    assert sorted(path.name for path in (environments.root() / "one").iterdir()) == ["env-0", "manifest.json"]
    assert (environments.root() / "one" / "manifest.json").read_bytes() == before


def test_beside_texforce_a_package_is_installed_with_what_it_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = write_plugin("sharp-edges", tmp_path / "p"), []
    monkeypatch.setattr(environments._Installer, "_run", lambda self, command: asked.append(command))
    environments.install_here(environments.resolve(str(folder)), lambda text: None)
    ((python, *words),) = asked
    assert (python, words[:3], words[-1]) == (sys.executable, ["-m", "pip", "install"], str(folder))
    assert "--no-deps" not in words


UV = """
import json, os, subprocess, sys
with open(os.environ["UV_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    sys.exit(subprocess.run([sys.argv[3], "-m", "venv", "--without-pip", sys.argv[4]]).returncode)
sys.exit("error: Failed to fetch\\n  Caused by: dns error")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a script as a program")
def test_uv_is_taken_where_it_is_on_the_path_and_pip_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    (tools / "uv").write_text(f"#!{sys.executable}\n{UV}")
    (tools / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("UV_LOG", str(log))
    source = environments.Source("whatever", True, "whatever")
    for installer, fake in (
        ("", sys.executable),
        ("uv", sys.executable),
        ("pip", fake_interpreter(tmp_path, "sys.exit(7)")),
    ):
        monkeypatch.setenv("TEXFORCE_INSTALLER", installer)
        with pytest.raises(TexforceError, match="refused" if installer == "pip" else "could not be reached"):
            environments.install_isolated(source, python=fake, variant="cpu", say=lambda text: None)
        assert list(environments.root().iterdir()) == []
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [words[0] for words in asked] == ["venv", "pip"] * 2
    assert asked[0][1:3] == ["--python", sys.executable]
    (folder,) = asked[0][3:]
    assert asked[1] == ["pip", "install", "--python", f"{folder}/bin/python", "--no-deps", "whatever"]
    monkeypatch.setenv("TEXFORCE_INSTALLER", "uv")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="TEXFORCE_INSTALLER is 'uv', which is not on the PATH"):
        environments.install_isolated(source, python=sys.executable, variant="cpu", say=lambda text: None)


def test_what_pip_refuses_beside_texforce_is_one_sentence(tmp_path: Path) -> None:
    source = environments.Source(str(tmp_path / "nowhere"), False, "nowhere")
    with pytest.raises(TexforceError, match=r"the installer refused: ERROR: .*nowhere"):
        environments.install_here(source, lambda text: None)


def test_an_install_that_was_killed_is_swept_away_by_the_next(tmp_path: Path) -> None:
    python = fake_interpreter(
        tmp_path, "os.makedirs(sys.argv[3]); print('made', flush=True); import time; time.sleep(60)"
    )
    program = (
        "import sys; from texforce_cli.rewards import environments as e\n"
        f"e.install_isolated(e.Source('x', True, 'x'), python={python!r}, variant='cpu', say=print)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.DEVNULL)
    for _ in range(200):
        if list(environments.root().glob(".new-*/env-*")):
            break
        time.sleep(0.05)
    environments._sweep()
    assert len(list(environments.root().glob(".new-*"))) == 1  # its install is alive
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    environments._sweep()
    assert list(environments.root().iterdir()) == []


def test_an_interpreter_that_is_none_is_named() -> None:
    source = environments.Source("x", True, "x")
    for python in ("3.99", "/nowhere/python"):
        with pytest.raises(UsageError, match=r"on the PATH|is no interpreter"):
            environments.install_isolated(source, python=python, variant="cpu", say=lambda text: None)


@pytest.mark.parametrize(("line", "fits"), [("# python >=3.10,<3.20", True), ("# python <3.10", False), ("", True)])
def test_a_lock_says_which_pythons_it_is_for(tmp_path: Path, line: str, fits: bool) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text(f"{line}\npluggy==1.6.0\n")
    (tmp_path / "pyvenv.cfg").write_text("version = 3.11.7\n")
    if fits:
        environments._check_python(lock, tmp_path)
    else:
        with pytest.raises(UsageError, match=r"need Python <3.10, this is 3.11"):
            environments._check_python(lock, tmp_path)


def test_a_variant_has_its_lock_or_that_of_the_cpu(tmp_path: Path) -> None:
    locks = tmp_path / "lib" / "python3.11" / "site-packages" / "texforce_x" / "locks"
    assert environments._find_lock(tmp_path, "cuda") is None
    locks.mkdir(parents=True)
    (locks / "cpu.txt").write_text("# python >=3.11\nnumpy==2.0\ntorch==2.13.0\n")
    assert environments._find_lock(tmp_path, "cuda") == environments._find_lock(tmp_path, "cpu") == locks / "cpu.txt"
    (locks / "cuda.txt").write_text("nvidia-cublas==13.0\ntorch==2.13.0\n")
    assert environments._find_lock(tmp_path, "cuda") == locks / "cuda.txt"
    # only a lock without CUDA's packages leaves it to torch to name them
    assert [environments._torch(locks / f"{name}.txt") for name in ("cpu", "cuda")] == ["torch==2.13.0", ""]


@pytest.mark.parametrize("written", ["texforce_x", "Texforce.X", "texforce-x"])
def test_the_version_is_found_however_the_package_writes_its_name(tmp_path: Path, written: str) -> None:
    for name in (f"{written}-1.2", "texforce_x_more-3.4"):
        (tmp_path / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)
    assert environments._version(tmp_path, "texforce-x") == "1.2"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--variant", "tpu"], "--variant 'tpu' is none of auto, cpu, cuda"),
        (["--here", "--python", "3.11"], "--python goes with --isolated"),
    ],
)
def test_options_of_install_that_cannot_be_are_refused(
    options: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["rewards", "install", "hand", *options]) == 2
    assert sentence in capfd.readouterr().err


# the whole way, with pip --------------------------------------------------------------------------------------------


def install(what: str) -> environments.Environment:
    return environments.install_isolated(environments.resolve(what), python=None, variant="cpu", say=lambda text: None)


def test_a_new_plugin_installs_scores_and_goes(tmp_path: Path) -> None:
    folder = write_plugin("sharp-edges", tmp_path / "texforce-sharp-edges")
    made = install(str(folder))
    assert (made.package, made.version) == ("texforce-sharp-edges", "0.1.0")
    registry = load_registry()
    assert [option["name"] for option in registry.find("sharp-edges").options()] == ["threshold"]
    rewards = RewardSet(parse_terms(["sharp-edges"], ["sharp-edges.threshold=0.4"]), registry)
    try:
        images = pictures(3)
        found = rewards.score(images, ["a", "b", "c"], [{}] * 3)["sharp-edges"]
        assert found.tolist() == pytest.approx((images.mean(-1) > 255 * 0.4).mean((1, 2)).tolist())
        with pytest.raises(TexforceError, match="in use"):
            environments.remove("texforce-sharp-edges")
    finally:
        rewards.close()
    again = install(str(folder))  # an update replaces the environment
    assert again.folder != made.folder and not made.folder.exists()
    environments.remove("texforce-sharp-edges")
    assert not list(environments.root().glob("*"))


@pytest.mark.slow
def test_without_a_network_pip_itself_is_understood_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"INDEX_URL": "http://127.0.0.1:9", "EXTRA_INDEX_URL": "", "FIND_LINKS": "", "RETRIES": "1"}
    for name, value in {"CONFIG_FILE": os.devnull, **nowhere}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(TexforceError, match="the package index could not be reached"):
        install("nothing-here-at-all")
    assert not list(environments.root().glob("*"))


@pytest.mark.slow
def test_a_package_without_a_reward_is_refused(tmp_path: Path) -> None:
    folder = write_plugin("nothing", tmp_path / "p")
    (folder / "texforce_nothing" / "__init__.py").write_text("")
    with pytest.raises(UsageError, match="registers no reward"):
        install(str(folder))
    (folder / "texforce_nothing" / "__init__.py").write_text("raise RuntimeError('moon')")
    with pytest.raises(TexforceError, match="its registration fails: RuntimeError: moon"):
        install(str(folder))
    assert not list(environments.root().glob("*"))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            {"rewards": []},
            r"registers no reward; .*texforce_register_rewards; .*texforce_register_judges.* with --here",
        ),
        (
            isolation.RewardFailure("ModuleNotFoundError: No module named 'texforce_cli'"),
            "imports texforce: add --here",
        ),
        (isolation.RewardFailure("RuntimeError: moon"), "see its author"),
    ],
)
def test_a_package_of_judges_is_told_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: object, says: str
) -> None:
    monkeypatch.setattr(isolation, "ask_once", mock.Mock(side_effect=[answer]))
    with pytest.raises(TexforceError, match=says):
        environments._adopt(tmp_path, "")


def test_the_written_plugin_passes_its_own_tests(tmp_path: Path) -> None:
    folder = write_plugin("sharp-edges", tmp_path / "texforce-sharp-edges")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_package_that_lives_from_its_lock_is_not_installed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nameless-1.0.dist-info").mkdir()
    (tmp_path / "nameless-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # which must not matter
    folder = write_plugin("sharp-edges", tmp_path / "p")
    source = environments.resolve(str(folder))
    lock = folder / "texforce_sharp_edges" / "locks" / "cpu.txt"
    lock.parent.mkdir()
    lock.write_text("# python >=3.11\nNumPy==2.0\nnot-here-at-all==1.0\n")
    with pytest.raises(UsageError, match=r"p needs pinned packages that are not beside texforce \(not-here-at-all\)"):
        environments.install_here(source, lambda text: None)
    lock.write_text("# python >=3.11\nNumPy==2.0\n")
    assert environments._pinned_elsewhere(folder) == []


def test_what_was_installed_here_is_removed_by_pip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_plugin("sharp-edges", tmp_path / "p")
    info = folder / "texforce_sharp_edges-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: texforce-sharp-edges\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[texforce]\nsharp-edges = texforce_sharp_edges\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("sharp-edges", "texforce-sharp-edges"):
        assert run(["rewards", "remove", name]) == 2
        assert "pip uninstall texforce-sharp-edges" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["brightness", "clip-score", "hand", "hpsv2-1"])
def test_a_plugin_gets_no_name_that_texforce_has_given_away(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is the name of a reward that comes with texforce; choose another"):
        write_plugin(name, tmp_path / "p")


@pytest.mark.parametrize("name", ["Sharp", "a_b", "-x", "../evil", "a--b", "", "none", "true", "cli"])
def test_names_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a reward"):
        write_plugin(name, tmp_path / "p")


def test_a_folder_that_holds_something_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        write_plugin("fine", tmp_path)
