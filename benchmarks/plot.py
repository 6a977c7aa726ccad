"""Draw the measurements of `gpu.py` that there are: a picture beside each CSV file.

python benchmarks/plot.py                    # all of benchmarks/results
python benchmarks/plot.py --folder somewhere
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Rows = list[dict[str, str]]
# Part: columns that make a group of bars, those that make a bar in it, and of each axis (column, its unit, factor).
BARS: dict[str, tuple[tuple[str, ...], tuple[str, ...], list[tuple[str, str, float]]]] = {
    "encode": (
        ("shape", "batch"),
        ("update", "implementation"),
        [("share_of_copy", "bandwidth of K and V / that of a copy", 1), ("device_us", "ms on the device", 1e-3)],
    ),
    "apply": (
        ("shape", "batch", "tokens"),
        ("arm", "direction"),
        [("device_us", "us on the device", 1), ("call_us", "us a call", 1)],
    ),
    "decode": (
        ("shape", "batch"),
        ("arm",),
        [("mean_ms", "ms a step, evictions included", 1), ("peak_bytes", "GiB beyond the model", 2**-30)],
    ),
    "train": (
        ("shape",),
        ("arm",),
        [("seconds", "s a step", 1), ("peak_bytes", "GiB beyond the model", 2**-30)],
    ),
}


def read(path: Path) -> Rows:
    """Rows that were measured; others name an error."""
    return [row for row in csv.DictReader(path.open()) if not row["error"]]


def draw_bars(
    axis: Axes, rows: Rows, groups: tuple[str, ...], bars: tuple[str, ...], column: str, factor: float
) -> None:
    def named(row: dict[str, str], columns: tuple[str, ...]) -> str:
        return ", ".join(row[name] for name in columns)

    labels = list(dict.fromkeys(named(row, groups) for row in rows))
    kinds = list(dict.fromkeys(named(row, bars) for row in rows))
    for i, kind in enumerate(kinds):
        of_kind = [row for row in rows if named(row, bars) == kind and row[column]]
        places = [labels.index(named(row, groups)) + 0.8 * (i - len(kinds) / 2) / len(kinds) for row in of_kind]
        heights = [float(row[column]) * factor for row in of_kind]
        axis.bar(places, heights, width=0.8 / len(kinds), align="edge", label=kind)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=7)
    axis.set_yscale("log")


def draw_memory(axis: Axes, rows: Rows, column: str) -> None:
    for arm in dict.fromkeys(row["arm"] for row in rows):
        points = [(int(row["length"]), int(row[column]) / 2**30) for row in rows if row["arm"] == arm]
        axis.plot(*zip(*points), marker="o", label=arm)
    axis.set(xscale="log", yscale="log", xlabel="tokens")


def draw(path: Path, part: str) -> None:
    rows = read(path)
    if not rows:
        return
    if part == "memory":
        shapes = list(dict.fromkeys(row["shape"] for row in rows))
        figure, axes = plt.subplots(1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False)
        for axis, shape in zip(axes[0], shapes):
            draw_memory(axis, [row for row in rows if row["shape"] == shape], "peak_bytes")
            axis.set(title=shape, ylabel="peak, GiB beyond the model")
    else:
        groups, bars, columns = BARS[part]
        columns = [column for column in columns if any(row[column[0]] for row in rows)]  # no bytes on the CPU
        figure, axes = plt.subplots(1, len(columns), figsize=(9 * len(columns), 5), squeeze=False)
        for axis, (column, unit, factor) in zip(axes[0], columns):
            draw_bars(axis, rows, groups, bars, column, factor)
            axis.set(ylabel=unit)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(" ".join(filter(None, (part, rows[0]["card"], rows[0]["note"]))), fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    print(path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for part in (*BARS, "memory"):
        path = options.folder / f"gpu_{part}.csv"
        if path.exists():
            draw(path, part)


if __name__ == "__main__":
    main()
