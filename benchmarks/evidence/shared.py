"""What the evidence shares with the examples: the packaged checkpoint, and real text."""

from __future__ import annotations

import sys
from pathlib import Path

# Behind all else, so that nothing of ours is hidden.
sys.path.append(str(Path(__file__).parents[2] / "examples"))

from checkpoint import prepare
from real_text import paragraphs

__all__ = ["paragraphs", "prepare"]
