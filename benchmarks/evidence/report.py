"""Tables and figures of the results that are there: means over seeds with paired bootstrap intervals."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from arms import ARMS
from peft_pte import PTEConfig
from streams import SymbolTask, Task
from tasks import TASKS

REFERENCES = ("PTE", "PTE, first design")  # the first that a table has is what the other arms are compared with
GATE = 0.95
BLIND = 0.15  # how far above a uniform guess the base may be that does not see the evidence: answers are not uniform
RESAMPLES = 10_000

BySeed = dict[int, float]


class Results:
    """One CSV file: values by seed of any arm, control, distance and step of training."""

    def __init__(self, path: Path):
        self.name, self.task = path.stem, task_of(path.stem)
        self.rows = list(csv.DictReader(path.open()))
        given = dict(item.split("=") for item in self.rows[0]["difficulty"].split())
        self.difficulty = {key: int(value) for key, value in given.items()}
        self.chance = self.task.chance(**self.difficulty)
        self.steps = max(int(row["step"]) for row in self.rows)
        self.trained_distance = int(self.rows[0]["trained_distance"])
        self.distances = sorted({int(row["distance"]) for row in self.rows})
        # Arms are looked at on their way, and with controls, at two distances. Those beyond no base was trained for.
        looked_at = [int(row["distance"]) for row in self.rows if row["control"] or int(row["step"]) < self.steps]
        self.farthest = max(looked_at, default=self.distances[-1])
        self.seeds = sorted({int(row["seed"]) for row in self.rows})
        self.values: dict[tuple[str, str, str, int, int], BySeed] = defaultdict(dict)
        for row in self.rows:
            for quantity in ("accuracy", "nll"):
                key = quantity, row["arm"], row["control"], int(row["distance"]), int(row["step"])
                self.values[key][int(row["seed"])] = float(row[quantity])

    def get(
        self, arm: str, distance: int, control: str = "", step: int | None = None, quantity: str = "accuracy"
    ) -> BySeed:
        """Values by seed; empty if the arm was not run."""
        return self.values.get((quantity, arm, control, distance, self.steps if step is None else step), {})

    def arms(self) -> list[str]:
        return [arm for arm in ARMS if self.get(arm, self.distances[-1])]

    @property
    def reference(self) -> str:
        return next((arm for arm in REFERENCES if arm in self.arms()), REFERENCES[0])

    def evictions(self, distance: int) -> int:
        """Until the first question is answered."""
        return next(int(row["evictions"]) for row in self.rows if int(row["distance"]) == distance)

    def times_smaller(self, distance: int, arm: str) -> float:
        """Full cache over bounded cache with state, in bytes, at the end of a stream.

        The bounded one has room for the prompt and the whole window. A token is two vectors a layer, what is carried
        the core and some keys for the convolution.
        """
        rank = ARMS[arm].rank or int(self.rows[0]["rank"])
        carried = rank * (rank + PTEConfig(**ARMS[arm].settings).num_convolved - 1)
        length = self.task.length(distance, **self.difficulty)
        room = self.task.prompt_length + int(self.rows[0]["window_size"])
        width = self.task.kv_width(int(self.rows[0].get("hidden_size", 64)))
        return (length - 1) / (room + carried / (2 * width))


def task_of(name: str) -> Task:
    """Of a table of this name: names of tasks may begin with those of others."""
    return TASKS[max((task for task in TASKS if f"{name}_".startswith(f"{task}_")), key=len)]


def interval(values: torch.Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `values` [seeds]."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = values[picked].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def mean_and_interval(by_seed: BySeed) -> str:
    values = torch.tensor([by_seed[seed] for seed in sorted(by_seed)], dtype=torch.float64)
    if len(values) == 1:
        return f"{values.item():.2f}"
    low, high = interval(values)
    return f"{values.mean().item():.2f} [{low:.2f}, {high:.2f}]"


def difference(by_seed: BySeed, reference: BySeed) -> str:
    """Mean of the difference to the reference, over the seeds that both have; an arm without seeds counts for all."""
    if set(by_seed) == {0}:
        by_seed = {seed: by_seed[0] for seed in reference}
    return mean_and_interval({seed: by_seed[seed] - reference[seed] for seed in set(by_seed) & set(reference)})


def verdict(results: Results) -> str:
    """Whether the table means anything: the full cache must be enough for the task, and the window must not."""
    full = [results.get("base, full cache", distance) for distance in results.distances if distance <= results.farthest]
    far = results.get("base, windowed", results.farthest)
    if not all(full) or not far:
        return "Gate: see the table with the base."
    lowest = min(by_seed[0] for by_seed in full)
    if not isinstance(results.task, SymbolTask) and not results.task.is_taught:
        return verdict_on_checkpoint(results, lowest, far[0])
    valid = lowest >= GATE and far[0] <= results.chance + BLIND
    return (
        f"Gate: base with full cache at least {lowest:.2f} (>= {GATE} wanted), windowed and farthest {far[0]:.2f} "
        f"(a uniform guess: {results.chance:.2f}): {'passed' if valid else '**void**'}."
    )


def verdict_on_checkpoint(results: Results, lowest: float, far: float) -> str:
    """The base has not seen the task and need not solve it; LoRA says what it could do."""
    lora = [results.get("LoRA, full cache", distance) for distance in results.distances if distance <= results.farthest]
    upper = f"at least {min(map(mean, lora)):.2f}" if all(lora) else "not run"
    return (
        f"The base is a checkpoint that was not trained on this task: with its full cache at least {lowest:.2f}. Upper "
        f"line: LoRA with the full cache, {upper}. Gate: base windowed and farthest {far:.2f} (a uniform guess: "
        f"{results.chance:.2f}): {'passed' if far <= results.chance + BLIND else '**void**'}."
    )


def table(results: Results, quantity: str) -> list[str]:
    """Markdown: accuracy or NLL by distance, and for accuracy the difference to the reference."""
    distances, is_accuracy = results.distances, quantity == "accuracy"
    heads = [f"{distance} ({results.evictions(distance)})" for distance in distances]
    heads += [f"minus {results.reference} at {results.farthest}"] if is_accuracy else []
    lines = [f"| {quantity} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    reference = results.get(results.reference, results.farthest)
    for arm in results.arms():
        cells = [results.get(arm, distance, quantity=quantity) for distance in distances]
        name = arm
        if ARMS[arm].is_trained and len(cells[-1]) < len(results.seeds):
            name += f" ({len(cells[-1])} of the seeds)"
        words = [name, *(mean_and_interval(x) for x in cells)]
        if is_accuracy:
            other = results.get(arm, results.farthest)
            words.append(difference(other, reference) if reference and arm != results.reference else "")
        lines.append("| " + " | ".join(words) + " |")
    return lines


def controls(results: Results) -> list[str]:
    """Markdown: accuracy without what the states say."""
    names = sorted({row["control"] for row in results.rows} - {""})
    distances = (results.trained_distance, results.farthest)
    columns = [(name, distance) for name in names for distance in distances]
    if not columns:
        return []
    lines = ["| accuracy | " + " | ".join(f"{name}, {distance}" for name, distance in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for arm in results.arms():
        cells = [results.get(arm, distance, name) for name, distance in columns]
        if all(cells):
            lines.append(f"| {arm} | " + " | ".join(map(mean_and_interval, cells)) + " |")
    return lines


def claims(results: Results, arm: str) -> list[str]:
    """What an arm is worth: against the full cache, against arms that keep nothing, and with distance."""
    trained = results.trained_distance
    distances = [distance for distance in results.distances if distance >= trained]
    lines = [f"| {arm} | " + " | ".join(map(str, distances)) + " |", "|---" * (len(distances) + 1) + "|"]
    for other in ("LoRA, full cache", "LoRA, windowed", "Global-only"):
        pairs = [(results.get(arm, distance), results.get(other, distance)) for distance in distances]
        if all(ours and theirs for ours, theirs in pairs):
            lines.append(f"| minus {other} | " + " | ".join(difference(*pair) for pair in pairs) + " |")
    if len(lines) == 2:
        return []
    own = [difference(results.get(arm, distance), results.get(arm, trained)) for distance in distances[1:]]
    lines.append(f"| minus itself at {trained}, the longest trained | | " + " | ".join(own) + " |")
    smaller = [f"{results.times_smaller(distance, arm):.1f} times smaller" for distance in distances]
    return [*lines, f"| cache with state, in bytes | {' | '.join(smaller)} |"]


def curve(axis: Any, results: Results) -> None:
    """Accuracy at the longest trained and at a far distance while an arm is trained."""
    steps = sorted({int(row["step"]) for row in results.rows})
    for arm, color in zip(ARMS, colors()):
        for distance, line in ((results.trained_distance, "-"), (results.farthest, ":")):
            seen = [step for step in steps if results.get(arm, distance, step=step)]
            means = [mean(results.get(arm, distance, step=step)) for step in seen]
            if len(seen) > 1:
                axis.plot(seen, means, line, color=color, marker=".")
    axis.set(xlabel=f"steps of training (solid: {results.trained_distance} tokens, dotted: {results.farthest})")


def mean(by_seed: BySeed) -> float:
    return sum(by_seed.values()) / len(by_seed)


def pyplot() -> Any:
    """Imported only here: who runs an arm need not have it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def colors() -> list[Any]:
    """One for each arm; what others are compared with stands out."""
    maps = pyplot().cm
    many = [*maps.tab20.colors, *maps.tab20b.colors]
    return ["black" if arm in REFERENCES else many[i % len(many)] for i, arm in enumerate(ARMS)]


