"""Environments of their own for rewards: made whole or not at all, listed from a manifest without importing anything.

<data folder>/rewards/<package>/manifest.json      what it registers, written last
<data folder>/rewards/<package>/env-<hex>/         a virtual environment; one without a manifest is swept away
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import patiently, user_folder, user_path, write_error, write_json
from texforce_cli.rewards import builtin
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.registry import (
    JUDGES,
    REWARDS,
    Registry,
    RewardInfo,
    normal,
    plugin_calls,
    plugin_manager,
    plugins,
)

MANIFEST_VERSION = 1
OURS: Mapping[str, str] = {
    "image-reward": "texforce-image-reward",
    "hpsv2": "texforce-hpsv2",
    "hpsv2.1": "texforce-hpsv2",
    "face-iqa": "texforce-face-iqa",
    "hand": "texforce-hand",
    "mean-colour": "texforce-example",
}
"""Reward names that `install` knows, and the package that comes with texforce for each."""

# compiled where they are used: the list of rewards needs none of them
_NAME = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_PACKAGE = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:\[[^]]*\])?(?:[=<>!~].*)?"
_PREFIX = "texforce-"
_NEAR_MISS = 0.85
Variant = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Environment:
    """An installed environment, as its manifest says."""

    package: str
    version: str
    folder: Path
    rewards: tuple[Mapping[str, Any], ...]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return _python(self.folder)

    @property
    def sites(self) -> list[str]:
        """Where its packages are."""
        return [str(path) for pattern in ("*", "*/*") for path in self.folder.glob(f"[Ll]ib{pattern}/site-packages")]

    @property
    def place(self) -> Place:
        """Where its workers run."""
        return Place(str(self.python))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, `remove` refuses.

        Raises:
            TexforceError: it is being removed.
        """
        with _lock(self.folder, shared=True) as held:
            if not held:
                raise TexforceError(f"the environment of '{self.package}' is being removed", "install it again")
            yield


@dataclass(frozen=True)
class Source:
    """What `install` was asked for: a package of ours, a folder or wheel, or a name at the package index."""

    requirement: str
    ours: bool
    said: str


def automatic_variant() -> Variant:
    """`cuda` where the system has the driver of an NVIDIA card; the pins for it are of packages for Linux."""
    return "cuda" if sys.platform == "linux" and shutil.which("nvidia-smi") else "cpu"


def root() -> Path:
    """Where all environments are."""
    return user_folder("data") / "rewards"


def installed() -> tuple[list[Environment], dict[str, str]]:
    """The environments that are whole, and for each manifest that cannot be used its package and why."""
    found, broken = [], {}
    for path in sorted(root().glob("*/manifest.json")):
        package = path.parent.name
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["texforce_environment"] != MANIFEST_VERSION:
                raise ValueError("its manifest is of another version of texforce")
            environment = Environment(
                package=package,
                version=str(manifest["version"]),
                folder=path.parent / Path(manifest["folder"]).name,
                rewards=tuple(dict(entry) for entry in manifest["rewards"]),
            )
            if not environment.python.exists():
                raise ValueError("its interpreter is gone")
        except (OSError, ValueError, KeyError, TypeError) as error:
            broken[package] = f"{error}" if isinstance(error, ValueError) else "its manifest is damaged"
            continue
        found.append(environment)
    return found, broken


