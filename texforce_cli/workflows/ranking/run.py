"""The order of a ranking: pictures, questions, judgments, statistics, report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.files import finite, held, read_json, write_csv, write_json, write_text
from texforce_cli.judging.answers import Verdict
from texforce_cli.judging.asking import Missing, Outcome, ask_all, verdicts
from texforce_cli.judging.budget import Budget, Metered
from texforce_cli.judging.journal import Journal
from texforce_cli.judging.judge import AESTHETIC, ALIGNMENT, Judge
from texforce_cli.judging.ledger import Ledger
from texforce_cli.judging.prices import Price, parse_price, price_of
from texforce_cli.judging.questions import MODES, MOST_VARIANTS, Case, Mode, Question, questions_of
from texforce_cli.judging.registry import find_judge
from texforce_cli.report.verdicts import RANKS
from texforce_cli.workflows.events import Listener, Progressed, Warned, silent
from texforce_cli.workflows.ranking.summary import adjust, rank, warnings
from texforce_cli.workflows.stopping import StopRequest

if TYPE_CHECKING:
    from texforce_cli.workflows.evaluation.request import EvalRequest

_ROUNDS: dict[Mode, int] = {"pairwise": 1, "listwise": 3, "pointwise": 3}
_REPAIRS = 2


@dataclass(frozen=True)
class RankRequest:
    """Which pictures to show to which judge, how often, and what it may cost.

    `evaluation` is a folder of `texforce eval`; else `images` (`NAME=DIR`) and `prompts`, and the folder is made. `seeds`
    () is the first seed of the evaluation. `protocol` paper: listwise, three rounds (a reconstruction of sec. 3.5).
    """

    evaluation: Path
    judge: str
    judge_options: Mapping[str, str]
    images: tuple[str, ...] = ()
    prompts: str = ""
    seeds: tuple[int, ...] = ()
    protocol: Literal["", "paper"] = ""
    mode: Mode | None = None
    rounds: int | None = None
    seed: int = 0
    placebos: float = 0.05
    base_url: str | None = None
    api: str | None = None
    max_output_tokens: int | None = None
    price: str | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    workers: int = 8
    report_only: bool = False
    single_file: bool = False


@dataclass(frozen=True)
class RankResult:
    """The ranking as plain values, its folder, and the page; `requests` (0 where none are counted) and `usd` (0 without
    a price) are of all its runs."""

    folder: Path
    summary: Mapping[str, Any]
    page: Path | None
    stopped: str | None
    requests: int
    usd: float


@dataclass(frozen=True)
class _Work:
    """All that is decided before anything is asked."""

    request: RankRequest
    evaluation: EvalRequest
    judge: Judge
    variants: tuple[str, ...]
    mode: Mode
    rounds: int
    questions: tuple[Question, ...]
    folder: Path
    data: str
    missing: tuple[str, ...]


def rank_pictures(request: RankRequest, listener: Listener = silent) -> RankResult:
    """Ask what is not answered yet, then rank; a second call asks nothing that is on the disk.

    Raises:
        UsageError: no pictures, an unknown judge, a mode that it has not, an unknown price.
        TexforceError: a judge that refuses to work at all, a folder that cannot be written.
        Interrupted: asked to stop; every answer is kept.
    """
    from texforce_cli.workflows.evaluation.run import evaluate

    stop = StopRequest()
    with stop.listening():
        work = _prepare(request)
        with contextlib.ExitStack() as closing:
            closing.callback(getattr(work.judge, "close", lambda: None))
            closing.enter_context(held(work.folder))
            for sentence in work.missing[:5]:
                listener(Warned(sentence))
            journal = Journal(work.folder / "judgments.jsonl")
            budget = _budget(work, journal)
            if request.report_only and all(one == Missing("unanswered") for _, one in _found(work, journal)):
                raise UsageError(
                    f"'{work.folder}' has no answer to these questions",
                    "give the options that it was made with, or leave --report-only out",
                )
            write_json(work.folder / "rank.json", _record(work))
            outcome = Outcome(0, 0, None)
            if not request.report_only:
                outcome = ask_all(
                    work.judge,
                    work.questions,
                    journal,
                    budget=budget,
                    workers=request.workers,
                    repairs=_REPAIRS,
                    check=stop.check,
                    progress=lambda done, total: listener(Progressed("judging", done, total)),
                )
            for sentence in outcome.failures:
                listener(Warned(sentence))
            found = _found(work, journal)
            summary = _summary(work, journal, found)
            _write(work.folder, summary, _verdict_rows(found))
        page = None
        try:
            now = _evaluation(request)  # in the meantime it may have been measured anew
            page = evaluate(replace(now, stage="report", single_file=request.single_file), listener).page
        except Interrupted:
            raise
        except TexforceError as error:  # what was paid for is shown all the same
            listener(Warned(f"there is no page: {error}"))
    for sentence in getattr(work.judge, "notes", []):
        listener(Warned(sentence))
    return RankResult(work.folder, summary, page, outcome.stopped, budget.requests if budget.kept else 0, budget.spent)


def plan_ranking(request: RankRequest) -> dict[str, Any]:
    """What would be asked, and what it may cost at most; nothing is asked.

    Raises:
        UsageError: as `rank_pictures`.
    """
    work = _prepare(request)
    journal = Journal(work.folder / "judgments.jsonl")
    budget = _budget(work, journal)
    missing = (question for question, found in _found(work, journal) if found == Missing("unanswered"))
    todo = list({question.key(work.judge.identity): question for question in missing}.values())
    plan: dict[str, Any] = {
        "judge": request.judge,
        "criteria": list(work.judge.criteria),
        "mode": work.mode,
        "rounds": work.rounds,
        "variants": list(work.variants),
        "prompts": len({question.prompt_id for question in work.questions}),
        "questions": len(work.questions),
        "answered": len({question.key(work.judge.identity) for question in work.questions}) - len(todo),
        "requests": len(todo),
        "requests_with_repairs": len(todo) * (1 + _REPAIRS),
        "requests_before": budget.requests,
    }
    if isinstance(work.judge, Metered):
        sizes = [work.judge.size(question, ()) for question in todo]
        plan["text_tokens_at_most"] = sum(size.text_bytes for size in sizes)
        plan["pictures"] = sum(size.pictures for size in sizes)
        plan["output_tokens_at_most"] = sum(size.output_tokens for size in sizes)
        if budget.price:
            plan["picture_tokens_at_most"] = plan["pictures"] * budget.price.picture
            plan["usd_at_most_without_repairs"] = round(float(sum(budget.worst(size) for size in sizes)), 4)
            plan["usd_before"] = round(budget.spent, 4)
    return plan


def _budget(work: _Work, journal: Journal) -> Budget:
    """What all runs of this ranking together may spend; of a judge that costs nothing no account is kept."""
    request, ledger = work.request, None
    if isinstance(work.judge, Metered) or request.max_requests is not None:
        ledger = Ledger(work.folder / "spending.jsonl", journal.before)
    return Budget(request.max_cost, request.max_requests, _price(request), ledger, journal.picture_tokens)


_Found = list[tuple[Question, Verdict | Missing]]


def _found(work: _Work, journal: Journal) -> _Found:
    known = verdicts(work.judge.identity, work.judge.criteria, work.questions, journal, _REPAIRS)
    return list(zip(work.questions, known))


def _prepare(request: RankRequest) -> _Work:
    from texforce_cli.report.page import pictures_hash
    from texforce_cli.workflows.evaluation.run import pictures_of

    if request.protocol == "paper" and (request.mode or "listwise", request.rounds or 3) != ("listwise", 3):
        raise UsageError(
            "the paper's protocol is listwise, in three rounds", "leave out --protocol, or --mode and --rounds"
        )
    _price(request)
    evaluation = _evaluation(request)
    shown = pictures_of(evaluation)
    variants = tuple(shown.found)
    if len(variants) < 2:
        raise UsageError(f"'{evaluation.out}' has one variant", "a ranking needs two")
    if len(variants) > MOST_VARIANTS:
        raise UsageError(f"there are {len(variants)} variants", f"at most {MOST_VARIANTS} can be labelled by letters")
    seeds = request.seeds or evaluation.seeds[:1]
    unknown = sorted(set(seeds) - set(evaluation.seeds))
    if unknown:
        raise UsageError(
            f"the evaluation has no seed {unknown[0]}", f"its seeds: {', '.join(map(str, evaluation.seeds))}"
        )
    cases = [
        Case(
            item.prompt_id, item.text, item.seed, {v: shown.found[v][item] for v in variants if item in shown.found[v]}
        )
        for item in shown.items
        if item.seed in seeds
    ]
    judge, data = _judge(request), pictures_hash(shown.page)
    _prepare_judge(judge, request.judge, cases, data)
    usual: Mode = "pairwise" if "pairwise" in judge.modes else judge.modes[0]
    mode: Mode = request.mode or ("listwise" if request.protocol == "paper" else usual)
    if mode not in judge.modes:
        raise UsageError(f"the judge '{request.judge}' cannot be asked {mode}", f"its modes: {', '.join(judge.modes)}")
    rounds = request.rounds or _ROUNDS[mode]
    questions = questions_of(cases, mode, rounds, request.seed, request.placebos)
    if all(question.placebo for question in questions):
        hint = (
            "check that the folders tell of these prompts and seeds" if request.images else "draw them: texforce eval"
        )
        raise UsageError(f"'{evaluation.out}' has no prompt with two pictures", hint)
    folder = _folder(evaluation.out / RANKS, request, judge, mode)
    return _Work(
        request, evaluation, judge, variants, mode, rounds, tuple(questions), folder, data, tuple(shown.missing)
    )


def _prepare_judge(judge: Judge, name: str, cases: Sequence[Case], data: str) -> None:
    try:
        getattr(judge, "prepare", lambda cases, data: None)(cases, data)
    except TexforceError:
        raise
    except Exception as error:  # the plugin boundary
        raise TexforceError(
            f"judge '{name}' failed ({type(error).__name__}: {str(error)[:200]})", "repair it"
        ) from error
    identity, criteria, modes, ask = (getattr(judge, part, None) for part in ("identity", "criteria", "modes", "ask"))
    usable = {
        "identity": isinstance(identity, str) and identity != "",
        "criteria": _are_words(criteria),
        "modes": _are_words(modes) and set(modes) <= set(MODES),
        "ask": callable(ask),
    }
    wrong = [part for part, is_right in usable.items() if not is_right]
    if wrong:
        raise TexforceError(f"judge '{name}' has no {wrong[0]} that can be used", "repair it")


def _are_words(value: Any) -> TypeGuard[Sequence[str]]:
    return isinstance(value, tuple | list) and bool(value) and all(isinstance(word, str) for word in value)


def _evaluation(request: RankRequest) -> EvalRequest:
    """The evaluation that the pictures belong to: one that is there, or one of folders of pictures."""
    from texforce_cli.workflows.evaluation.request import EvalRequest, gather_variants, recalled

    if not request.images:
        return recalled(EvalRequest(request.evaluation))
    if not request.prompts:
        raise UsageError("--images needs prompts", "add --prompts FILE or SET")
    if (request.evaluation / "eval.json").exists():
        raise UsageError(
            f"'{request.evaluation}' is an evaluation of its own pictures", "name another folder, or leave --images out"
        )
    variants = gather_variants([], None, request.images)
    return EvalRequest(
        request.evaluation, variants=variants, prompts=request.prompts, seeds=request.seeds or (0,), recorded=False
    )


def _judge(request: RankRequest) -> Judge:
    name, _, model = request.judge.partition(":")
    options = dict(request.judge_options)
    if model:
        options["model"] = model
    for key in ("base_url", "api", "max_output_tokens"):
        value = getattr(request, key)
        if value is not None:
            options[key] = str(value)
    return find_judge(name).create(options)


def _setting(judge: Judge) -> str:
    """What tells the rankings of a judge from those of the same one with other options."""
    return str(getattr(judge, "setting", judge.identity))


def _folder(ranks: Path, request: RankRequest, judge: Judge, mode: Mode) -> Path:
    """Where this judge's ranking is or will be: JUDGE-MODE, and with other options another folder beside it.

    Raises:
        UsageError: only the report is to be made, of a ranking that is not there.
    """
    plain = f"{_file_name(request.judge)}-{mode}"
    other = f"{plain}-{hashlib.sha256(_setting(judge).encode('utf-8', 'replace')).hexdigest()[:6]}"
    found = [name for name in (plain, other) if _recorded(ranks / name) == _setting(judge)]
    if request.report_only and not found:
        raise UsageError(
            f"'{ranks.parent}' has no ranking of '{request.judge}' with these options",
            "give the options that it was made with, or leave --report-only out",
        )
    return ranks / (found[0] if found else plain if _recorded(ranks / plain) is None else other)


def _recorded(folder: Path) -> str | None:
    """The setting of the judge whose ranking a folder holds; None where it holds none."""
    try:
        record = read_json(folder / "rank.json")
        return str(record.get("setting", record["judge"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _file_name(judge: str) -> str:
    """A judge's name as part of a folder's; different names stay different."""
    if re.fullmatch("[a-z0-9][a-z0-9.-]{0,40}", judge):
        return judge
    plain = re.sub("[^a-z0-9.]+", "-", judge.lower()).strip("-.")[:40]
    return f"{plain}-{hashlib.sha256(judge.encode('utf-8', 'replace')).hexdigest()[:6]}"


def _price(request: RankRequest) -> Price | None:
    """The price of what is asked for; only judges that are paid have one."""
    name, _, model = request.judge.partition(":")
    if name == "openai" and not model:
        raise UsageError("the judge 'openai' needs a model", "--judge openai:MODEL")
    given = parse_price(request.price) if request.price else None
    if name != "openai":
        return given
    price = price_of(model, given)
    if price is None and (request.max_cost is not None or request.base_url is None):
        raise UsageError(
            f"the price of '{model}' is not known",
            "give it: --price IN,OUT in USD for a million tokens; 0,0 where it is free",
        )
    return price


def _record(work: _Work) -> dict[str, Any]:
    from texforce_cli.workflows.run_folder import versions

    # addresses and options of judges may hold secrets: what answers depend on is in the judge's identity
    left_out = ("evaluation", "images", "base_url", "judge_options")
    request = {key: value for key, value in asdict(work.request).items() if key not in left_out}
    return {
        "request": {**request, "judge_options": sorted(work.request.judge_options)},
        "judge": work.judge.identity,
        "setting": _setting(work.judge),
        "pictures": work.data,
        "questions": len(work.questions),
        "versions": versions(),
    }


def _summary(work: _Work, journal: Journal, found: _Found) -> dict[str, Any]:
    judge = work.judge
    keys = list(dict.fromkeys(question.key(judge.identity) for question in work.questions))
    entries = [entry for key in keys for entry in journal.entries(key)]
    results: dict[str, dict[str, Any]] = {}
    for criterion in judge.criteria:
        opinions = [(question, one[criterion]) for question, one in found if not isinstance(one, Missing)]
        results[criterion] = rank(opinions, work.variants, work.rounds)
    adjust(results)
    lacks: dict[str, dict[str, int]] = {}
    for question, one in found:
        if isinstance(one, Missing):
            by_variant = lacks.setdefault(one.reason, dict.fromkeys(work.variants, 0))
            for name in set(question.variants):
                by_variant[name] += 1
    spent: dict[str, Any] = {
        "requests": len(entries),
        "input_tokens": sum(entry.input_tokens for entry in entries),
        "output_tokens": sum(entry.output_tokens for entry in entries),
    }
    price = _price(work.request) if spent["input_tokens"] else None
    if price:
        spent["usd"] = round(float(Budget(price=price).cost(spent["input_tokens"], spent["output_tokens"])), 6)
    answered = sum(not isinstance(one, Missing) for _, one in found)
    said = [*warnings(results), *_cut_off(judge, found)]
    if work.request.protocol == "paper":
        said.append("the protocol is a reconstruction: the paper's prompt, order and scale were never published")
    return cast(
        "dict[str, Any]",
        finite(
            {
                "texforce_rank": 1,
                "judge": work.request.judge,
                "identity": judge.identity,
                "models": sorted({entry.model for entry in entries if entry.model}),
                "mode": work.mode,
                "protocol": work.request.protocol,
                "rounds": work.rounds,
                "seed": work.request.seed,
                "pictures": work.data,
                "variants": list(work.variants),
                "criteria": list(judge.criteria),
                "absent": [name for name in (AESTHETIC, ALIGNMENT) if name not in judge.criteria],
                "questions": len(work.questions),
                "answered": answered,
                "missing_by_variant": dict(sorted(lacks.items())),
                "spent": spent,
                "results": results,
                "warnings": said,
            }
        ),
    )


def _cut_off(judge: Judge, found: _Found) -> list[str]:
    cut = [question for question, one in found if one == Missing("cut")]
    if not cut:
        return []
    if not isinstance(judge, Metered):
        return [f"{len(cut)} answers were cut off before their verdict: let the judge give longer ones"]
    most = judge.size(cut[0]).output_tokens
    return [
        f"{len(cut)} answers were cut at {most} tokens, before their verdict; give --max-output-tokens {4 * most}, with which every "
        "question is asked anew"
    ]


def _verdict_rows(questions: _Found) -> list[dict[str, Any]]:
    """Every verdict with its reason, for the table and the page."""
    rows = []
    for question, found in questions:
        about = {
            "prompt_id": question.prompt_id,
            "prompt": question.prompt,
            "seed": question.seed,
            "round": question.round,
            "shown": list(question.variants),
            "hashes": list(question.hashes),
            "placebo": question.placebo,
        }
        if isinstance(found, Missing):
            rows.append({**about, "missing": found.reason})
            continue
        for criterion, opinion in found.items():
            rows.append({**about, "criterion": criterion, **{k: v for k, v in asdict(opinion).items() if v}})
    return rows


def _write(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    write_json(folder / "summary.json", dict(summary))
    write_text(folder / "verdicts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rounds = [f"mean_rank_round_{number + 1}" for number in range(summary["rounds"])]
    ends = ["mean_rank", "low", "high", "strength", "strength_low", "strength_high"]
    beats = [f"wins_against_{name}" for name in summary["variants"]]
    table = [["criterion", "variant", *ends, *rounds, *beats]]
    for criterion, result in summary["results"].items():
        for name in summary["variants"]:
            mean, strength = result["mean_rank"][name]["all"] or {}, result["bradley_terry"][name]
            cells = [*(mean.get(key) for key in ("mean", "low", "high")), *strength.values()]
            cells += [(one or {}).get("mean") for one in result["mean_rank"][name]["rounds"]]
            cells += [result["wins"].get(name, {}).get(other) for other in summary["variants"]]
            table.append([criterion, name, *cells])
    write_csv(folder / "summary.csv", table)
