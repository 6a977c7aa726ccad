"""What the evidence shares with the examples: the packaged checkpoint, real text, and controls."""

from __future__ import annotations

import sys
from pathlib import Path

# Behind all else, so that nothing of ours is hidden.
sys.path.append(str(Path(__file__).parents[2] / "examples"))

from checkpoint import dtype_here, prepare
from controls import states_swapped, states_zeroed
from real_text import paragraphs

__all__ = ["dtype_here", "paragraphs", "prepare", "states_swapped", "states_zeroed"]
