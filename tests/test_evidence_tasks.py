"""Every answer follows from what stands before it, and from nothing in the prompt: slow solvers read row by row."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams import Stream, SymbolTask, Task
from tasks import TASKS, Cycle, Multiplication, Recall, Rule110, Variables

every_task = pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, SymbolTask)])
TOKENS_OF_EVIDENCE = dict(
    recall=lambda pairs, queries: 2 * pairs,
    capacity=lambda pairs, queries: 2 * pairs,
    capacity32=lambda pairs, queries: 2 * pairs,
    variables=lambda variables, assignments, hops, queries, overwritten: 3 * assignments,
    multiplication=lambda digits: 2 * digits + 1 + digits * (digits + 2),
    cycle=lambda nodes, hops, queries: 2 * nodes,
    rule110=lambda width, steps: 2 * width,
)


def draw_difficulty(data: st.DataObject, name: str) -> dict[str, int]:
    def integer(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    if name in ("recall", "capacity", "capacity32"):
        return dict(pairs=integer(1, 32 if name == "capacity32" else 16), queries=integer(1, 8))
    if name == "variables":
        hops = integer(1, 6)
        assignments = integer(hops + 1, 16)
        rest = dict(hops=hops, queries=integer(1, 5), overwritten=integer(0, 100))
        return dict(variables=integer(max(3, hops), 8), assignments=assignments, **rest)
    if name == "multiplication":
        return dict(digits=integer(1, 9))
    if name == "cycle":
        hops = integer(1, 8)
        return dict(nodes=integer(hops + 1, 16), hops=hops, queries=integer(1, 5))
    return dict(width=integer(3, 32), steps=integer(1, 8))


def sample(name: str, seed: int, size: int = 8, distance: int = 5, **difficulty: int) -> Stream:
    return TASKS[name].sample(size, distance, torch.Generator().manual_seed(seed), **difficulty)


# ------------------------------------------------------------------------------------------------------------- solvers


def tracked(task: Variables, read: list[int]) -> tuple[dict[int, int], dict[int, int], Counter[int]]:
    """Value, depth and number of writes of each variable after the statements in `read`."""
    value: dict[int, int] = {}
    depth: dict[int, int] = {}
    writes: Counter[int] = Counter()
    for i, token in enumerate(read):
        if token in task.equals:
            left, right = read[i - 1], read[i + 1]
            assert left in task.names and left != right
            value[left], depth[left] = (right, 1) if right in task.values else (value[right], depth[right] + 1)
            writes[left] += 1
    return value, depth, writes


def edges(task: Cycle, read: list[int]) -> dict[int, int]:
    """Where each node leads to; the first number of hops stands behind the first question's node."""
    first = next(i for i, token in enumerate(read) if token in task.hops) - 1
    return dict(zip(read[:first:2], read[1:first:2]))


def digit_of_scratchpad(task: Multiplication, read: list[int]) -> int:
    """A digit of a partial product from the factors; of the result from the partial products and not the factors."""
    groups: list[list[int]] = [[]]
    for token in read:
        if token in task.digits:
            groups[-1].append(token - task.digits.start)
        else:
            groups.append([])
    first, second, *partials = groups
    if any(token in task.equals for token in read):
        *partials, unfinished = partials
        number = sum(number_of(partial) * 10**place for place, partial in enumerate(partials))
    else:
        unfinished = partials[-1]
        number = number_of(first) * second[len(partials) - 1]
    return task.digits.start + number // 10 ** len(unfinished) % 10


def number_of(digits: list[int]) -> int:
    return int("".join(map(str, reversed(digits))))


def solve(task: Task, read: list[int]) -> int:
    """The token that follows `read`: a stream up to an answer, without prompt and filler."""
    if isinstance(task, Recall):
        return read[read.index(read[-1]) + 1]
    if isinstance(task, Variables):
        return tracked(task, read)[0][read[-1]]
    if isinstance(task, Multiplication):
        return digit_of_scratchpad(task, read)
    if isinstance(task, Cycle):
        node, following = read[-2], edges(task, read)
        for _ in range(read[-1] - task.hops.start + 1):
            node = following[node]
        return node
    assert isinstance(task, Rule110)
    question = next(i for i, token in enumerate(read) if token in task.steps)
    places = read[:question:2]
    row = "".join(str(cell - task.cells.start) for cell in read[1:question:2])
    for _ in range(read[question] - task.steps.start + 1):
        around = row[-1] + row + row[0]
        row = "".join("0" if around[i : i + 3] in ("111", "100", "000") else "1" for i in range(len(row)))
    return task.cells.start + int(row[places.index(read[-1])])


# -------------------------------------------------------------------------------------------------------------- streams


@every_task
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**31), distance=st.integers(0, 12))
def test_answers_follow_from_what_precedes_them(name: str, data: st.DataObject, seed: int, distance: int) -> None:
    task, difficulty = TASKS[name], draw_difficulty(data, name)
    stream = sample(name, seed, 4, distance, **difficulty)
    for row, answers in zip(stream.input_ids.tolist(), stream.answers.tolist()):
        for t, is_answer in enumerate(answers):
            if is_answer:
                read = [token for token in row[task.prompt_length : t] if token not in task.filler]
                assert solve(task, read) == row[t]


