"""The embedded model, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in [name for name in os.environ if name.startswith("TEXFORCE_")]:
    del os.environ[name]

import pytest
import torch
from hypothesis import HealthCheck, settings

from texforce_cli.diffusion.models import load_pipeline, resolve_model

# a busy machine is no failure
settings.register_profile("texforce", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("texforce")


@pytest.fixture
def pipeline():  # type: ignore[no-untyped-def]
    """A fresh pipeline of the embedded model on the CPU, fp32."""
    return load_pipeline(resolve_model("tiny"), device=torch.device("cpu"), precision="fp32")
