"""What an evaluation's lines say: averages with their errors, pass@k, paired differences; a table and a figure.

An answer counts if it is right and its completion ended within the tokens allowed: one run with a large budget says
what every smaller one would have given, since a completion does not depend on where it would have been cut off.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
# Of the figure, as far as a run's own budget reaches.
BUDGETS = (3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)
RESAMPLES = 10_000


class Mean(NamedTuple):
    value: float
    error: float


class Difference(NamedTuple):
    value: float
    low: float
    high: float
    problems: int


# ---------------------------------------------------------------------------------------------------------- statistics


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, without bias, from `right` of `samples` that are.

    Raises:
        ValueError: there are fewer samples than k.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {right} right ones in {samples} samples: k must be 1 to the number of samples.")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_with_error(values: list[float]) -> Mean:
    """Mean over problems and its standard error. Samples of one problem are not independent; problems are."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Mean(float(np.mean(values)), spread / math.sqrt(len(values)))


def paired_difference(one: dict[int, float], other: dict[int, float], seed: int = 0) -> Difference:
    """Of the averages of two runs on the problems that both have, with a 95 % interval: problems are drawn anew.

    Raises:
        ValueError: they have no problem in common.
    """
    both = sorted(one.keys() & other.keys())
    if not both:
        raise ValueError("The runs have no complete problem in common.")
    gains = np.array([one[i] - other[i] for i in both])
    drawn = np.random.default_rng(seed).integers(len(both), size=(RESAMPLES, len(both)))
    low, high = np.quantile(gains[drawn].mean(1), (0.025, 0.975))
    return Difference(float(gains.mean()), float(low), float(high), len(both))


# --------------------------------------------------------------------------------------------------------------- lines


class Run:
    """The lines of one arm under one window; problems with fewer than n samples are left out."""

    def __init__(self, lines: list[Row], timings: list[Row], samples: int):
        self.arm, self.window = lines[0]["arm"], lines[0]["window"]
        by_problem: dict[int, list[Row]] = defaultdict(list)
        for line in lines:
            by_problem[line["problem"]].append(line)
        self.problems = {i: part for i, part in sorted(by_problem.items()) if len(part) == samples}
        self.lines = [line for part in self.problems.values() for line in part]
        self.timings = timings

    @property
    def name(self) -> str:
        return self.arm if self.window is None else f"{self.arm}, window {self.window}"

    def right(self, budget: int) -> dict[int, int]:
        """Of each problem, the samples that are right with this budget of tokens."""

        def counts(line: Row) -> bool:
            return line["correct"] and line["ended"] and line["tokens"] <= budget

        return {i: sum(map(counts, part)) for i, part in self.problems.items()}

    def averages(self, budget: int) -> dict[int, float]:
        return {i: count / len(self.problems[i]) for i, count in self.right(budget).items()}

    def share(self, name: str) -> float:
        """Of the completions: `cut_off`, `cut_off_right` (graded, but not counted), `past` the window."""
        tests = dict(
            cut_off=lambda line: not line["ended"],
            cut_off_right=lambda line: line["correct"] and not line["ended"],
            # The last token is never stored, and the first eviction comes before the thought that does not fit.
            past=lambda line: line["tokens"] - 1 > self.window,
        )
        return float(np.mean([tests[name](line) for line in self.lines]))


def json_lines(path: Path) -> list[Row]:
    """The lines of a file that are whole; the last one may have been cut by a kill.

    Raises:
        SystemExit: another line is no JSON.
    """
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path}: a line is no JSON ({error}). Delete the file, and it is made anew.") from error


def read_runs(folder: Path, samples: int) -> list[Run]:
    runs = []
    for path in sorted((folder / "completions").glob("*.jsonl")):
        if lines := json_lines(path):
            runs.append(Run(lines, json_lines(folder / "timings" / path.name), samples))
    return [run for run in runs if run.problems]


# -------------------------------------------------------------------------------------------------------------- report


def ks(samples: int) -> list[int]:
    """2, 4, 8, ... and the number of samples."""
    return sorted({2**i for i in range(1, samples.bit_length()) if 2**i <= samples} | {samples} - {1})


