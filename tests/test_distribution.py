"""What the package index shows and what it installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peft_pte import host

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_readme_has_no_relative_links() -> None:
    """They lead nowhere on the package index, where the README is the page of the project."""
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert targets and all(target.startswith("https://") for target in targets)


def test_versions_are_said_alike_everywhere() -> None:
    dependencies = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    for name, oldest in host.OLDEST.items():
        assert min(s.version for s in dependencies[name]) in (oldest, oldest.removesuffix(".0"))
        newest = (ROOT / "constraints-newest.txt").read_text()
        assert f"{name}=={host.NEWEST_TRIED[name]}\n" in newest
        assert f'"{name}=={oldest}"' in (ROOT / "noxfile.py").read_text()
    pythons = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 14) if f"3.{minor}" in supported] == pythons


def test_triton_is_pinned_nowhere() -> None:
    """A torch for CUDA wants exactly one version of it, and each torch another."""
    for name in ("constraints.txt", "constraints-newest.txt"):
        assert "triton==" not in (ROOT / name).read_text()
