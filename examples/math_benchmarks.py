"""Problems with answers: the mathematics benchmarks by name, a file of one's own, made-up ones; and what grades them.

    python examples/math_benchmarks.py --count 50 --seed 0 --output problems.jsonl      # easy word problems

A line of such a file has "problem", "answer", and "solution", which evaluations leave alone: adapters may be trained
on the problems of another seed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """Where a benchmark is on the Hub, and the columns of problem and answer; `config`: of `load_dataset`."""

    path: str
    split: str
    problem: str
    answer: str
    count: int
    config: str | None = None


class Problem(NamedTuple):
    problem: str
    answer: str


# The names are also those of the task files in benchmarks/lm_eval.
BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer", 30),
    "amc23": Benchmark("math-ai/amc23", "test", "question", "answer", 40),
    "olympiadbench": Benchmark(  # open-ended, text only, in English
        "Hothan/OlympiadBench", "train", "question", "final_answer", 674, "OE_TO_maths_en_COMP"
    ),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer", 272),
}


# ------------------------------------------------------------------------------------------------------------- loading


def load_problems(name: str, limit: int | None = None) -> list[Problem]:
    """The problems of a benchmark or of a file of JSON lines; the first `limit` of them.

    Raises:
        SystemExit: the name is neither, or a row has no problem or no answer.
    """
    if name in BENCHMARKS:
        from datasets import load_dataset

        benchmark = BENCHMARKS[name]
        rows: Iterable[Any] = load_dataset(benchmark.path, benchmark.config, split=benchmark.split)
        where, columns = f"{benchmark.path}, row", (benchmark.problem, benchmark.answer)
    elif Path(name).is_file():
        rows, where, columns = read_json_lines(Path(name)), f"{name}, line", ("problem", "answer")
    else:
        raise SystemExit(f"{name!r} is neither a file of JSON lines nor one of {', '.join(BENCHMARKS)}.")
    problems = []
    for number, row in enumerate(rows, start=1):
        values = [row.get(column) if isinstance(row, dict) else None for column in columns]
        if any(value is None or value == "" or value == [] for value in values):
            raise SystemExit(f"{where} {number}: needs {columns[0]!r} and {columns[1]!r}.")
        problems.append(Problem(str(values[0]), answer_text(values[1])))
    if not problems:
        raise SystemExit(f"{name}: has no problems.")
    return problems[:limit]


def read_json_lines(path: Path) -> list[Any]:
    """Raises `SystemExit` with the number of a line that is no JSON."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}: no JSON: {error}.") from error
    return rows


def answer_text(answer: Any) -> str:
    """An answer without dollar signs; OlympiadBench has lists of them. AMC has floats, all of them whole numbers."""
    if isinstance(answer, list):
        return ", ".join(map(answer_text, answer))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer).strip().strip("$").strip()


def digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- grading


def require_grader() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise SystemExit("Grading needs math-verify: pip install math-verify (or -e '.[evaluate]').")


@lru_cache(maxsize=4096)
def parsed_answer(answer: str) -> tuple[Any, ...]:
    """What math-verify reads in a right answer; nothing if it cannot."""
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{answer}}}"))


def is_right(answer: str, completion: str) -> bool:
    """Whether math-verify finds in the completion what equals the answer; it looks for `\\boxed{}` first."""
    from math_verify import parse, verify

    return bool(verify(list(parsed_answer(answer)), parse(completion)))


# ------------------------------------------------------------------------------------------------------ made-up ones


NAMES = {"Tom": "He", "Anna": "She", "Ben": "He", "Clara": "She", "Omar": "He", "Lucy": "She"}
THINGS = ("apples", "marbles", "stamps", "shells", "books", "coins")
MORE, LESS = ("buys", "finds", "gets"), ("loses", "sells", "gives away")


def made_up(rng: random.Random) -> dict[str, str]:
    """A word problem of one or two steps with numbers below a hundred, and its solution."""
    name, thing, count = rng.choice(list(NAMES)), rng.choice(THINGS), rng.randint(5, 20)
    story, solution = [f"{name} has {count} {thing}."], []
    for _ in range(rng.randint(1, 2)):
        grows = count < 5 or rng.random() < 0.6
        change = rng.randint(2, 12) if grows else rng.randint(1, count - 1)
        after = count + (change if grows else -change)
        story.append(f"{NAMES[name]} {rng.choice(MORE if grows else LESS)} {change}{' more' if grows else ''}.")
        solution.append(f"{count} {'+' if grows else '-'} {change} = {after}.")
        count = after
    story.append(f"How many {thing} does {name} have now?")
    solution.append(f"\\boxed{{{count}}}")
    return dict(problem=" ".join(story), answer=str(count), solution=" ".join(solution))


def make_up(count: int, seed: int) -> list[dict[str, str]]:
    """`count` different problems."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        row = made_up(rng)
        rows[row["problem"]] = row
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    if options.count < 1:
        parser.error(f"--count is {options.count}, but must be at least 1")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(row) + "\n" for row in make_up(options.count, options.seed)))


if __name__ == "__main__":
    main()
