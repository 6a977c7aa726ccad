"""Does the state carry thoughts, how far, and which rule does it best?

    python benchmarks/evidence --task recall                 # base, all arms, 5 seeds, on 2 CPU cores
    python benchmarks/evidence --task recall --arms PTE --seeds 3       # one cell again
    python benchmarks/evidence --task recall --candidates               # what differs from "PTE" in one choice
    python benchmarks/evidence --task recall --steps 600                # a table of its own
    python benchmarks/evidence --task recall --first-design             # as PTE was before, in results/first_design
    python benchmarks/evidence --task variables --rl                    # GRPO from a supervised start
    python benchmarks/evidence --task notes --seeds 0        # a real checkpoint: pip install -e ".[checkpoint]"
    python benchmarks/evidence --task recall --quick --output outputs/evidence   # minutes, to see that it runs
    python benchmarks/evidence --report                      # tables and figures from the committed results

A small Llama is trained with a full cache until it solves the task at every distance, and frozen; for notes and ledgers
it is SmolLM2-135M-Instruct, as it is, or for "ledger_taught" after it has learned ledgers with its full cache. Every
arm then gets the same data in the same order and the same number of steps. Rows go to `<output>/<task>.csv` as runs
end: runs that are there already are not repeated unless they are asked for by name, and a run that was killed goes on
from its last evaluation.
"""

from __future__ import annotations

import argparse
import csv
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arms import ARMS, CANDIDATES, FIRST_DESIGN, MAIN_ARMS
from oracle import run_oracle
from report import report
from shared import is_converted
from streams import SymbolTask
from tasks import TASKS
from training import Settings, make_base, run_arm

QUICK = dict(steps=20, base_steps=30, trained_distance=24, distances=(0, 24, 48), beyond=(64,), num_evaluated=32)
# What the tables in results/first_design were made with.
FIRST = dict(rank=16, scaling=1.0, steps=600, learning_rate=5e-3, beyond=())
RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows at once and under another name first, so that an interrupted run leaves the last table."""
    rows = sorted(rows, key=lambda row: (list(ARMS).index(row["arm"]), int(row["seed"])))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))  # older rows may tell less
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def run(options: argparse.Namespace) -> None:
    difficulty = tuple(options.difficulty)
    TASKS[options.task].completed(dict(difficulty))  # refuses what the task does not have
    settings = Settings.of(options.task, base_folder(options), difficulty)
    if options.first_design:
        settings = replace(settings, **FIRST)
    name = "_".join([*["rl"] * options.rl, options.task, *(f"{value}_{key}" for key, value in difficulty)])
    if options.quick:
        settings = replace(settings, **QUICK)
    if options.steps:
        settings, name = replace(settings, steps=options.steps), f"{name}_{options.steps}_steps"
    if options.hidden_size != settings.hidden_size:
        settings, name = replace(settings, hidden_size=options.hidden_size), f"{name}_hidden_{options.hidden_size}"
    settings = replace(settings, device=options.device, unfinished=options.base.with_name("evidence-unfinished"))
    if options.graphs:
        settings = replace(settings, graphs=True, distance_step=16)
    if options.evaluated:
        settings = replace(settings, num_evaluated=options.evaluated)
    if options.learning_rate:
        settings = replace(settings, learning_rate=options.learning_rate)
        name = f"{name}_learning_rate_{options.learning_rate}"
    if options.batch_size:
        settings = replace(settings, batch_size=options.batch_size)
        name = f"{name}_batch_size_{options.batch_size}"
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.csv"
    usual = ["PTE", *CANDIDATES] if options.candidates else list(MAIN_ARMS)
    if options.first_design:
        usual = [arm for arm in [*MAIN_ARMS, *FIRST_DESIGN] if arm != "PTE"]
    if options.rl:
        import rl  # not above: TRL takes seconds to import

        usual = rl.RL_ARMS
    wanted = [
        (arm, seed) for seed in options.seeds for arm in options.arms or usual if ARMS[arm].is_trained or not seed
    ]
    rows: list[dict[str, Any]] = read(path)
    if options.arms:
        rows = [row for row in rows if (row["arm"], int(row["seed"])) not in wanted]
    done = {(row["arm"], int(row["seed"])) for row in rows}
    # One process is this one.
    one = options.processes == 1
    with ThreadPoolExecutor(1) if one else ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        if not (settings.base / "config.json").exists():
            pool.submit(make_base, settings, options.checkpoint).result()

        def submit(arm: str, seed: int) -> Future[list[dict[str, Any]]]:
            if options.rl:
                start = settings if options.quick or options.steps else replace(settings, steps=rl.START_STEPS)
                grpo = rl.GRPO | TASKS[options.task].grpo | (rl.QUICK_GRPO if options.quick else {})
                return pool.submit(rl.run_rl, arm, seed, start, grpo)
            if ARMS[arm].adapter == "oracle":
                return pool.submit(run_oracle, arm, seed, settings)
            return pool.submit(run_arm, arm, seed, settings)

        for job in as_completed([submit(*run) for run in wanted if run not in done]):
            new = job.result()
            rows += new
            write(path, rows)
            print(f"{new[0]['arm']:<36} seed {new[0]['seed']}  {summary(new)}  {new[0]['seconds']} s", flush=True)


def base_folder(options: argparse.Namespace) -> Path:
    """Where the frozen base is, or will be."""
    if not isinstance(TASKS[options.task], SymbolTask):
        if options.hidden_size != 64:
            raise SystemExit(
                f"--hidden-size is of bases that are trained here; that of {options.task} is a checkpoint."
            )
        as_it_is = options.checkpoint and is_converted(options.checkpoint) and not TASKS[options.task].is_taught
        return options.checkpoint if as_it_is else options.base / options.task
    if options.checkpoint:
        raise SystemExit(f"--checkpoint is for notes and ledgers; the base of {options.task} is trained here.")
    if options.hidden_size < 64 or options.hidden_size % 64:
        raise SystemExit(f"--hidden-size is {options.hidden_size}, but must be a multiple of 64.")
    wider = f"_hidden_{options.hidden_size}" if options.hidden_size != 64 else ""
    return options.base / f"{options.task}{wider}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Accuracies when a run has ended."""
    last = [row for row in rows if row["step"] == max(row["step"] for row in rows) and not row.get("control")]
    return " ".join(f"{row['accuracy']:.2f}" for row in last if row["accuracy"] != "")