def budgets(most: int) -> list[int]:
    """Tokens allowed, for the figure; eighths of a budget that is small."""
    known = [budget for budget in BUDGETS if budget < most]
    return [*(known if len(known) > 1 else sorted({most * i // 8 for i in range(1, 8)} - {0})), most]


def table(runs: list[Run], samples: int, most: int) -> list[str]:
    titles = ["arm", "window", "problems", f"avg@{samples}", "s.e.", *(f"pass@{k}" for k in ks(samples))]
    titles += ["cut off", "of all: right, but cut off", "past the window", "tokens", "tokens/s", "cache bytes"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for run in runs:
        average = mean_with_error(list(run.averages(most).values()))
        row = [run.arm, run.window or "full", len(run.problems), f"{average.value:.3f}", f"{average.error:.3f}"]
        for k in ks(samples):
            row.append(f"{np.mean([pass_at_k(samples, count, k) for count in run.right(most).values()]):.3f}")
        row += [f"{run.share('cut_off'):.2f}", f"{run.share('cut_off_right'):.2f}"]
        row.append("" if run.window is None else f"{run.share('past'):.2f}")
        row.append(f"{np.mean([line['tokens'] for line in run.lines]):.0f}")
        seconds = sum(timing["seconds"] for timing in run.timings)
        row.append(f"{sum(timing['tokens'] for timing in run.timings) / seconds:.0f}" if seconds else "")
        held = [timing["cache_bytes"] for timing in run.timings if timing["cache_bytes"] is not None]
        row.append(f"{max(held):,}" if held else "")
        lines.append(f"| {' | '.join(map(str, row))} |")
    return lines


def differences(runs: list[Run], most: int) -> list[str]:
    """PTE (or else the last arm) against the others under the same window, and against those without one."""
    names = list(dict.fromkeys(run.arm for run in runs))
    first = "pte" if "pte" in names else names[-1]
    lines = []
    for run in (run for run in runs if run.arm == first):
        for other in runs:
            if other.arm != first and (other.window in (None, run.window) or run.window is None):
                found = paired_difference(run.averages(most), other.averages(most))
                interval = f"{found.low:+.3f} to {found.high:+.3f}"
                lines.append(f"| {run.name} | {other.name} | {found.value:+.3f} | {interval} | {found.problems} |")
    if not lines:
        return []
    return ["| run | minus | difference | 95 % interval | problems |", "|---|---|---|---|---|", *lines]


def draw(runs: list[Run], most: int, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    names = list(dict.fromkeys(run.arm for run in runs))
    windows = sorted({run.window for run in runs if run.window})
    for run in runs:
        points = [mean_with_error(list(run.averages(budget).values())) for budget in budgets(most)]
        style = ["--", ":", "-."][windows.index(run.window) % 3] if run.window else "-"
        axis.errorbar(
            budgets(most),
            [point.value for point in points],
            [point.error for point in points],
            label=run.name,
            color=f"C{names.index(run.arm)}",
            linestyle=style,
            marker=".",
            capsize=2,
        )
    axis.set(xlabel="tokens allowed", ylabel="right and ended within them", title=title)
    if most >= 2 * BUDGETS[0]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets(most), [f"{budget / 1024:g}K" for budget in budgets(most)])
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(folder: Path, settings: Row) -> str:
    """Write `report.md` and `report.png` of the lines in a folder, and return the text.

    Raises:
        SystemExit: there is no complete problem.
    """
    samples, most = settings["samples"], settings["max_new_tokens"]
    runs = read_runs(folder, samples)
    if not runs:
        raise SystemExit(f"{folder}: no run has a problem with all of its {samples} samples yet.")
    order = list(settings["arms"])
    runs.sort(key=lambda run: (order.index(run.arm), run.window or 0))
    count = settings["problem_count"]
    said = [f"# {settings['model']} on {settings['data']}", ""]
    said.append(
        f"{count} problems, {samples} samples each, at most {most} tokens, temperature {settings['temperature']}, "
        f"top-p {settings['top_p']}, engine {settings['engine']}. Right: graded by math-verify, and ended within the "
        "tokens. s.e.: over problems. Cache bytes: of a sequence, at the end of the batch in which they were most."
    )
    for run in runs:
        if len(run.problems) < count:
            said.append(f"\n**Not complete**: {run.name} has {len(run.problems)} of {count} problems.")
    said += ["", *table(runs, samples, most), "", *differences(runs, most), ""]
    text = "\n".join(said)
    (folder / "report.md").write_text(text)
    draw(runs, most, folder / "report.png", f"{Path(settings['model']).name}, {Path(settings['data']).name}")
    return text
