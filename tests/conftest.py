"""The embedded model, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in [name for name in os.environ if name.startswith("TEXFORCE_")]:
    del os.environ[name]

import pytest
import torch

from texforce_cli.diffusion.models import load_pipeline, resolve_model


@pytest.fixture
def pipeline():  # type: ignore[no-untyped-def]
    """A fresh pipeline of the embedded model on the CPU, fp32."""
    return load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
