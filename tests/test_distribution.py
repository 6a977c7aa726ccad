"""What the package index shows and what it installs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from peft_pte import host

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "kernels/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
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


def test_the_wheel_holds_all_modules_and_their_types(tmp_path: Path) -> None:
    """Every module of both packages, each with its `py.typed`, and nothing at the top level but these."""
    pytest.importorskip("setuptools", minversion="77", reason="what pyproject.toml builds the wheel with")
    tree = tmp_path / "tree"
    parents = {"peft_pte": ROOT, "peft_pte_kernels": ROOT / "kernels" / "torch-ext"}
    expected = set()
    for name, parent in parents.items():
        shutil.copytree(parent / name, tree / parent.relative_to(ROOT) / name)
        expected |= {path.relative_to(parent).as_posix() for path in (parent / name).rglob("*.py")}
        expected.add(f"{name}/py.typed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document: str) -> None:
    names = re.findall(
        r"(?<![\w/.])((?:benchmarks|docs|examples|kernels|peft_pte|tests)/[\w/.-]*\w)", (ROOT / document).read_text()
    )
    assert [name for name in names if not (ROOT / name).exists()] == []
