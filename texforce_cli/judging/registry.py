"""Which judges there are: built-ins and plugins, through one door; each is imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from texforce_cli.errors import UsageError, did_you_mean
from texforce_cli.judging.judge import Judge
from texforce_cli.rewards.hookspecs import hookimpl
from texforce_cli.rewards.registry import JUDGES, Registered, gather, registered

_HERE = "texforce_cli.judging"


class JudgeInfo(Registered):
    """A registered judge that has not been imported yet."""

    kind = "judge"
    remedy = "correct --judge-option"

    def create(self, options: Mapping[str, str]) -> Judge:
        """Make it with `options`, each converted to the type of its annotation.

        Raises:
            UsageError: an option that it does not have, or a value of the wrong type.
            TexforceError: it cannot be imported or refuses to be made.
        """
        judge: Judge = self._made(options)
        return judge


class _BuiltIn:
    @hookimpl
    def texforce_register_judges(self, register: Callable[..., None]) -> None:
        """The judges that come with texforce."""
        register("clip", f"{_HERE}.offline:ClipJudge", summary="tiny-judge, or any reward: offline", api_version=1)
        register("votes", f"{_HERE}.offline:VotesJudge", summary="what people chose on the page", api_version=1)
        register("openai", f"{_HERE}.openai_judge:OpenAIJudge", summary="any OpenAI-compatible server", api_version=1)


def load_judges() -> tuple[dict[str, JudgeInfo], dict[str, str]]:
    """Name -> judge; and the plugins that failed, with the reason."""
    judges, broken = dict[str, JudgeInfo](), dict[str, str]()
    gather(JUDGES, _BuiltIn(), partial(_add, judges), broken)
    return judges, broken


def find_judge(name: str) -> JudgeInfo:
    """The judge of that name.

    Raises:
        UsageError: there is none; the sentence names the nearest, and plugins that failed to load.
    """
    judges, broken = load_judges()
    if name in judges:
        return judges[name]
    hint = f"{did_you_mean(name, judges)}Judges: openai:MODEL, {', '.join(sorted(judges))}"
    if broken:
        hint += ". Not loaded: " + "; ".join(f"{origin} ({why})" for origin, why in broken.items())
    raise UsageError(f"unknown judge '{name}'", hint)


def _add(judges: dict[str, JudgeInfo], calls: list[dict[str, Any]], origin: str, version: str) -> None:
    for call in calls:
        name, factory = registered("judge", call)
        if name in judges:
            raise ValueError(f"judge '{name}' is registered by both '{judges[name].origin}' and '{origin}'")
        judges[name] = JudgeInfo(name, factory, origin, version, str(call.get("summary", "")))