def resolve(asked: str) -> Source:
    """What NAME, PACKAGE or PATH means. A reward's name is looked up in our own table alone, however it is spelt.

    Raises:
        UsageError: a built-in reward, a path without a package, a near miss of a name of ours, or no package name.
    """
    known = {normal(name): package for name, package in OURS.items()} | {package: package for package in OURS.values()}
    if package := known.get(normal(asked)):
        return Source(str(_bundled(package)), True, package)
    built_in = built_in_names()
    if normal(asked) in map(normal, built_in):
        raise UsageError(f"the reward '{asked}' is built in, there is nothing to install", "see texforce rewards")
    path = user_path(asked)
    if path.exists() or os.sep in asked or asked.startswith((".", "~")):
        if path.suffix == ".whl" and path.is_file():
            return Source(str(path.resolve()), False, path.name)
        if not (path / "pyproject.toml").is_file():
            raise UsageError(
                f"'{asked}' holds no Python package", "give a folder with a pyproject.toml, or a .whl file"
            )
        return Source(str(path.resolve()), False, path.resolve().name)
    # without what the packages of all rewards begin with: it makes strangers alike
    named = {name.removeprefix(_PREFIX): name for name in (*OURS.values(), *OURS, *built_in)}
    bare = normal(asked).removeprefix(_PREFIX)
    swapped = [name for name in named if sorted(name) == sorted(bare)]
    if close := swapped or difflib.get_close_matches(bare, named, n=1, cutoff=_NEAR_MISS):
        raise UsageError(
            f"unknown reward '{asked}'",
            f"did you mean '{named[close[0]]}'? Of ours there are {', '.join(OURS)}; of somebody's package, give the version "
            f"too: {asked}==1.0",
        )
    if not re.fullmatch(_PACKAGE, asked):
        raise UsageError(f"'{asked}' is no name of a package", f"give a path, a package, or one of {', '.join(OURS)}")
    return Source(asked, False, f"{asked} of the package index")


def built_in_names() -> list[str]:
    """The rewards that need no package of their own."""
    return [call["name"] for call in plugin_calls(plugin_manager(), builtin, "texforce", REWARDS)]


def absent(there: Collection[str]) -> list[RewardInfo]:
    """The rewards of the packages that come with texforce and are not `there`, by name, as these register them."""
    registry, manager = Registry(), plugin_manager()
    for package in dict.fromkeys(OURS.values()):
        if package in there:
            continue
        with contextlib.suppress(TexforceError):  # a texforce without its packages has nothing to say of them
            path = _bundled(package) / package.replace("-", "_") / "__init__.py"
            registry.add(plugin_calls(manager, _module(path), package, REWARDS), package, "")
    return [registry.rewards[key] for key in sorted(registry.rewards)]


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"texforce_absent.{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise TexforceError(f"'{path}' is no Python module", "reinstall texforce")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _bundled(package: str) -> Path:
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "plugins", here.parent / "plugins"):
        if (folder / package / "pyproject.toml").is_file():
            return folder / package
    raise TexforceError(f"the package '{package}' is not beside this texforce", "reinstall texforce, or give its PATH")


