"""What the task files of this folder call: the answer of a row, and the figures of its samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from evaluate_report import pass_at_k
from math_benchmarks import answer_text, is_right, require_grader

require_grader()


def target(row: dict[str, Any]) -> str:
    """OlympiadBench has `final_answer`, a list; the others have `answer`."""
    return answer_text(row["final_answer"] if "final_answer" in row else row["answer"])


def process_results(row: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """`results`: the eight samples, in a list."""
    (samples,) = results
    right = sum(is_right(target(row), text) for text in samples)
    return {"avg@8": right / len(samples)} | {f"pass@{k}": pass_at_k(len(samples), right, k) for k in (4, 8)}
