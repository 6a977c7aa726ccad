"""Moved to `peft_pte.trainers.grpo`; this name goes with the next release."""

import warnings

from .trainers.grpo import PTEGRPOTrainer

__all__ = ["PTEGRPOTrainer"]

warnings.warn("`peft_pte.trl` has moved: import `peft_pte.trainers.grpo` instead.", FutureWarning, stacklevel=2)