def plot(results: Results, path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(17, max(5, 0.25 * len(results.arms()))))
    for axis, quantity in zip(axes, ("accuracy", "nll")):
        for arm, color in zip(ARMS, colors()):
            by_distance = [results.get(arm, distance, quantity=quantity) for distance in results.distances]
            if not all(by_distance):
                continue
            values = [torch.tensor(list(by_seed.values()), dtype=torch.float64) for by_seed in by_distance]
            axis.plot(results.distances, [x.mean().item() for x in values], marker="o", label=arm, color=color)
            if len(values[0]) > 1:
                axis.fill_between(results.distances, *zip(*map(interval, values)), color=color, alpha=0.15)
        axis.set(xlabel="tokens of filler (evictions) between thought and question", ylabel=quantity)
        labels = [f"{distance}\n({results.evictions(distance)})" for distance in results.distances]
        axis.set_xticks(results.distances, labels, fontsize=8)
    axes[0].axhline(results.chance, color="black", linestyle=":", label="uniform guess")
    axes[0].set_title(results.name)
    curve(axes[2], results)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="center left", bbox_to_anchor=(0.82, 0.5))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0, 0.82, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def capacity(tables: list[Results], path: Path) -> list[str]:
    """Accuracy at the longest trained distance against the number of pairs: Markdown, and a figure."""
    plt = pyplot()
    tables = sorted(tables, key=lambda results: results.difficulty["pairs"])
    pairs, distance = [results.difficulty["pairs"] for results in tables], tables[0].trained_distance
    figure, axis = plt.subplots(figsize=(8, 5))
    lines = ["| pairs | " + " | ".join(map(str, pairs)) + " |", "|---" * (len(pairs) + 1) + "|"]
    for arm, color in zip(ARMS, colors()):
        cells = [results.get(arm, distance) for results in tables]
        lines += [f"| {arm} | {' | '.join(mean_and_interval(x) if x else '' for x in cells)} |"] if any(cells) else []
        seen = [(count, mean(x)) for count, x in zip(pairs, cells) if x]
        if len(seen) > 1:
            axis.plot(*zip(*seen), ":" if ARMS[arm].adapter == "oracle" else "-", marker="o", color=color, label=arm)
    axis.axhline(tables[0].chance, color="black", linestyle=":")
    axis.set(xlabel="pairs written", ylabel="accuracy", title=f"{distance} tokens of filler, {tables[0].steps} steps")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    about = f"Accuracy of the first answer after {distance} tokens of filler; {tables[0].steps} steps, learning rate "
    about += f"{tables[0].rows[0]['learning_rate']}."
    return [f"## {path.stem}", "", about, "", *lines, "", f"![{path.stem}]({path.name})"]


