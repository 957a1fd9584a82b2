"""Which rewards there are: built-ins, plugins and environments, all of one contract; each is imported only when asked for.

A plugin that fails to load is kept with its reason in `Registry.broken`; only the command that asks for it fails.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import pluggy

from texforce_cli import __version__
from texforce_cli.errors import TexforceError, UsageError, did_you_mean
from texforce_cli.rewards import builtin, hookspecs, worker

if TYPE_CHECKING:
    from texforce_cli.rewards.environments import Environment
    from texforce_cli.rewards.isolation import WorkerSettings
    from texforce_cli.rewards.places import Place


class Reward(Protocol):
    """What a reward class offers; see `hookspecs`."""

    def score(
        self, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """One finite number an image; None for one that a process of its own could not score."""
        ...


@dataclass(frozen=True)
class Registered:
    """What is registered and has not been imported yet; `kind` is what messages call it, `remedy` what they say of wrong options."""

    kind: ClassVar[str]
    remedy: ClassVar[str]
    name: str
    factory: str
    origin: str
    version: str
    summary: str = ""

    def load(self) -> Any:
        """The class, imported into this process.

        Raises:
            TexforceError: it cannot be.
        """
        try:
            with to_stderr():
                return worker.load(self.factory)
        # the plugin boundary: whatever a third party raises is named, not thrown at the user
        except (Exception, SystemExit) as error:
            raise TexforceError(
                f"{self.kind} '{self.name}' ({self.origin}) could not be imported: {worker.describe(error)}",
                f"repair or reinstall {self.origin}",
            ) from error

    def _made(self, options: Mapping[str, str]) -> Any:
        factory = self.load()
        arguments = self._typed(factory, options)
        try:
            with to_stderr():
                return factory(**arguments)
        except TexforceError:
            raise
        except (Exception, SystemExit) as error:
            raise TexforceError(
                f"{self.kind} '{self.name}' could not start: {worker.describe(error)}", "check its options"
            ) from error

    def _typed(self, factory: Any, options: Mapping[str, str]) -> dict[str, Any]:
        try:
            with to_stderr():
                return worker.typed_options(factory, options)
        except ValueError as error:
            raise UsageError(f"{self.kind} '{self.name}': {error}", self.remedy.format(self.name)) from error
        except Exception as error:  # annotations are the plugin's code
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> TexforceError:
        return TexforceError(
            f"the options of {self.kind} '{self.name}' cannot be read: {worker.describe(error)}", "leave them out"
        )


@dataclass(frozen=True)
class RewardInfo(Registered):
    """A reward. `backend` tells several ways to compute it apart."""

    kind = "reward"
    remedy = "see texforce rewards info {}"
    higher_is_better: bool = True
    unit: str = ""
    range: tuple[float, float] | None = None
    prompts: str = ""
    domain: str = ""
    licence: str = ""
    differentiable: bool = False
    backend: str = ""
    environment: Environment | None = None

    @property
    def state(self) -> str:
        """`built in`, `isolated`, or `here`: beside texforce, in its environment."""
        return "isolated" if self.environment else "built in" if self.origin == "texforce" else "here"

    @functools.cached_property
    def exact_version(self) -> str:
        """The version of its package and a hash of its code, which its author changes without a new version; of one that is
        built in, texforce's."""
        code = "" if self.state == "built in" else _code_hash(self.factory, self.environment)
        return f"{self.version}+{code}" if code else self.version

    def create(
        self, options: Mapping[str, str], workers: WorkerSettings | None = None, places: Sequence[Place] = ()
    ) -> Reward:
        """Make it with `options`, each converted to the type of its annotation: in this process, or in workers where it
        has an environment of its own or `places` are given.

        Raises:
            UsageError: an option that the class does not have, or a value of the wrong type.
            TexforceError: the class cannot be imported or refuses to be made.
        """
        if self.environment or places:
            return self._isolated(options, workers, places)
        reward: Reward = self._made(options)
        return reward

    def check(self, options: Mapping[str, str]) -> None:
        """Whether it has these options; of one that is not isolated, the types of their values too. It is not made.

        Raises:
            UsageError, TexforceError: as `create`, as far as the class alone tells.
        """
        if options and self.environment is None:
            self._typed(self.load(), options)
        elif unknown := sorted(options.keys() - {option["name"] for option in self.options()} if options else ()):
            raise UsageError(f"reward '{self.name}': it has no option '{unknown[0]}'", self.remedy.format(self.name))

    def options(self) -> list[dict[str, str]]:
        """Name, type and default of each option; an isolated reward is asked in its own environment.

        Raises:
            TexforceError: the class cannot be imported, or its options cannot be read.
        """
        if self.environment is None:
            factory = self.load()
            try:
                return worker.list_options(factory)
            except Exception as error:
                raise self._unreadable(error) from error
        from texforce_cli.rewards.isolation import RewardFailure, WorkerFailure, ask_once

        try:
            with self.environment.in_use():
                answer = ask_once(self.environment.place, {"type": "options", "factory": self.factory})
        except (WorkerFailure, RewardFailure) as error:
            raise TexforceError(
                f"reward '{self.name}' could not be asked for its options: {error}", f"reinstall {self.origin}"
            ) from error
        return list(answer["options"])

    def _isolated(self, options: Mapping[str, str], workers: WorkerSettings | None, places: Sequence[Place]) -> Reward:
        from texforce_cli.rewards.isolation import IsolatedReward, WorkerSettings

        held = contextlib.ExitStack()
        if self.environment:
            held.enter_context(self.environment.in_use())
        try:
            return IsolatedReward(
                self.name,
                self.factory,
                options,
                places or [cast("Environment", self.environment).place],
                workers or WorkerSettings(),
                on_close=held.close,
            )
        except BaseException:
            held.close()
            raise


