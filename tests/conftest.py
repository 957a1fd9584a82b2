"""The embedded model, loaded once."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in [name for name in os.environ if name.startswith("TEXFORCE_") and not name.startswith("TEXFORCE_TEST_")]:
    del os.environ[name]
# what is installed or cached on this machine is none of the tests' business
os.environ["TEXFORCE_HOME"] = tempfile.mkdtemp(prefix="texforce-tests-")

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
