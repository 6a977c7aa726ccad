"""The rooms of the package, and the one direction in which they know of each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_pte"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# From what stands on its own to what stands on everything; a room is one entry, and has an order of its own below.
LEVELS = [
    ["compiling", "registration", "model_card", "rotary"],
    ["host", "config"],
    ["layer", "families"],
    ["encoder"],
    ["stacked", "start"],
    ["cache"],
    ["replay"],
    ["hooks"],
    ["model", "static"],
    ["pretrained"],
    ["__init__"],
    ["lm_eval", "vllm"],
    ["trainers"],
    ["__main__", "trl", "checkpoints"],  # the last two: old names of parts of `trainers`
]
ROOMS = {
    "cache": [
        *(["schedule", "slots", "flash"], ["rows"], ["layers"], ["cache"]),
        *(["eviction", "snapshot", "__init__"], ["twin"], ["step"], ["graph"]),
    ],
    "replay": [
        ["layout", "chunks", "checkpointing", "__init__"],
        ["heads"],
        ["segments"],
        ["truncated", "distillation"],
        ["transfer"],
        ["replay"],
    ],
    "hooks": [
        ["window", "border", "calls", "attention", "__init__"],
        ["attachment"],
        ["decoder", "generation"],
        ["attach"],
    ],
    "trainers": [["checkpoints", "rows", "rollouts", "__init__"], ["grpo", "prompts", "distillation"]],
    "vllm": [["folder", "plan"], ["metadata", "attention", "plugin", "update"], ["models", "colocated", "__init__"]],
}


def level(levels: list[list[str]], name: str) -> int:
    return next(index for index, names in enumerate(levels) if name in names)


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports anywhere in it, for type checkers only or not."""
    found = set()
    folder = path.parent.parts
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - (node.level - 1)]
            module = (*base, *(node.module.split(".") if node.module else ()))
            # `from . import name` and `from .room import name` may name a module or what is in one.
            for alias in node.names:
                inner = (*module, alias.name)
                is_module = (PACKAGE / Path(*inner)).is_dir() or (PACKAGE / Path(*inner)).with_suffix(".py").exists()
                found.add(inner if is_module else module)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] == "peft_pte":
                    found.add(tuple(name.split(".")[1:]) or ("__init__",))
    return {module or ("__init__",) for module in found}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    """Strictly down between levels and rooms, so that there is no circle, not even for type checkers."""
    own = path.with_suffix("").parts
    for module in imported(path):
        if len(own) == 2 and module[0] == own[0]:  # inside a room
            target = module[1] if len(module) == 2 else "__init__"
            assert level(ROOMS[own[0]], target) < level(ROOMS[own[0]], own[1]), f"{path} imports {module}"
        else:
            assert level(LEVELS, module[0]) < level(LEVELS, own[0]), f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short(path: Path) -> None:
    assert len((PACKAGE / path).read_text().splitlines()) <= 400


def test_the_rule_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads: relative and absolute imports, those in functions, and those for type checkers only."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "eviction.py").touch()
    (tmp_path / "cache" / "cache.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from .eviction import evict\n"
        "def f():\n    import peft_pte.replay.heads\n    from ..model import PTEModel\n    from . import eviction\n"
    )
    monkeypatch.setattr("test_architecture.PACKAGE", tmp_path)
    assert imported(Path("cache/cache.py")) == {("cache", "eviction"), ("replay", "heads"), ("model",)}


@pytest.mark.parametrize("old, new", [("trl", "trainers.grpo"), ("checkpoints", "trainers.checkpoints")])
def test_old_names_say_where_they_moved(old: str, new: str) -> None:
    import importlib
    import sys

    sys.modules.pop(f"peft_pte.{old}", None)
    with pytest.warns(FutureWarning, match=f"peft_pte.{new}"):
        module = importlib.import_module(f"peft_pte.{old}")
    for name in module.__all__:
        assert getattr(module, name) is getattr(importlib.import_module(f"peft_pte.{new}"), name)
