"""Tables and figures of the results that are there: means over seeds with paired bootstrap intervals."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import torch

from arms import ARMS

REFERENCE = "PTE, delta"  # what the other arms are compared with, seed by seed
GATE = 0.95
RESAMPLES = 10_000

Scores = dict[tuple[str, str, int], dict[int, float]]  # (arm, control, distance) -> accuracy by seed


def read_scores(path: Path) -> Scores:
    scores: Scores = defaultdict(dict)
    for row in csv.DictReader(path.open()):
        scores[row["arm"], row["control"], int(row["distance"])][int(row["seed"])] = float(row["accuracy"])
    return scores


def interval(values: torch.Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` [seeds]."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = values[picked].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def mean_and_interval(by_seed: dict[int, float]) -> str:
    values = torch.tensor([by_seed[seed] for seed in sorted(by_seed)], dtype=torch.float64)
    if len(values) == 1:
        return f"{values.item():.2f}"
    low, high = interval(values)
    return f"{values.mean().item():.2f} [{low:.2f}, {high:.2f}]"


def difference(by_seed: dict[int, float], reference: dict[int, float]) -> str:
    """Mean of the difference to the reference, over the seeds that both have; an arm without seeds counts for all."""
    if set(by_seed) == {0}:
        by_seed = {seed: by_seed[0] for seed in reference}
    return mean_and_interval({seed: by_seed[seed] - reference[seed] for seed in set(by_seed) & set(reference)})


def verdict(scores: Scores, distances: list[int], chance: float) -> str:
    """Whether the table means anything: the base must solve the task, and not under the window."""
    if not {("base, full cache", "", 0), ("base, windowed", "", 0)} <= scores.keys():
        return "Gate: see the table with the base."
    full = min(scores["base, full cache", "", distance][0] for distance in distances)
    far = scores["base, windowed", "", distances[-1]][0]
    valid = full >= GATE and far <= 2 * chance + 0.05
    return (
        f"Gate: base with full cache at least {full:.2f} (>= {GATE} wanted), windowed and farthest {far:.2f} "
        f"(chance {chance:.2f}): {'passed' if valid else '**void**'}."
    )


def table(path: Path, chance: float) -> str:
    """Markdown: accuracy by distance, and the difference to the reference at the farthest."""
    scores = read_scores(path)
    distances = sorted({distance for _, _, distance in scores})
    seeds = sorted({seed for by_seed in scores.values() for seed in by_seed})
    lines = [f"## {path.stem}", "", verdict(scores, distances, chance), f"Seeds: {', '.join(map(str, seeds))}.", ""]
    lines.append("| | " + " | ".join(map(str, distances)) + f" | minus {REFERENCE} at {distances[-1]} |")
    lines.append("|---" * (len(distances) + 2) + "|")
    for control in dict.fromkeys(control for _, control, _ in scores):
        for arm in ARMS:
            cells = [scores.get((arm, control, distance), {}) for distance in distances]
            if not all(cells):
                continue
            reference = scores.get((REFERENCE, "", distances[-1]), {})
            versus = difference(cells[-1], reference) if reference and (arm, control) != (REFERENCE, "") else ""
            name = f"{arm}, {control}" if control else arm
            lines.append("| " + " | ".join([name, *map(mean_and_interval, cells), versus]) + " |")
    return "\n".join(lines)


def plot(path: Path, chance: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = read_scores(path)
    distances = sorted({distance for _, _, distance in scores})
    figure, axis = plt.subplots(figsize=(10, 5))
    for arm, color in zip(ARMS, plt.cm.tab20.colors):
        by_distance = [scores.get((arm, "", distance), {}) for distance in distances]
        if not all(by_distance):
            continue
        values = [torch.tensor(list(by_seed.values()), dtype=torch.float64) for by_seed in by_distance]
        means = [x.mean().item() for x in values]
        axis.plot(distances, means, marker="o", label=arm, color=color)
        if len(values[0]) > 1:
            axis.fill_between(distances, *zip(*map(interval, values)), color=color, alpha=0.15)
    axis.axhline(chance, color="black", linestyle=":", label="chance")
    axis.set(title=path.stem, xlabel="tokens of filler between thought and question", ylabel="accuracy")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def report(folder: Path) -> None:
    """Write `README.md` and a figure for each table in `folder`."""
    from tasks import TASKS

    parts = ["# Accuracy by distance", "", "Drawn from the CSV files here by `python benchmarks/evidence --report`."]
    for path in sorted(folder.glob("*.csv")):
        chance = TASKS[path.stem.partition("_")[0]].chance()
        parts += ["", table(path, chance), "", f"![{path.stem}]({path.stem}.png)"]
        plot(path, chance)
    (folder / "README.md").write_text("\n".join(parts) + "\n")
    print("\n".join(parts))
