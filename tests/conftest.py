"""One thread per test process, so that parallel test processes do not fight, and a fixed hypothesis profile."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import HealthCheck, settings

import peft_pte  # noqa: F401  (registers the PEFT type)

torch.set_num_threads(1)
settings.register_profile(
    "peft_pte", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("peft_pte")