def _code_hash(factory: str, environment: Environment | None) -> str:
    """Of the Python files of the package that `factory` is in, where it would be imported; "" where there are none."""
    import hashlib  # loads OpenSSL, which the list of rewards does without

    package = factory.partition(":")[0].partition(".")[0]
    find = importlib.util.find_spec
    try:
        spec = importlib.machinery.PathFinder.find_spec(package, environment.sites) if environment else find(package)
        if spec is None:
            return ""
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        found = [(folder, path) for folder in folders for path in folder.rglob("*.py")]
        # an editor's lock is a link to nothing
        files = {path.relative_to(folder).as_posix(): path for folder, path in found if path.is_file()}
        if not folders and spec.origin:
            files = {"": Path(spec.origin)}
        code = [(name, path.read_bytes()) for name, path in sorted(files.items())]
    except (ImportError, ValueError, OSError):
        return ""
    return hashlib.sha256(repr(code).encode()).hexdigest()[:8] if code else ""


def to_stderr() -> contextlib.AbstractContextManager[Any]:
    """While a plugin's code runs, what it prints goes to stderr: stdout holds data only."""
    return contextlib.redirect_stdout(sys.stderr)


_ABOUT = {field.name for field in fields(RewardInfo)} - {"name", "factory", "origin", "version", "environment"}