@every_task
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**31), distance=st.integers(0, 12))
def test_layout(name: str, data: st.DataObject, seed: int, distance: int) -> None:
    """Prompt, evidence, `distance` tokens of filler, questions; what is scored stands among the questions' answers."""
    task, difficulty = TASKS[name], draw_difficulty(data, name)
    ids, answers, scored = sample(name, seed, 8, distance, **difficulty)
    assert ids.dtype == torch.long and answers.dtype == scored.dtype == torch.bool
    assert ids.shape == answers.shape == scored.shape and len(ids) == 8
    assert ids.min() > 0 and ids.max() < task.vocab_size  # 0 is padding
    assert (ids[:, : task.prompt_length] == task.prompt_token).all()
    assert (ids[:, task.prompt_length :] != task.prompt_token).all()
    question = task.prompt_length + TOKENS_OF_EVIDENCE[name](**difficulty) + distance
    is_filler = (ids >= task.filler.start) & (ids < task.filler.stop)
    columns = torch.arange(ids.shape[1])
    assert (is_filler == ((columns >= question - distance) & (columns < question))).all()
    assert not (answers & is_filler).any() and not answers[:, : task.prompt_length].any()
    assert not (scored & ~answers).any() and not scored[:, : question + 1].any()
    assert scored.any(1).all() and scored.sum(1).unique().numel() == 1
    assert answers[:, -1].all()  # nothing stands behind the last answer
    near = sample(name, seed, 8, 0, **difficulty)
    assert torch.equal(near.input_ids, ids[:, (columns < question - distance) | (columns >= question)])


@every_task
def test_a_seed_is_a_split(name: str) -> None:
    first, again, held_out = (sample(name, seed, 64).input_ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not set(map(tuple, first.tolist())) & set(map(tuple, held_out.tolist()))


@every_task
def test_chance_is_the_accuracy_of_a_uniform_guess(name: str) -> None:
    task, draw = TASKS[name], random.Random(0)
    ids, _, scored = sample(name, 0, 4000, 0)
    hits, answers = [], Counter[int]()
    for row, column in scored.nonzero()[:4000].tolist():
        answer = int(ids[row, column])
        if isinstance(task, Recall | Variables):
            possible = list(task.values)
        elif isinstance(task, Cycle):
            possible = [t for t in task.names[: task.difficulty["nodes"]] if t != int(ids[row, column - 2])]
        else:
            possible = list(task.digits if isinstance(task, Multiplication) else task.cells)
        assert answer in possible
        hits.append(draw.choice(possible) == answer)
        answers[answer] += 1
    noise = 4 * (task.chance() * (1 - task.chance()) / len(hits)) ** 0.5
    assert abs(sum(hits) / len(hits) - task.chance()) < noise
    if not isinstance(task, Multiplication | Rule110):  # whose answers are not uniform
        assert answers.most_common(1)[0][1] / len(hits) < task.chance() + noise


def test_chance_depends_on_the_nodes() -> None:
    assert TASKS["cycle"].chance(nodes=3) == 0.5


# ---------------------------------------------------------------------------------------------------------- difficulty


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_depth_and_overwriting_of_variables(data: st.DataObject, seed: int) -> None:
    task, difficulty = TASKS["variables"], draw_difficulty(data, "variables")
    assert isinstance(task, Variables)
    for share in (0, 100):
        difficulty["overwritten"] = share
        stream = sample("variables", seed, 8, 0, **difficulty)
        for row, answers in zip(stream.input_ids.tolist(), stream.answers.tolist()):
            _, depth, writes = tracked(task, row[task.prompt_length :])
            asked = [row[t - 1] for t, is_answer in enumerate(answers) if is_answer]
            assert depth[asked[0]] == difficulty["hops"]
            assert max(depth.values()) <= difficulty["hops"]
            kinds = {count > 1 for count in writes.values()}
            assert all((writes[name] > 1) == bool(share) for name in (asked if len(kinds) == 2 else asked[:1]))


def test_share_of_overwritten_variables() -> None:
    task = TASKS["variables"]
    assert isinstance(task, Variables)
    ids = sample("variables", 0, 2000, 0, overwritten=25, queries=1).input_ids[:, task.prompt_length :].tolist()
    share = sum(tracked(task, row)[2][row[-2]] > 1 for row in ids) / len(ids)
    assert abs(share - 0.25) < 0.04


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_one_cycle_and_its_hops(data: st.DataObject, seed: int) -> None:
    task, difficulty = TASKS["cycle"], draw_difficulty(data, "cycle")
    assert isinstance(task, Cycle)
    for row in sample("cycle", seed, 8, 0, **difficulty).input_ids[:, task.prompt_length :].tolist():
        following = edges(task, row)
        node, seen = row[0], set()
        while node not in seen:
            seen.add(node)
            node = following[node]
        assert len(seen) == len(following) == difficulty["nodes"]
        hops = [token - task.hops.start + 1 for token in row if token in task.hops]
        assert hops[0] == difficulty["hops"] == max(hops)


@pytest.mark.parametrize(
    ("name", "difficulty"),
    [
        ("recall", dict(pairs=17)),
        ("recall", dict(queries=0)),
        ("variables", dict(variables=2)),
        ("variables", dict(hops=5)),  # more than the 4 variables
        ("variables", dict(assignments=2)),
        ("variables", dict(overwritten=101)),
        ("multiplication", dict(digits=10)),
        ("cycle", dict(hops=8)),  # back at the node asked about
        ("cycle", dict(hops=0)),
        ("rule110", dict(steps=9)),
    ],
)
def test_impossible_difficulty(name: str, difficulty: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        sample(name, 0, **difficulty)


@every_task
def test_unknown_difficulty(name: str) -> None:
    with pytest.raises(TypeError, match="has no depth"):
        TASKS[name].chance(depth=3)
