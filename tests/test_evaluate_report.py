"""Figures and grading of the evaluation of mathematics, against what is worked out by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("math_verify", reason="grading needs math-verify: pip install peft-pte[evaluate]")

import evaluate_report as figures
import math_benchmarks

# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "samples, right, k, expected",
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
        (4, 2, 2, 5 / 6),  # 1 - 1 / 6
        (4, 1, 4, 1.0),
        (4, 0, 4, 0.0),
        (8, 3, 4, 1 - 5 / 70),
        (64, 1, 32, 1 / 2),
    ],
)
def test_pass_at_k(samples: int, right: int, k: int, expected: float) -> None:
    assert figures.pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_average_over_all_choices() -> None:
    from itertools import combinations

    for right in range(6):
        chosen = [any(i < right for i in some) for some in combinations(range(5), 3)]
        assert figures.pass_at_k(5, right, 3) == pytest.approx(np.mean(chosen))


@pytest.mark.parametrize("samples, right, k", [(4, 1, 5), (4, 1, 0), (4, 5, 1)])
def test_pass_at_k_refuses(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="k must be 1 to the number of samples"):
        figures.pass_at_k(samples, right, k)


def test_mean_with_error() -> None:
    """0, 1/2, 1: variance 1/4 with one degree less, so the error of the mean is 1/2 / sqrt(3)."""
    found = figures.mean_with_error([0.0, 0.5, 1.0])
    assert found.value == 0.5 and found.error == pytest.approx(0.5 / math.sqrt(3))
    assert math.isnan(figures.mean_with_error([1.0]).error)


def test_paired_difference() -> None:
    same = figures.paired_difference({0: 0.5, 1: 1.0}, {0: 0.25, 1: 0.75})
    assert same == figures.Difference(0.25, 0.25, 0.25, 2)  # whatever is drawn
    # Two problems, gains 0 and 1: the mean of two draws is 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert figures.paired_difference({0: 0.0, 1: 1.0}, {0: 0.0, 1: 0.0}) == figures.Difference(0.5, 0.0, 1.0, 2)
    # 400 problems, gains 0 and 1 by turns: normal, with a deviation of 1/2 / sqrt(400) = 0.025.
    found = figures.paired_difference({i: float(i % 2) for i in range(400)}, {i: 0.0 for i in range(500)})
    assert found.problems == 400 and found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.0035)
    # Paired: what problems have in common cancels.
    one = {i: (i % 10) / 10 for i in range(100)}
    assert figures.paired_difference(one, {i: x - 0.1 for i, x in one.items()}).low == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no complete problem in common"):
        figures.paired_difference({0: 1.0}, {1: 1.0})


def test_budgets_and_ks() -> None:
    assert figures.ks(1) == [] and figures.ks(3) == [2, 3] and figures.ks(4) == [2, 4] and figures.ks(6) == [2, 4, 6]
    assert figures.budgets(65536) == list(figures.BUDGETS)
    assert figures.budgets(16384) == [3072, 4096, 6144, 8192, 12288, 16384]
    assert figures.budgets(80) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert figures.budgets(4) == [1, 2, 3, 4]


# -------------------------------------------------------------------------------------------------------------- report


def line(
    arm: str, window: int | None, problem: int, sample: int, tokens: int, right: bool, ended: bool
) -> dict[str, Any]:
    key = dict(arm=arm, window=window, problem=problem, sample=sample)
    return key | dict(tokens=tokens, ended=ended, correct=right, answer="1", text="")


SETTINGS = dict(
    model="some/model",
    data="math500",
    samples=2,
    max_new_tokens=16384,
    temperature=0.6,
    top_p=0.95,
    engine="generate",
    problem_count=3,
    arms=["base", "pte"],
)


def test_report_of_lines(tmp_path: Path) -> None:
    base = [
        *(line("base", None, 0, i, 3000, True, True) for i in (0, 1)),
        line("base", None, 1, 0, 9000, True, True),
        line("base", None, 1, 1, 16384, True, False),  # right, but cut off: it does not count
        *(line("base", None, 2, i, 5000, False, True) for i in (0, 1)),
    ]
    pte = [
        *(line("pte", 4096, 0, i, 4097 + i, True, True) for i in (0, 1)),  # one of them is one token past the window
        *(line("pte", 4096, 1, i, 2000, i == 0, True) for i in (0, 1)),
        line("pte", 4096, 2, 0, 2000, True, True),  # and its other sample is missing
    ]
    for name, lines in (("base", base), ("pte-4096", pte)):
        for kind in ("completions", "timings"):
            (tmp_path / kind).mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / "completions" / f"{name}.jsonl").write_text(text + '{"arm": "pt')
    timings = [dict(batch=i, tokens=1000, seconds=4.0, cache_bytes=size) for i, size in enumerate((10, 2500))]
    (tmp_path / "timings" / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timings))
    text = figures.report(tmp_path, SETTINGS)
    rows = [re.split(r" *\| *", row)[1:-1] for row in text.splitlines() if row.startswith(("| base", "| pte"))]
    # 1, 1/2, 0: average 1/2, error 1/2 / sqrt(3); pass@2: 1, 1, 0. 1 of 6 cut off, which is right.
    tokens = (2 * 3000 + 9000 + 16384 + 2 * 5000) / 6
    assert rows[0][:6] == ["base", "full", "3", "0.500", "0.289", "0.667"]
    assert rows[0][6:] == ["0.17", "0.17", "", f"{tokens:.0f}", "250", "2,500"]
    assert rows[1] == ["pte", "4096", "2", "0.750", "0.250", "1.000", "0.00", "0.00", "0.25", "3049", "", ""]
    # On problems 0 and 1: gains 0 and 0.
    assert rows[2] == ["pte, window 4096", "base", "+0.000", "+0.000 to +0.000", "2"]
    assert "**Not complete**: pte, window 4096 has 2 of 3 problems" in text and "base has" not in text
    assert (tmp_path / "report.md").read_text() == text and (tmp_path / "report.png").stat().st_size > 1000
    base_run = next(run for run in figures.read_runs(tmp_path, 2) if run.arm == "base")
    curve = [np.mean(list(base_run.averages(budget).values())) for budget in (2999, 3000, 8999, 9000, 16384)]
    assert curve == pytest.approx([0, 1 / 3, 1 / 3, 1 / 2, 1 / 2])


def test_report_refuses(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no run has a problem with all of its 2 samples"):
        figures.report(tmp_path, SETTINGS)
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "base.jsonl").write_text('{"arm": \n{}\n')
    with pytest.raises(SystemExit, match="a line is no JSON"):
        figures.report(tmp_path, SETTINGS)


# ------------------------------------------------------------------------------------------------------------- grading

PAIRS = [
    # numbers, with text around them
    ("42", "So the answer is \\boxed{42}.", True),
    ("42", "The final answer is 42.", True),
    ("42", "$6 \\cdot 7 = 42$", True),
    ("42", "\\boxed{42.0}", True),
    ("42", "\\boxed{43}", False),
    ("42", "First \\boxed{41}.\n\nWait. 6 times 7 is 42.\n\n\\boxed{42}", True),
    ("42", "First I thought \\boxed{41}, but no: \\boxed{42}", False),  # near each other: math-verify takes both
    ("42", "I do not know.", False),
    ("42", "", False),
    ("42", "\\boxed{}", False),
    ("-3", "\\boxed{-3}", True),
    ("-3", "\\boxed{3}", False),
    ("1000", "\\boxed{1,000}", True),
    ("204", "Therefore $m+n = \\boxed{204}$ minutes", True),
    ("070", "\\boxed{70}", True),  # as AIME writes them
    ("25", "\\boxed{25\\%}", True),
    # fractions, decimals, roots
    ("\\frac{3}{4}", "\\boxed{\\frac{3}{4}}", True),
    ("\\frac{3}{4}", "\\boxed{0.75}", True),
    ("\\frac{3}{4}", "\\boxed{3/4}", True),
    ("\\frac{3}{4}", "\\boxed{\\dfrac{6}{8}}", True),
    ("\\frac{3}{4}", "\\boxed{\\frac{4}{3}}", False),
    ("\\frac{14}{3}", "\\boxed{4\\frac{2}{3}}", True),
    ("\\sqrt{2}", "\\boxed{\\sqrt{2}}", True),
    ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", True),
    ("\\sqrt{2}", "\\boxed{\\sqrt{3}}", False),
    ("2\\pi", "\\boxed{2 \\pi}", True),
    ("2\\pi", "\\boxed{\\pi}", False),
    # expressions
    ("x^2+2x+1", "\\boxed{(x+1)^2}", True),
    ("x^2+2x+1", "\\boxed{x^2+1}", False),
    ("x=5", "\\boxed{5}", True),
    ("p - q", "\\boxed{p-q}", True),
    # sets and tuples
    ("\\{1, 2\\}", "\\boxed{\\{2, 1\\}}", True),
    ("\\{1, 2\\}", "\\boxed{\\{1, 3\\}}", False),
    ("1, 2", "\\boxed{1, 2}", True),
    ("1, 2", "\\boxed{1}", False),
    ("(3, \\frac{\\pi}{2})", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", True),
    ("(1, 2)", "\\boxed{(2, 1)}", False),
    # intervals
    ("[0, 1)", "\\boxed{[0,1)}", True),
    ("(-\\infty, 2]", "\\boxed{(-\\infty,2]}", True),
    ("[0, 1]", "\\boxed{[0, 2]}", False),
    # words
    ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
    ("\\text{Evelyn}", "\\boxed{\\text{Angela}}", False),
]


@pytest.mark.parametrize("answer, completion, right", PAIRS)
def test_grading(answer: str, completion: str, right: bool) -> None:
    assert math_benchmarks.is_right(answer, completion) is right


# ------------------------------------------------------------------------------------------------------------ problems


def test_benchmarks_are_read_by_the_one_table() -> None:
    """With rows as the Hub has them in columns and types: AMC's answers are floats, OlympiadBench's lists."""
    answers: dict[str, tuple[Any, str]] = {
        "amc23": (27.0, "27"),
        "olympiadbench": (["$2$", "$\\frac{1}{2}$"], "2, \\frac{1}{2}"),
        "aime25": ("070", "070"),
    }
    for name, benchmark in math_benchmarks.BENCHMARKS.items():
        answer, expected = answers.get(name, ("$\\pi$", "\\pi"))
        rows = [{benchmark.problem: "What?", benchmark.answer: answer, "solution": "No."}] * 3
        with patch("datasets.load_dataset", return_value=rows) as load:
            assert math_benchmarks.load_problems(name, limit=2) == [("What?", expected)] * 2
        load.assert_called_once_with(benchmark.path, benchmark.config, split=benchmark.split)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"problem": "1 + 1?"}', "line 1: needs 'problem' and 'answer'"),
        ('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "", "answer": "2"}', "line 2: needs"),
        ("[1]", "line 1: needs"),
        ("{", "line 1: no JSON"),
        ("", "has no problems"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=said):
        math_benchmarks.load_problems(str(tmp_path / "rows.jsonl"))


def test_made_up_problems(tmp_path: Path) -> None:
    """Their solutions add up, and are right; other seeds give others."""
    for name, seed in (("one", 0), ("other", 1)):
        math_benchmarks.main(["--count", "40", "--seed", str(seed), "--output", str(tmp_path / name)])
    one, other = (math_benchmarks.read_json_lines(tmp_path / name) for name in ("one", "other"))
    assert len({row["problem"] for row in one + other}) > 70 and len(one) == 40
    for row in one + other:
        numbers = [int(n) for n in re.findall(r"\d+", row["problem"])]
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", row["solution"])
        assert [int(step[2]) for step in steps] == numbers[1:]
        count = numbers[0]
        for before, sign, change, after in steps:
            assert int(before) == count and int(after) == count + int(f"{sign}{change}") >= 0
            count = int(after)
        assert str(count) == row["answer"] and math_benchmarks.is_right(row["answer"], row["solution"])
    assert math_benchmarks.load_problems(str(tmp_path / "one"), 3)[0] == (one[0]["problem"], one[0]["answer"])