def rl_table(path: Path) -> list[str]:
    """Accuracy before and after GRPO, and the reward on the way: Markdown, and a figure."""
    plt = pyplot()
    rows = list(csv.DictReader(path.open()))
    values: dict[tuple[str, str, int], BySeed] = defaultdict(dict)
    for row in rows:
        quantity = f"accuracy at {row['distance']}" if row["accuracy"] else "reward"
        values[row["arm"], quantity, int(row["step"])][int(row["seed"])] = float(row["accuracy"] or row["reward"])
    distances = sorted({int(row["distance"]) for row in rows if row["distance"]})
    last = max(int(row["step"]) for row in rows)
    heads = [f"at {distance}, {when}" for distance in distances for when in ("start", f"after {last} steps")]
    lines = ["| accuracy | " + " | ".join(heads) + " | reward, last 10 steps |", "|---" * (len(heads) + 2) + "|"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5))
    for arm, color in zip(ARMS, colors()):
        rewards = [values[arm, "reward", step] for step in range(1, last + 1) if (arm, "reward", step) in values]
        if not rewards:
            continue
        cells = [values[arm, f"accuracy at {distance}", step] for distance in distances for step in (0, last)]
        ends = {seed: mean({i: by_seed[seed] for i, by_seed in enumerate(rewards[-10:])}) for seed in rewards[0]}
        lines.append(f"| {arm} | " + " | ".join(map(mean_and_interval, [*cells, ends])) + " |")
        smooth = torch.tensor([mean(by_seed) for by_seed in rewards]).unfold(0, min(10, len(rewards)), 1).mean(-1)
        axes[0].plot(range(last - len(smooth) + 1, last + 1), smooth, color=color, label=arm)
        for distance, line in zip(distances, ("-", ":")):
            seen = [s for s in range(last + 1) if (arm, f"accuracy at {distance}", s) in values]
            means = [mean(values[arm, f"accuracy at {distance}", s]) for s in seen]
            axes[1].plot(seen, means, line, color=color, marker=".")
    axes[0].set(xlabel="GRPO step", ylabel="reward, running mean of 10 steps, mean over seeds", ylim=(0, 1))
    axes[1].set(xlabel="GRPO step", ylabel=f"accuracy after {' (solid) and '.join(map(str, distances))}", ylim=(0, 1))
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)
    about = f"{rows[0]['start_steps']} supervised steps, then {last} of GRPO. Seeds: "
    about += ", ".join(sorted({row["seed"] for row in rows})) + "."
    return [f"## {path.stem}", "", about, "", *lines, "", f"![{path.stem}]({path.stem}.png)"]


