"""Libraries that talk while they load: hushed, since what matters of it is said in one sentence of ours."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks and bars of diffusers, transformers, peft and huggingface_hub; bars of downloads stay."""
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

    talkers = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging, hub_logging)]
    drawers = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    downloads = not are_progress_bars_disabled()
    for library, _ in talkers:
        library.set_verbosity(logging.CRITICAL)
    for library in drawers:
        library.disable_progress_bar()
    if downloads:
        enable_progress_bars()  # transformers turns them off with its own
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for library, level in talkers:
            library.set_verbosity(level)
        for library in drawers:
            library.enable_progress_bar()
