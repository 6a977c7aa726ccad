"""What the evidence shares with the examples (the packaged checkpoint, real text, controls) and other benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

# Behind all else, so that nothing of ours is hidden.
sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("examples", "benchmarks")]

from captured import CapturedSteps

from checkpoint import dtype_here, is_converted, prepare
from controls import states_swapped, states_zeroed
from real_text import paragraphs

__all__ = ["CapturedSteps", "dtype_here", "is_converted", "paragraphs", "prepare", "states_swapped", "states_zeroed"]