def install_isolated(
    source: Source, *, python: str | None, variant: Variant, say: Callable[[str], None]
) -> Environment:
    """An environment for the package of `source`, from the lock that it carries.

    Nothing half-made stays: whatever fails, the folder is removed; the manifest is written last.

    Raises:
        UsageError: an interpreter that does not exist or does not fit the lock, or a package that registers no reward.
        TexforceError: no space, no network, or pip's own refusal.
    """
    interpreter = _interpreter(python)
    staging = root() / f".new-{uuid.uuid4().hex[:8]}"
    _sweep()
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise write_error(staging, error) from error
    try:
        with _lock(staging, shared=True):  # a second install sweeps only what nobody holds
            folder = staging / f"env-{uuid.uuid4().hex[:8]}"
            installer = _Installer(interpreter, folder, say)
            say("making a virtual environment")
            installer.make()
            say(f"installing {source.said}")
            installer.install(["--no-deps", source.requirement])
            lock = _find_lock(folder, variant)
            if lock:
                _check_python(lock, folder)
                say(f"installing {_count(lock)} pinned packages ({lock.stem})")
                if torch := _torch(lock):
                    # by its own requirements: the build that an index offers may want CUDA's packages, or none
                    installer.install(["-c", str(lock), torch])
                installer.install(["--no-deps", "-r", str(lock)])
            else:
                installer.install(["pluggy", source.requirement])
            return _adopt(folder, lock.stem if lock else "")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _adopt(folder: Path, lock: str) -> Environment:
    """Ask the new environment what it registers, move it to its place, write the manifest."""
    from texforce_cli.rewards.isolation import RewardFailure, WorkerFailure, ask_once

    try:
        told = ask_once(Place(str(_python(folder))), {"type": "describe"})
    except (WorkerFailure, RewardFailure) as error:
        remedy = (
            "it imports texforce: add --here" if "No module named 'texforce_cli" in str(error) else "see its author"
        )
        raise TexforceError(f"the package was installed, but its registration fails: {error}", remedy) from error
    rewards = told["rewards"]
    if not rewards:
        raise UsageError(
            "the package registers no reward",
            f"its entry point in the group 'texforce' needs a hook {REWARDS}; judges ({JUDGES}) are installed with --here",
        )
    package = normal(str(rewards[0]["distribution"]))
    if not re.fullmatch(_NAME, package):
        raise UsageError(f"the package calls itself {package!r}", "see its author")
    try:
        Registry().add(rewards, package, "")
    except ValueError as error:
        raise UsageError(f"the package breaks the contract: {error}", "see its author") from error
    home = root() / package
    final, version = home / folder.name, _version(folder, package)
    with _lock(folder, shared=True):  # which stays with the folder when it is renamed: nobody sweeps it meanwhile
        try:
            home.mkdir(parents=True, exist_ok=True)
            patiently(lambda: folder.rename(final))
            write_json(
                home / "manifest.json",
                {
                    "texforce_environment": MANIFEST_VERSION,
                    "package": package,
                    "version": version,
                    "folder": final.name,
                    "python": told["python"],
                    "lock": lock,
                    "rewards": rewards,
                },
            )
        except BaseException as error:
            shutil.rmtree(final, ignore_errors=True)
            with contextlib.suppress(OSError):
                home.rmdir()
            if isinstance(error, OSError):
                raise write_error(home, error) from error
            raise
    _sweep()
    return Environment(package, version, final, tuple(rewards))


def remove(package: str) -> int:
    """Delete the environment of `package`; bytes freed.

    Raises:
        UsageError: there is none.
        TexforceError: a run uses it, or it cannot be deleted.
    """
    home = root() / package
    if not re.fullmatch(_NAME, package) or not home.is_dir():
        if any(plugin.origin == package for plugin in plugins()):
            raise UsageError(f"'{package}' is installed beside texforce", f"remove it with: pip uninstall {package}")
        names = ", ".join(environment.package for environment in installed()[0]) or "none"
        raise UsageError(f"there is no environment of '{package}'", f"there are: {names}")
    with contextlib.ExitStack() as stack:
        for folder in home.glob("env-*"):
            if not stack.enter_context(_lock(folder, shared=False)):
                raise TexforceError(
                    f"the environment of '{package}' is in use by a run", "remove it when the run has ended"
                )
        size = sum(path.lstat().st_size for path in home.rglob("*") if not path.is_dir())
        try:
            (home / "manifest.json").unlink(missing_ok=True)  # first: from here on it is gone for everybody
            shutil.rmtree(home)
        except OSError as error:
            raise TexforceError(f"'{home}' could not be deleted ({error.strerror})", "delete the folder") from error
    return size


def install_here(source: Source, say: Callable[[str], None]) -> None:
    """Install the package into the environment that texforce runs in, by its own requirements.

    Raises:
        UsageError: it lives from pinned packages that are not all here.
        TexforceError: as in `install_isolated`.
    """
    if absent := _pinned_elsewhere(Path(source.requirement)):
        raise UsageError(
            f"{source.said} needs pinned packages that are not beside texforce ({', '.join(absent[:4])}"
            f"{', ...' if absent[4:] else ''})",
            "leave out --here: it gets an environment of its own",
        )
    say(f"installing {source.said} beside texforce")
    _Installer(sys.executable, Path(sys.prefix), say).install([source.requirement])


