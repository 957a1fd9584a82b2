"""A run's folder: everything that is needed to understand, continue and use it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from texforce_cli.errors import TexforceError, Unsuited, UsageError, quoted
from texforce_cli.files import user_path, write_error, write_json, write_text

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.\w+)?")
_LOCK = ".lock"
PACKAGES = ("texforce", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run."""

    path: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Stays the same when the run goes on; the folder may be removed and taken by another run meanwhile."""

    @property
    def record(self) -> Path:
        """run.json: configuration, origins, versions, hashes, seeds, state."""
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        """config.toml: the resolved configuration, for `--config`."""
        return self.path / "config.toml"

    @property
    def prompts(self) -> Path:
        """prompts.jsonl: the prompts of the run, seen and unseen, whatever becomes of their source."""
        return self.path / "prompts.jsonl"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: one line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """evaluations.jsonl: one line for each measurement on the held-out pairs."""
        return self.path / "evaluations.jsonl"

    @property
    def samples(self) -> Path:
        """Pictures of fixed prompts and seeds, the base beside the tuned model."""
        return self.path / "samples"

    @property
    def before_after(self) -> Path:
        """The held-out pairs of the base and of the finished run."""
        return self.path / "before_after.png"

    @property
    def curve(self) -> Path:
        """The reward over images."""
        return self.path / "curve.png"

    @property
    def checkpoints(self) -> Path:
        """What a run continues from."""
        return self.path / "checkpoints"

    @property
    def drawn(self) -> Path:
        """What an unfinished epoch has drawn."""
        return self.path / "drawn"

    @property
    def adapter(self) -> Path:
        """The LoRA with its model card."""
        return self.path / "adapter"

    @classmethod
    def create(cls, out: str | None, stem: str) -> RunFolder:
        """A new folder: `out`, or the first free `runs/<stem>-<n>`.

        Raises:
            UsageError: there is something in `out`.
            TexforceError: it cannot be written.
        """
        path = Path("runs") if out is None else user_path(out)
        try:
            if out is not None:
                folder = cls(path)
                folder.refuse_taken()
                path.mkdir(parents=True, exist_ok=True)
                return folder
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:80]
            number = 1
            while True:
                path = Path("runs") / f"{stem}-{number}"
                try:
                    path.mkdir(parents=True)
                    return cls(path)
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise write_error(path / "run.json", error) from error

    @classmethod
    def open(cls, path: str) -> RunFolder:
        """An existing run.

        Raises:
            UsageError: there is no run in that folder.
        """
        folder = cls(user_path(path))
        if folder.path.is_dir() and not folder._taken():
            raise UsageError(f"no run has begun in '{path}'", f"begin it with --out {path}")
        if not folder.record.is_file():
            raise UsageError(
                f"'{path}' is no run folder (there is no run.json)", "give the folder of a run, such as runs/a"
            )
        return replace(folder, id=folder.run_id() or folder.id)

    def refuse_taken(self) -> None:
        """Raise UsageError where something is there that a new run would overwrite."""
        if self.path.exists() and self._taken():
            raise UsageError(
                f"'{self.path}' exists already", f"choose another --out, or go on with --resume {self.path}"
            )

    def _taken(self) -> bool:
        """Whether it holds more than what is left of a process that was killed before its run had begun."""
        if not self.path.is_dir():
            return True
        left = {path.name for path in self.path.iterdir() if not _LEFTOVER.fullmatch(path.name)}
        # without the lock it may be somebody's prompts
        return bool(left - {_LOCK} - ({self.prompts.name} if _LOCK in left else set()))

    def remove_leftovers(self) -> None:
        """Remove what a killed process was writing; nobody else may work in the folder meanwhile."""
        for path in sorted(self.path.rglob(".*")):
            if _LEFTOVER.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def remove_unbegun(self) -> None:
        """Remove the folder, which this process holds, and an empty `runs/` with it, where no run has begun."""
        with contextlib.suppress(OSError):
            if self._taken():
                return
            for path in (self.prompts, self.path / _LOCK):
                path.unlink(missing_ok=True)
            self.path.rmdir()
            if self.path.parent == Path("runs"):
                self.path.parent.rmdir()

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json, and config.toml that `--config` reads, each value with its origin."""
        write_json(self.record, record)
        lines = ["# The resolved configuration of this run; use it again with --config."]
        for name, value in record["config"].items():
            if value is not None and name != "out":  # a new run has a folder of its own
                lines.append(f"{tomli_w.dumps({name: value}).strip()}  # {record['origins'][name]}")
        write_text(self.config, "\n".join(lines) + "\n")

    def read_record(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            TexforceError: it is damaged.
        """
        try:
            record: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
            record["config"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(error) from error
        return record

    def run_id(self) -> str | None:
        """Which run works here, whatever became of the folder meanwhile; None where nothing says so."""
        try:
            found = self.read_record().get("id")
        except (OSError, TexforceError):
            return None
        return found if isinstance(found, str) else None

    def anew(self, error: Unsuited) -> TexforceError:
        """What is said of `error` where it ends this run: its remedy is for another one, which begins with what is learnt."""
        learnt = f" --init-lora {quoted(self.adapter)}" if self.adapter.is_dir() else ""
        return TexforceError(
            error.message, f"begin a new run with --config {quoted(self.config)}{learnt}, and {error.hint}"
        )

    def damaged(self, error: Exception) -> TexforceError:
        """The sentence for a run.json that cannot be used."""
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return TexforceError(f"'{self.record}' is damaged ({reason})", f"begin a new run with --config {self.config}")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a .jsonl file as a whole: after a crash it ends with a complete line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, each of an epoch; [] where there is none. Damaged lines are left out and named."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
            int(row["epoch"])
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            damaged.append(str(number))
    if damaged:
        warn(f"line {', '.join(damaged)} of '{path}' is damaged and left out")
    return rows


def made_with() -> dict[str, str]:
    """The versions, and the number of threads, on which the last bits of sums on a CPU depend."""
    import torch

    return {**versions(), "threads": str(torch.get_num_threads())}


def versions_of(record: Mapping[str, Any], here: Mapping[str, str]) -> dict[str, Any]:
    """`versions` of a run that goes on `here`: those that it began with, by its `record`; `resumed_with`: each time that they
    changed, the new ones."""
    known = [record["versions"], *record.get("resumed_with", [])] if "versions" in record else []
    if here not in known[-1:]:
        known.append(here)
    return {"versions": known[0], **({"resumed_with": known[1:]} if known[1:] else {})}


def versions() -> dict[str, str]:
    """The versions that made a run."""
    found = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
