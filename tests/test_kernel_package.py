"""The folder `kernels/` is a kernel project for the Hub, and never a Python package of that name.

transformers imports the PyPI package `kernels`; a package of ours with that name would take its place.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "kernels"
PACKAGE = PROJECT / "torch-ext" / "peft_pte_kernels"


def test_folder_is_no_package() -> None:
    assert (PROJECT / "build.toml").exists()
    assert not list(PROJECT.glob("*.py")) and not list((PROJECT / "torch-ext").glob("*.py"))


def test_distribution_has_no_package_of_that_name() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = [
        name
        for where in settings["where"]
        for name in find_namespace_packages(ROOT / where, include=settings["include"])
    ]
    assert {name.split(".")[0] for name in found} == {"peft_pte", "peft_pte_kernels"}
    assert not any(name.split(".")[-1] == "kernels" for name in found)


def test_import_kernels_is_never_ours(tmp_path: Path) -> None:
    """From another folder nothing of ours is found; from this one transformers does not take the folder for it."""
    find = "import importlib.util as u, peft_pte; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    done = subprocess.run([sys.executable, "-c", find], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(ROOT / "kernels") not in done.stdout, done.stderr
    ask = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    answers = {
        subprocess.run([sys.executable, "-c", ask], cwd=folder, capture_output=True, text=True).stdout
        for folder in (ROOT, tmp_path)
    }
    assert answers in ({"True\n"}, {"False\n"})


def test_package_stands_alone() -> None:
    """The Hub serves it under a name of its own, so it imports itself relatively and nothing of peft_pte."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            allowed = {"__future__", "torch", "triton", *sys.stdlib_module_names}
            assert {name.split(".")[0] for name in names} <= allowed, path