# installing -----------------------------------------------------------------------------------------------------------


class _Installer:
    """uv where there is one, else venv and pip. TEXFORCE_INSTALLER=pip or uv decides otherwise."""

    def __init__(self, interpreter: str, folder: Path, say: Callable[[str], None]) -> None:
        self.interpreter, self.folder, self.say = interpreter, folder, say
        wanted = os.environ.get("TEXFORCE_INSTALLER", "")
        self.uv = None if wanted == "pip" else shutil.which("uv")
        if wanted == "uv" and self.uv is None:
            raise UsageError("TEXFORCE_INSTALLER is 'uv', which is not on the PATH", "install uv, or unset it")

    def make(self) -> None:
        """The empty environment."""
        if self.uv:
            self._run([self.uv, "venv", "--python", self.interpreter, str(self.folder)])
        else:
            self._run([self.interpreter, "-m", "venv", str(self.folder)])

    def install(self, what: Sequence[str]) -> None:
        """`pip install` in it."""
        python = str(_python(self.folder)) if self.folder != Path(sys.prefix) else sys.executable
        if self.uv:
            self._run([self.uv, "pip", "install", "--python", python, *what])
        else:
            self._run([python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *what])

    def _run(self, command: Sequence[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        try:
            process = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        except OSError as error:
            raise TexforceError(
                f"'{command[0]}' could not be run ({error.strerror})", "choose another --python"
            ) from error
        if process.returncode:
            raise _refusal(process.stdout + "\n" + process.stderr, shutil.disk_usage(self.folder.parent).free)


_NO_NETWORK = (
    r"(NewConnectionError|ConnectionError|Temporary failure in name resolution|Max retries exceeded|ReadTimeout|"
    r"ConnectTimeout|after connection broken by|Connection (?:refused|reset|aborted)|Network is unreachable|dns error|"
    r"error sending request)"
)

_NO_ROOM = ("No space left on device", "os error 28", "Errno 122", "os error 122", "os error 112", "WinError 112")


_LITTLE = 50_000_000
"""Fewer bytes do not hold an environment; venv hides what pip says in it of a full disk."""


def _refusal(output: str, free: int = _LITTLE) -> TexforceError:
    """The sentence for what pip or uv said, with so many bytes `free` on the disk; passwords in addresses are left out."""
    output = re.sub(r"//[^/@\s]+@", "//***@", output)
    no_network = re.search(_NO_NETWORK, output, re.IGNORECASE)
    if any(sign in output for sign in _NO_ROOM) or (free < _LITTLE and not no_network):
        return TexforceError(
            "no space left on the disk for the environment", "free some space; nothing half-made is left"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "×", "fatal"))] or lines[-1:] or ["no output"]
    if no_network:
        return TexforceError(
            f"the package index could not be reached ({errors[-1][:300]})",
            "look at the network, or at PIP_INDEX_URL; nothing half-made is left",
        )
    if "ensurepip is not available" in output or "No module named pip" in output:
        return TexforceError(
            "this Python has no pip to make an environment with",
            "install uv, or the package of its venv (apt install python3-venv), or name another with --python",
        )
    return TexforceError(f"the installer refused: {errors[-1][:500]}", "nothing half-made is left")


def _interpreter(python: str | None) -> str:
    """`--python`: a path, a version as in 3.11, or by default the interpreter of texforce."""
    if python is None:
        return sys.executable
    if re.fullmatch(r"3\.\d+", python):
        found = shutil.which(f"python{python}")
        if found is None:
            raise UsageError(f"there is no python{python} on the PATH", "give the path of an interpreter to --python")
        return found
    if shutil.which(python) is None:
        raise UsageError(f"'{python}' is no interpreter", "give a path, or a version such as 3.11, to --python")
    return python


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _find_lock(folder: Path, variant: Variant) -> Path | None:
    """The lock inside the installed package; a package without one for CUDA has the other."""
    for name in dict.fromkeys((variant, "cpu")):
        if found := sorted(folder.glob(f"[Ll]ib*/**/site-packages/*/locks/{name}.txt")):
            return found[0]
    return None


