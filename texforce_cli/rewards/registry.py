"""Which rewards there are: built-ins and plugins, collected through one hook; each is imported only when it is asked for.

A plugin that fails to load is kept with its reason in `Registry.broken`; only the command that asks for it fails.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pluggy

from texforce_cli import __version__
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.rewards import builtin, hookspecs


class Reward(Protocol):
    """What a reward class offers; see `hookspecs`."""

    def score(self, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        """One finite number an image."""
        ...


@dataclass(frozen=True)
class RewardInfo:
    """A registered reward that has not been imported yet."""

    name: str
    factory: str
    origin: str
    version: str
    summary: str = ""
    higher_is_better: bool = True
    unit: str = ""
    prompts: str = ""
    licence: str = ""

    def create(self, options: Mapping[str, str]) -> Reward:
        """Import the class and make it with `options`, each converted to the type of its annotation.

        Raises:
            UsageError: an option that the class does not have, or a value of the wrong type.
            TexforceError: the class cannot be imported or refuses to be made.
        """
        module_name, _, attribute = self.factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (
            Exception
        ) as error:  # the plugin boundary: whatever a third party raises is named, not thrown at the user
            raise TexforceError(
                f"reward '{self.name}' ({self.origin}) could not be imported: {_short(error)}",
                f"repair or reinstall {self.origin}",
            ) from error
        arguments = _typed_options(self.name, factory, options) if options else {}
        try:
            reward: Reward = factory(**arguments)
        except Exception as error:
            raise TexforceError(
                f"reward '{self.name}' could not start: {_short(error)}", "check its options"
            ) from error
        return reward


_ABOUT = frozenset(RewardInfo.__dataclass_fields__) - {"name", "factory", "origin", "version"}


@dataclass
class Registry:
    """All rewards by name, and the plugins that failed with the reason."""

    rewards: dict[str, RewardInfo] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> RewardInfo:
        """The reward of that name.

        Raises:
            UsageError: there is none; the sentence names the nearest and the plugins that failed to load.
        """
        if name in self.rewards:
            return self.rewards[name]
        close = difflib.get_close_matches(name, self.rewards, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        hint += f"Rewards: {', '.join(sorted(self.rewards))}"
        if self.broken:
            hint += ". Not loaded: " + "; ".join(f"{origin} ({why})" for origin, why in self.broken.items())
        raise UsageError(f"unknown reward '{name}'", hint)


def load_registry() -> Registry:
    """Collect the built-ins, then every plugin of the entry-point group `texforce`.

    TEXFORCE_BLOCK_PLUGINS=name,... leaves plugins out; TEXFORCE_STRICT_PLUGINS=1 makes a broken one fatal.
    """
    registry = Registry()
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    _register(registry, manager, builtin, "texforce", __version__)
    blocked = {name.strip() for name in os.environ.get("TEXFORCE_BLOCK_PLUGINS", "").split(",")}
    for entry in importlib.metadata.entry_points(group=hookspecs.PROJECT):
        if entry.name in blocked:
            continue
        origin = entry.dist.name if entry.dist else entry.name
        try:
            _register(registry, manager, entry.load(), origin, entry.dist.version if entry.dist else "")
        except Exception as error:  # one broken plugin must not take the others with it
            if os.environ.get("TEXFORCE_STRICT_PLUGINS") == "1":
                raise TexforceError(f"plugin '{origin}' is broken: {_short(error)}", "repair or remove it") from error
            registry.broken[origin] = _short(error)
    return registry


def _register(registry: Registry, manager: pluggy.PluginManager, module: Any, origin: str, version: str) -> None:
    found: dict[str, RewardInfo] = {}

    def register(name: str, factory: str, *, api_version: int, **about: Any) -> None:
        if api_version != hookspecs.API_VERSION:
            raise ValueError(f"reward '{name}' wants API version {api_version}, this is {hookspecs.API_VERSION}")
        # keys of later versions of the contract are passed over; a near miss of a known one is a mistake
        known = {key: value for key, value in about.items() if key in _ABOUT}
        for key in about.keys() - known.keys():
            if close := difflib.get_close_matches(key, _ABOUT, n=1, cutoff=0.8):
                raise ValueError(f"reward '{name}' is registered with '{key}'; is '{close[0]}' meant?")
        if name in registry.rewards or name in found:
            other = (registry.rewards.get(name) or found[name]).origin
            raise ValueError(f"reward '{name}' is registered by both '{other}' and '{origin}'")
        found[name] = RewardInfo(name=name, factory=factory, origin=origin, version=version, **known)

    name = manager.register(module, name=f"{origin}:{getattr(module, '__name__', id(module))}")
    try:
        manager.check_pending()
        others = [plugin for plugin in manager.get_plugins() if plugin is not module]
        manager.subset_hook_caller("texforce_register_rewards", remove_plugins=others)(register=register)
    except BaseException:
        manager.unregister(name=name)
        raise
    registry.rewards.update(found)


def _typed_options(reward: str, factory: Any, options: Mapping[str, str]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(factory, eval_str=True).parameters
    except (NameError, ValueError, TypeError) as error:
        raise TexforceError(
            f"the options of reward '{reward}' cannot be read: {_short(error)}", "leave them out"
        ) from error
    typed = {}
    for key, text in options.items():
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise UsageError(f"reward '{reward}' has no option '{key}'", f"its options: {known}")
        kind = parameters[key].annotation
        try:
            typed[key] = _convert(text, kind)
        except ValueError as error:
            name = getattr(kind, "__name__", kind)
            raise UsageError(
                f"'{text}' is no value for option '{key}' of reward '{reward}'", f"give a {name}"
            ) from error
    return typed


def _convert(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return kind(text) if kind in (int, float) else text


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
