"""Moved to `peft_pte.trainers.checkpoints`; this name goes with the next release."""

import warnings

from .trainers.checkpoints import AtomicCheckpoints

__all__ = ["AtomicCheckpoints"]

warnings.warn(
    "`peft_pte.checkpoints` has moved: import `peft_pte.trainers.checkpoints` instead.", FutureWarning, stacklevel=2
)