def _pinned_elsewhere(folder: Path) -> list[str]:
    """What the lock of a package's sources pins and this environment does not have."""
    locks = sorted(folder.glob("*/locks/cpu.txt")) if folder.is_dir() else []
    pins = [
        line.partition("==")[0]
        for lock in locks[:1]
        for line in lock.read_text(encoding="utf-8").splitlines()
        if "==" in line
    ]
    return [name for name in pins if not _is_here(name)]


def _is_here(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _check_python(lock: Path, folder: Path) -> None:
    """The first line of a lock may say `# python >=3.10,<3.13`."""
    text = lock.read_text(encoding="utf-8").splitlines()[:1]
    bounds = re.findall(r"([<>]=?)\s*3\.(\d+)", text[0]) if text and text[0].startswith("# python") else []
    configuration = (folder / "pyvenv.cfg").read_text(encoding="utf-8")
    has = re.search(r"^version(?:_info)?\s*=\s*3\.(\d+)", configuration, re.MULTILINE)
    minor = int(has.group(1)) if has else sys.version_info.minor
    tests = {">=": minor.__ge__, ">": minor.__gt__, "<=": minor.__le__, "<": minor.__lt__}
    if not all(tests[sign](int(bound)) for sign, bound in bounds):
        wanted = text[0].removeprefix("# python").strip()
        raise UsageError(
            f"its pinned packages need Python {wanted}, this is 3.{minor}", "choose another with --python 3.11"
        )


def _torch(lock: Path) -> str:
    """The pin of torch in a lock that leaves out what torch itself requires; "" where there is none."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    if any(line.startswith("nvidia-") for line in lines):
        return ""
    return next((line for line in lines if line.startswith("torch==")), "")


def _count(lock: Path) -> int:
    return sum("==" in line for line in lock.read_text(encoding="utf-8").splitlines())


def _version(folder: Path, package: str) -> str:
    for path in folder.glob("[Ll]ib*/**/site-packages/*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
        if normal(name) == package:
            return version
    return ""


def _sweep() -> None:
    """Delete what no manifest names and nobody holds: what killed installs have left, and environments replaced."""
    for folder in [*root().glob(".new-*"), *root().glob("*/env-*")]:
        if folder.name.startswith("env-") and _may_be_named(folder):
            continue
        with _lock(folder, shared=False) as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)


def _may_be_named(folder: Path) -> bool:
    """Whether the manifest beside `folder` names it, or cannot be read and so might."""
    try:
        manifest = json.loads((folder.parent / "manifest.json").read_text(encoding="utf-8"))
        return bool(manifest["folder"] == folder.name)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True


@contextlib.contextmanager
def _lock(folder: Path, *, shared: bool) -> Iterator[bool]:
    """Whether the lock of `folder` could be had; the system frees it with the process."""
    try:
        import fcntl
    except ImportError:
        with _lock_of_bytes(folder, shared=shared) as held:
            yield held
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        yield False
        return
    else:
        yield True
    finally:
        os.close(handle)


_HOLDERS = 64


@contextlib.contextmanager
def _lock_of_bytes(folder: Path, *, shared: bool) -> Iterator[bool]:
    """The same on Windows, which locks no folder: a byte of a file beside it for each who shares it, or all of them."""
    path = root() / f"lock-{folder.name}"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError:
        yield False
        return
    try:
        yield any(_locked(handle, place, 1) for place in range(_HOLDERS)) if shared else _locked(handle, 0, _HOLDERS)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # Windows removes no file that another process has open
            path.unlink()


def _locked(handle: int, start: int, count: int) -> bool:
    import msvcrt

    os.lseek(handle, start, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, count)  # type: ignore[attr-defined]  # of Windows
    except OSError:
        return False
    return True
