"""Metrics to TensorBoard or Weights & Biases as well, for those who ask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from texforce_cli.errors import TexforceError


class Logger(Protocol):
    """Takes one row an epoch."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of a row."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class _Nothing:
    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TexforceError("--log tensorboard needs tensorboard", "pip install 'texforce[tensorboard]'") from error
        self._writer = SummaryWriter(folder / "tensorboard")

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["images"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TexforceError("--log wandb needs wandb", "pip install 'texforce[wandb]'") from error
        self._run = wandb.init(project="texforce", name=folder.name, dir=str(folder), config=dict(config))

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(numbers(row), step=row["epoch"])

    def close(self) -> None:
        self._run.finish()


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row under flat names: `terms/brightness/mean`."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


class _Forgiving:
    """Another logger, whose failures (a full disk, no network) are told once and end nothing."""

    def __init__(self, kind: str, make: Callable[[], Logger], warn: Callable[[str], None]) -> None:
        self._kind, self._warn, self._failed = kind, warn, False
        self._inner: Logger = _Nothing()
        with self._forgiven():
            self._inner = make()

    def log(self, row: Mapping[str, Any]) -> None:
        with self._forgiven():
            self._inner.log(row)

    def close(self) -> None:
        with self._forgiven():
            self._inner.close()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except TexforceError:  # its package is missing, or a signal came
            raise
        except Exception as error:  # it is another's code
            if not self._failed:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                self._warn(
                    f"--log {self._kind} failed ({reason}): the run goes on without it; metrics.jsonl has it all"
                )
            self._failed = True


def open_logger(kind: str, folder: Path, config: Mapping[str, Any], warn: Callable[[str], None]) -> Logger:
    """The logger of `--log`. `warn` hears of its first failure.

    Raises:
        TexforceError: its package is not installed.
    """
    if kind == "tensorboard":
        return _Forgiving(kind, lambda: _TensorBoard(folder), warn)
    return _Forgiving(kind, lambda: _WandB(folder, config), warn) if kind == "wandb" else _Nothing()