def item(text: str) -> tuple[str, int]:
    """`pairs=12` as a key and its value."""
    key, _, value = text.partition("=")
    return key, int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="these again, though they are there")
    parser.add_argument("--candidates", action="store_true", help="the arms that differ from PTE in one choice")
    parser.add_argument("--first-design", action="store_true", help="the arms and settings of results/first_design")
    parser.add_argument(
        "--rl", action="store_true", help="GRPO from a supervised start, of which --steps are the steps"
    )
    parser.add_argument("--difficulty", type=item, nargs="+", default=[], help="other than usual: pairs=12")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="of the arms' training, if others than usual")
    parser.add_argument("--learning-rate", type=float, help="of the arms' supervised training, if another than usual")
    parser.add_argument("--batch-size", type=int, help="of the arms' supervised training, if another than usual")
    parser.add_argument("--hidden-size", type=int, default=64, help="of the base; 1024 gives 30 to 40M parameters")
    parser.add_argument("--device", default="cpu", help="'cuda' with --processes 1 or few")
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs; distances are multiples of 16")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--report", action="store_true", help="only tables and figures of the results in --output")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder; usually that of the committed results")
    parser.add_argument("--base", type=Path, default=Path("outputs/evidence-base"), help="folder of bases")
    parser.add_argument("--checkpoint", type=Path, help="of notes: the wheel, or what is in it, or a converted folder")
    parser.add_argument("--evaluated", type=int, help="streams at each distance, if others than usual")
    options = parser.parse_args()
    options.output = options.output or (RESULTS / "first_design" if options.first_design else RESULTS)
    if bool(options.task) == options.report:
        parser.error("either --task or --report")
    if options.graphs and options.device == "cpu":
        parser.error("--graphs wants --device cuda")
    if options.task:
        run(options)
    report(options.output)


if __name__ == "__main__":
    main()
