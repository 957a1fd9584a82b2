"""What a run is rewarded for: a weighted sum of terms. The grammar `NAME[:WEIGHT]` has its one home here."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from texforce_cli.devices import claim, claimed, if_room
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import contents_hash
from texforce_cli.rewards import worker
from texforce_cli.rewards.isolation import IsolatedReward, WorkerSettings
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.registry import Registry, Reward, RewardInfo, to_stderr
from texforce_cli.rewards.sharing import Address, Lender, Lent


@dataclass(frozen=True)
class TermSpec:
    """One `--reward NAME[:WEIGHT]` with its `--reward-option NAME.key=value`."""

    name: str
    weight: float = 1.0
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    @property
    def arguments(self) -> dict[str, str]:
        """What the reward is made with: `options` without `backend`, which says which reward it is."""
        return {key: value for key, value in self.options.items() if key != "backend"}

    @property
    def files(self) -> str:
        """A hash of the files and folders that `options` name; "" where they name none."""
        contents = [contents_hash(value) for _, value in sorted(self.options.items())]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16] if any(contents) else ""


def parse_terms(rewards: Sequence[str], options: Sequence[str] = (), *, beside: Sequence[str] = ()) -> list[TermSpec]:
    """The terms that the two options of the command line name. `options` may also be for rewards `beside` these.

    Raises:
        UsageError: a weight that is no finite number or zero, a name twice, an option of no term or without '='.
    """
    weights: dict[str, float] = {}
    for text in rewards:
        name, colon, tail = text.partition(":")
        if name in weights:
            raise UsageError(f"reward '{name}' is given twice", "give it once")
        weights[name] = _weight(text, tail) if colon else 1.0
    settings: dict[str, dict[str, str]] = {text.partition(":")[0]: {} for text in (*rewards, *beside)}
    for text in options:
        target, equals, value = text.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and key):
            raise UsageError(f"reward option '{text}' is not NAME.key=value", "for example brightness.key=value")
        if name not in settings:
            raise UsageError(f"reward option '{text}' belongs to no reward of this run", f"add --reward {name}")
        settings[name][key] = value
    return [TermSpec(name, weight, settings[name]) for name, weight in weights.items()]


def _weight(text: str, tail: str) -> float:
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise UsageError(
            f"the weight '{tail}' of reward '{text}' is not a finite number other than 0", "write NAME:0.5"
        )
    return weight


@dataclass(frozen=True)
class Scores:
    """The rewards of N images: `total` [N] as trained on, `terms` the raw [N] of each term by name."""

    total: NDArray[np.float64]
    terms: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class _Term:
    spec: TermSpec
    info: RewardInfo
    reward: Reward

    @property
    def elsewhere(self) -> bool:
        """Whether another process scores."""
        return isinstance(self.reward, IsolatedReward | Lent)

    @property
    def worst(self) -> Callable[[NDArray[np.float64]], float]:
        """Of several scores the one that is paid least."""
        return np.min if self.info.higher_is_better == (self.spec.weight > 0) else np.max


class RewardSet:
    """The rewards of a run, imported and made; callable on a batch of pictures."""

    def __init__(
        self,
        specs: Sequence[TermSpec],
        registry: Registry,
        *,
        normalize: bool = False,
        workers: WorkerSettings | None = None,
        hosts: Mapping[str, Sequence[Place]] | None = None,
        lender: Address | None = None,
        ahead: bool = False,
    ) -> None:
        """`lender`: the process that owns the workers of this machine; by default they belong to this one. `ahead`: rewards of
        this process score in a thread of their own, where the images are drawn on another device than theirs.
        """
        self.specs = tuple(specs)
        self.normalize = normalize
        infos = [find(spec, registry) for spec in specs]  # every name is checked before anything is imported
        self._terms: list[_Term] = []
        self._room: dict[str, int] = {}
        """Pictures that a reward of this process scores at once, where the memory was too full for more."""
        self._halved: list[str] = []
        self._counted: dict[str, int] = {}
        self._ahead: dict[str, ThreadPoolExecutor] = {}
        self._here: ThreadPoolExecutor | None = None
        self._joining: ThreadPoolExecutor | None = None
        self._lender: Lender | None = None
        if "" in (hosts or {}) and not any(info.environment for info in infos):
            raise UsageError(
                "--reward-host names no reward, and none of this run has an environment of its own",
                f"name one: {infos[0].name}=user@host",
            )
        try:
            for spec, info in zip(specs, infos):
                places = (hosts or {}).get(spec.name) or ((hosts or {}).get("", ()) if info.environment else ())
                elsewhere = lender is not None and (info.environment or places)
                if lender and elsewhere:
                    reward: Reward = Lent(spec.name, lender, (workers or WorkerSettings()).patience)
                else:
                    reward = info.create(spec.arguments, workers, places)
                self._terms.append(_Term(spec, info, reward))
        except BaseException:
            self.close()
            raise
        # scored while this thread goes on drawing; one thread a term keeps its batches in order, and one for all terms that
        # belong to this process keeps those from each other
        self._here = _thread(claimed()) if ahead and not all(term.elsewhere for term in self._terms) else None
        for term in self._terms:
            if pool := _thread() if term.elsewhere else self._here:
                self._ahead[term.spec.name] = pool
        if self._ahead:
            self._joining = _thread()

    def __str__(self) -> str:
        return " + ".join(map(str, self.specs))

    def lend(self) -> Address | None:
        """Let the other training processes of this machine score with the workers too: where; None if there are none."""
        isolated = {t.spec.name: t.reward for t in self._terms if isinstance(t.reward, IsolatedReward)}
        if isolated:
            self._lender = Lender(isolated)
        return self._lender.address if self._lender else None

    @property
    def packages(self) -> dict[str, str]:
        """What the rewards come from, with its exact version."""
        return {term.info.origin: term.info.exact_version for term in self._terms}

    @functools.cached_property
    def made_from(self) -> dict[str, str]:
        """`packages`, and by `NAME files` a hash of what the options of a reward name: copies of large folders differ in it."""
        return self.packages | {f"{spec.name} files": found for spec in self.specs if (found := spec.files)}

    @property
    def unit(self) -> str:
        """The unit of the total, when there is one term and it has one."""
        return self._terms[0].info.unit if len(self._terms) == 1 and not self.normalize else ""

    def submit(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Future[dict[str, NDArray[np.float64]]]:
        """`score`, begun: isolated rewards first, those of this process meanwhile; done when this returns unless some are
        isolated or scored `ahead`. Batches are finished in order.

        Raises:
            TexforceError: as in `score`, of a reward in this process; the future raises those of the others.
        """
        batch = images, prompts, metadata
        begun = {
            term.spec.name: self._ahead[term.spec.name].submit(self._scored, term, *batch)
            for term in self._terms
            if term.spec.name in self._ahead
        }
        here = {t.spec.name: self._scored(t, *batch) for t in self._terms if t.spec.name not in self._ahead}
        if self._joining is None:
            return finished(here)

        def join() -> dict[str, NDArray[np.float64]]:
            names = [term.spec.name for term in self._terms]
            return {name: begun[name].result() if name in begun else here[name] for name in names}

        return self._joining.submit(join)

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, NDArray[np.float64]]:
        """The raw value of each term for uint8 `images` [N, height, width, 3]: name -> [N]; NaN only for a picture that an
        isolated reward could not score.

        Raises:
            TexforceError: a reward raised, returned another count, or a value that is not finite; it is named.
        """
        return self.submit(images, prompts, metadata).result()

    def awaited(
        self,
        scores: Future[dict[str, NDArray[np.float64]]],
        meanwhile: Callable[[], None],
        get_on: Callable[[], None],
    ) -> dict[str, NDArray[np.float64]]:
        """What `submit` has begun. Other processes may take many minutes to find a picture at which a reward hangs: all the while
        `meanwhile` is called, which may raise to go. `get_on` says that this is no hanging: when all are scored, and meanwhile
        where the wait has an end, which a reward of this process may not have.

        Raises:
            TexforceError: as `score`.
        """
        bounded = all(term.elsewhere for term in self._terms)
        while wait([scores], _SLICE).not_done:
            meanwhile()
            if bounded:
                get_on()
        get_on()
        return scores.result()

    def total(self, terms: Mapping[str, NDArray[np.float64]]) -> Scores:
        """Sum the terms of a whole epoch, `filled`, each standardised over it with `normalize`: what is trained on.

        Raises:
            TexforceError: as `filled`.
        """
        raw = self.filled(terms)
        if not self.normalize:
            return Scores(self.weighted(raw), raw)
        standard = {name: (values - values.mean()) / (values.std() + 1e-6) for name, values in raw.items()}
        return Scores(self.weighted(standard), raw)

    def filled(self, terms: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """The terms of all images of an epoch or a measurement, each that could not be scored with the worst score of the
        others: it depends on no batch and no process.

        Raises:
            TexforceError: a reward could score none.
        """
        whole = {}
        for term in self._terms:
            name, values = term.spec.name, terms[term.spec.name]
            scored = np.isfinite(values)
            if not scored.any():
                raise TexforceError(
                    f"reward '{name}' could score none of {len(values)} pictures",
                    f"try it alone: texforce rewards check {name}",
                )
            whole[name] = np.where(scored, values, term.worst(values[scored]))
        return whole

    def weighted(self, terms: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The sum of weight times value [N]; a term of which less is better counts negatively."""
        signs = [1.0 if term.info.higher_is_better else -1.0 for term in self._terms]
        weighted = [sign * t.spec.weight * terms[t.spec.name] for sign, t in zip(signs, self._terms)]
        return np.asarray(np.sum(weighted, axis=0))

    def counts(self) -> dict[str, int]:
        """What the rewards have counted since the last call, as `NAME.what`: pictures without a face, say."""
        before, self._counted = (
            self._counted,
            {
                f"{term.spec.name}.{what}": int(number)
                for term in self._terms
                for what, number in (getattr(term.reward, "counts", None) or {}).items()
            },
        )
        return {what: number - before.get(what, 0) for what, number in self._counted.items()}

    def warnings(self) -> list[str]:
        """What isolated rewards have to say since the last call, and those of this process of a memory that was full."""
        halved, self._halved = self._halved, []
        return halved + [
            text for term in self._terms if isinstance(term.reward, IsolatedReward) for text in term.reward.warnings()
        ]

    def memory(self) -> dict[str, int]:
        """Bytes that the workers of each isolated reward have had at most."""
        return {term.spec.name: term.reward.memory for term in self._terms if isinstance(term.reward, IsolatedReward)}

    def close(self) -> None:
        """End every reward that has something to end; one that fails at it is named in a warning."""
        for pool in (*self._ahead.values(), self._joining):
            if pool is not None:
                pool.shutdown(wait=pool is self._here, cancel_futures=True)
        if self._lender is not None:
            self._lender.close()
        for term in self._terms:
            try:
                with to_stderr():
                    getattr(term.reward, "close", lambda: None)()
            except (Exception, SystemExit) as error:  # the others are still to be ended
                sentence = f"reward '{term.spec.name}' could not be closed: {worker.describe(error)}"
                warnings.warn(sentence, RuntimeWarning, stacklevel=2)

    def _scored(
        self, term: _Term, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float64]:
        name, wanted = term.spec.name, getattr(term.reward, "input", "pil")
        if wanted not in ("pil", "uint8"):
            raise TexforceError(f"reward '{name}' wants the input '{wanted}'", "it must be 'pil' or 'uint8'")
        try:
            if term.elsewhere:
                values = term.reward.score(images, prompts, metadata)
            else:
                values = self._scored_here(term.reward, name, wanted, images, prompts, metadata)
        except TexforceError:
            raise
        except worker.WrongCount as error:
            message, _, remedy = str(error).partition("; ")
            raise TexforceError(f"reward '{name}' {message}", remedy) from error
        except (Exception, SystemExit) as error:  # the plugin boundary
            raise TexforceError(f"reward '{name}' failed: {worker.describe(error)}", "see it with --debug") from error
        for value, prompt in zip(values, prompts):
            if value is not None and not math.isfinite(value):
                raise TexforceError(
                    f"reward '{name}' returned {value} for the prompt '{prompt[:80]}'",
                    "a reward must be finite; the epochs before this one are saved",
                )
        return np.asarray(values, np.float64)  # None becomes NaN

    def _scored_here(
        self,
        reward: Reward,
        name: str,
        wanted: str,
        images: NDArray[np.uint8],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        """In this process, as many pictures at once as there is room for.

        Raises:
            torch.OutOfMemoryError: one picture alone is too much.
        """
        values: list[float] = []
        while len(values) < len(prompts):
            part = slice(len(values), len(values) + self._room.get(name, len(prompts)))
            count = len(prompts[part])
            batch = _given(images[part], wanted), prompts[part], metadata[part]
            with to_stderr():
                found = if_room(functools.partial(worker.score, reward, *batch), last=count == 1)
            if found is None:
                self._room[name] = count // 2
                self._halved.append(
                    f"the memory was too full for reward '{name}' and {count} images at once: it goes on with {count // 2}"
                )
            else:
                values += found
        return values


def _thread(gpu: str = "") -> ThreadPoolExecutor:
    """One thread, in which `cuda` without a number is `gpu`."""
    return ThreadPoolExecutor(1, thread_name_prefix="texforce-rewards", initializer=claim, initargs=(gpu,))


def _given(images: NDArray[np.uint8], wanted: str) -> Any:
    """Pictures for one reward alone: what it does to them is nobody else's."""
    if wanted == "pil":
        return [Image.fromarray(image) for image in images]
    view = images.view()
    view.flags.writeable = False
    return view


def finished(scores: dict[str, NDArray[np.float64]]) -> Future[dict[str, NDArray[np.float64]]]:
    """`scores` as the result of something that is done."""
    done: Future[dict[str, NDArray[np.float64]]] = Future()
    done.set_result(scores)
    return done


_SLICE = 1.0
"""Seconds that waiting for rewards keeps a signal from being heard, at most."""


def find(spec: TermSpec, registry: Registry) -> RewardInfo:
    """The registered reward that a term names, with the backend that its options ask for.

    Raises:
        UsageError: there is none.
    """
    return registry.find(spec.name, spec.options.get("backend", ""))


def parse_hosts(hosts: Sequence[str], specs: Sequence[TermSpec]) -> dict[str, list[Place]]:
    """`--reward-host [NAME=]user@host[:PYTHON]`: where each reward's workers run, by its name; `""` stands for all rewards
    that have an environment of their own.

    Raises:
        UsageError: a name that is no reward of this run, or no such place.
    """
    names = [spec.name for spec in specs]
    found: dict[str, list[Place]] = {}
    for text in hosts:
        name, equals, place = text.partition("=")
        if equals and name not in names:
            raise UsageError(f"the reward host '{text}' belongs to no reward of this run", f"add --reward {name}")
        found.setdefault(name if equals else "", []).append(Place.parse(place if equals else text))
    return found