@dataclass
class Registry:
    """All rewards by (name, backend), and the plugins that failed with the reason."""

    rewards: dict[tuple[str, str], RewardInfo] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all rewards, each once, sorted."""
        return sorted({name for name, _ in self.rewards})

    def complaints(self) -> list[str]:
        """In sentences, which plugins are broken or slow."""
        return [
            *(f"plugin '{origin}' could not be loaded: {reason}" for origin, reason in self.broken.items()),
            *(f"plugin '{origin}' takes {took:.1f} s to register its rewards" for origin, took in self.slow.items()),
        ]

    def find(self, name: str, backend: str = "") -> RewardInfo:
        """The reward of that name: with that backend, else the one without a name for its backend, else the first.

        Raises:
            UsageError: there is none; the sentence names the nearest, how to install it, and plugins that failed to load.
        """
        if (name, backend) in self.rewards:
            return self.rewards[name, backend]
        others = [info for (known, _), info in self.rewards.items() if known == name]
        if others and not backend:
            return others[0]
        from texforce_cli.rewards.environments import OURS

        if name in OURS and (backend == "original" or not others):
            what = f"reward '{name}'" + (f" with backend={backend}" if others else "")
            why = f" ({self.broken[OURS[name]]})" if OURS[name] in self.broken else ""
            state = "cannot be used" if why else "is not installed"
            raise UsageError(f"{what} {state}{why}", f"install it: texforce rewards install {name}")
        if others:
            known = ", ".join(repr(info.backend) for info in others if info.backend) or "none by name"
            raise UsageError(f"reward '{name}' has no backend '{backend}'", f"its backends: {known}")
        hint = f"{did_you_mean(name, [*self.names, *OURS])}Rewards: {', '.join(self.names)}"
        if self.broken:
            hint += ". Not loaded: " + "; ".join(f"{origin} ({why})" for origin, why in self.broken.items())
        raise UsageError(f"unknown reward '{name}'", hint)

    def add(self, calls: Sequence[Mapping[str, Any]], origin: str, version: str, environment: Any = None) -> None:
        """Take over what one plugin registers, all of it or nothing.

        Raises:
            ValueError: an API version that is not ours, a near miss of a known key, a value of the wrong kind, or a name
                that another distribution has.
        """
        found: dict[tuple[str, str], RewardInfo] = {}
        for call in calls:
            info = _info(call, origin, version, environment)
            key = info.name, info.backend
            other = self.rewards.get(key) or found.get(key)
            if other and not (
                other.origin == origin and environment
            ):  # an environment goes before the same package here
                raise ValueError(f"reward '{info.name}' is registered by both '{other.origin}' and '{origin}'")
            found[key] = info
        self.rewards.update(found)


def registered(kind: str, call: Mapping[str, Any]) -> tuple[str, str]:
    """Name and factory of what a plugin registers.

    Raises:
        ValueError: no usable name or factory, or an API version that is not ours.
    """
    name, factory, api_version = call.get("name"), call.get("factory"), call.get("api_version")
    if not (isinstance(name, str) and name and not set(name) & set(":=/ \n") and isinstance(factory, str)):
        raise ValueError(f"it registers the {kind} {name!r} with the factory {factory!r}")
    if api_version != hookspecs.API_VERSION:
        raise ValueError(f"{kind} '{name}' wants API version {api_version}, this is {hookspecs.API_VERSION}")
    return name, factory


def _info(call: Mapping[str, Any], origin: str, version: str, environment: Any) -> RewardInfo:
    name, factory = registered("reward", call)
    # keys of later versions of the contract are passed over; a near miss of a known one is a mistake
    about = {key: value for key, value in call.items() if key in _ABOUT}
    for key in call.keys() - about.keys() - {"name", "factory", "api_version", "distribution"}:
        if close := difflib.get_close_matches(key, _ABOUT, n=1, cutoff=0.8):
            raise ValueError(f"reward '{name}' is registered with '{key}'; is '{close[0]}' meant?")
    for key, value in about.items():
        kind = bool if key in ("higher_is_better", "differentiable") else (list, tuple) if key == "range" else str
        if not isinstance(value, kind):
            raise ValueError(f"reward '{name}' is registered with {key}={value!r}")
    if "range" in about:
        try:
            low, high = about["range"]
            about["range"] = (float(low), float(high))
        except (TypeError, ValueError):
            raise ValueError(f"reward '{name}' is registered with range={about['range']!r}") from None
    return RewardInfo(name=name, factory=factory, origin=origin, version=version, environment=environment, **about)


SLOW_SECONDS = 0.5
"""A plugin that takes longer to register is named: the list of rewards waits for it."""


def load_registry() -> Registry:
    """The built-ins, then every plugin, then the environments."""
    from texforce_cli.rewards.environments import installed

    registry = Registry()
    registry.slow = gather(REWARDS, builtin, registry.add, registry.broken)
    environments, damaged = installed()
    for package, reason in damaged.items():
        if package not in _blocked():
            _note_broken(registry.broken, package, ValueError(reason))
    for environment in environments:
        if environment.package in _blocked():
            continue
        try:
            registry.add(environment.rewards, environment.package, environment.version, environment)
        except Exception as error:
            _note_broken(registry.broken, environment.package, error)
    return registry


def gather(
    hook: str, built_in: Any, add: Callable[[list[dict[str, Any]], str, str], None], broken: dict[str, str]
) -> dict[str, float]:
    """Give `add` what the built-ins, then every plugin of the entry-point group `texforce` register in `hook`, with its origin and
    version; those that fail are `broken`, with the reason. The seconds of those that are slow.

    TEXFORCE_BLOCK_PLUGINS=name,... leaves plugins out; TEXFORCE_STRICT_PLUGINS=1 makes a broken one fatal.
    """
    manager, slow = plugin_manager(), dict[str, float]()
    add(plugin_calls(manager, built_in, "texforce", hook), "texforce", __version__)
    for plugin in plugins():
        begun = time.perf_counter()
        try:
            with to_stderr():
                calls = plugin_calls(manager, plugin.load(), plugin.origin, hook)
            add(calls, plugin.origin, plugin.version)
        except (Exception, SystemExit) as error:  # one broken plugin must not take the others with it
            _note_broken(broken, plugin.origin, error)
        if (seconds := time.perf_counter() - begun) > SLOW_SECONDS:
            slow[plugin.origin] = seconds
    return slow


def _note_broken(broken: dict[str, str], origin: str, error: BaseException) -> None:
    if os.environ.get("TEXFORCE_STRICT_PLUGINS") == "1":
        raise TexforceError(f"plugin '{origin}' is broken: {worker.describe(error)}", "repair or remove it") from error
    broken[origin] = worker.describe(error)


REWARDS, JUDGES = "texforce_register_rewards", "texforce_register_judges"


@dataclass(frozen=True)
class Plugin:
    """An installed distribution that offers something, not loaded yet."""

    origin: str
    version: str
    entry: importlib.metadata.EntryPoint | _Unreadable

    def load(self) -> Any:
        """What its entry point names.

        Raises:
            ValueError: the entry point is none; and whatever the module raises when it is imported.
        """
        entry = self.entry
        if isinstance(entry, importlib.metadata.EntryPoint) and not entry.pattern.match(entry.value):
            raise ValueError(f"its entry point '{entry.name} = {entry.value}' names no module")
        return entry.load()


@dataclass(frozen=True)
class _Unreadable:
    """In the place of entry points that cannot be read: the plugin is broken, and says why."""

    name: str
    dist: importlib.metadata.Distribution
    why: str
    value: str = ""

    def load(self) -> Any:
        raise ValueError(f"whether it is a plugin cannot be read, its entry_points.txt is damaged: {self.why}")


def plugins() -> list[Plugin]:
    """The entry points of the group `texforce`, without those that TEXFORCE_BLOCK_PLUGINS names."""
    found: list[Plugin] = []
    seen: set[tuple[str, str]] = set()
    for entry in _entries():
        origin, version = _distribution(entry)
        if {normal(entry.name), origin} & _blocked():
            continue
        # an interrupted uninstall leaves a second folder of one distribution; and one module may have several names
        ways = {(origin, entry.name), (origin, f"= {entry.value}")}
        if not ways & seen:
            found.append(Plugin(origin, version, entry))
        seen |= ways
    return found


def _entries() -> Sequence[importlib.metadata.EntryPoint | _Unreadable]:
    with contextlib.suppress(Exception):  # one distribution may spoil it for all
        return tuple(importlib.metadata.entry_points(group=hookspecs.PROJECT))
    found: list[importlib.metadata.EntryPoint | _Unreadable] = []
    seen: set[str] = set()
    for dist in importlib.metadata.distributions():
        try:
            if dist.name and dist.name in seen:  # an older copy, further down the path
                continue
            seen.add(dist.name)
            found += dist.entry_points.select(group=hookspecs.PROJECT)
        except Exception as error:
            found.append(_Unreadable("a distribution without a name", dist, worker.describe(error)))
    return found


def _distribution(entry: importlib.metadata.EntryPoint | _Unreadable) -> tuple[str, str]:
    """Name and version of what an entry point comes from; its own name, and "", where the metadata cannot be read."""
    try:
        about = entry.dist.metadata if entry.dist else None  # once: each time it is parsed anew, with the whole README
        known = {key: about[key] for key in ("Name", "Version") if key in about} if about else {}
    except Exception:
        known = {}
    return normal(known.get("Name") or entry.name), known.get("Version") or ""


def plugin_manager() -> pluggy.PluginManager:
    """Knows the hooks of `hookspecs`, and no plugin yet."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def plugin_calls(manager: pluggy.PluginManager, module: Any, origin: str, hook: str) -> list[dict[str, Any]]:
    """The arguments of each call of `register` that a plugin makes in `hook`; after a failure it is as if it had not been
    there."""
    calls: list[dict[str, Any]] = []

    def register(name: str, factory: str, **about: Any) -> None:
        calls.append({"name": name, "factory": factory, **about})

    name = manager.register(module, name=f"{origin}:{getattr(module, '__name__', id(module))}")
    try:
        manager.check_pending()
        others = [plugin for plugin in manager.get_plugins() if plugin is not module]
        manager.subset_hook_caller(hook, remove_plugins=others)(register=register)
    except BaseException:
        manager.unregister(name=name)
        raise
    return calls


def _blocked() -> set[str]:
    return {normal(name.strip()) for name in os.environ.get("TEXFORCE_BLOCK_PLUGINS", "").split(",")}


def normal(name: str) -> str:
    """A name as the package index compares it: case and `-_.` make no difference."""
    return re.sub(r"[-_.]+", "-", name).lower()