def report(folder: Path) -> None:
    """Write `README.md` and a figure for each table in `folder`, and one for capacity over several tables."""
    parts = [
        "# Accuracy and NLL by distance",
        "",
        "Drawn from the CSV files here by `python benchmarks/evidence --report`. Columns: tokens of filler between",
        "the last thought of evidence and the question (evictions until then). Brackets: 95 % bootstrap interval of",
        "the mean over seeds.",
    ]
    paths = sorted(folder.glob("*.csv"))
    tables = [Results(path) for path in paths if not path.stem.startswith("rl_")]
    for results in tables:
        parts += ["", f"## {results.name}", "", verdict(results)]
        parts += [f"Steps: {results.steps}. Seeds: {', '.join(map(str, results.seeds))}.", ""]
        of_arms = [claims(results, arm) for arm in (results.reference, "PTE, first design, rank 32")]
        for lines in (table(results, "accuracy"), *of_arms, controls(results), table(results, "nll")):
            parts += [*lines, ""] if lines else []
        parts.append(f"![{results.name}]({results.name}.png)")
        plot(results, folder / f"{results.name}.png")
    by_pairs: dict[str, list[Results]] = defaultdict(list)  # tables that differ in the number of pairs alone
    for results in tables:
        if results.task.name == "capacity" and "pairs" in results.difficulty:
            by_pairs[results.name.replace(f"{results.difficulty['pairs']}_pairs", "by_pairs")].append(results)
    for name, chosen in by_pairs.items():
        parts += ["", *capacity(chosen, folder / f"{name}.png")]
    for path in paths:
        parts += ["", *rl_table(path)] if path.stem.startswith("rl_") else []
    (folder / "README.md").write_text("\n".join(parts) + "\n")
    print("\n".join(parts))
