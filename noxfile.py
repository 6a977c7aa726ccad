"""The versions that the package is tried on: `make test-matrix`, or one row: `nox -s newest`.

Each row runs a core selection (decoding, replay, training, round trips, errors) in an environment of its own; the whole
suite is `make test`. The oldest versions stand in pyproject.toml and here, those of `make test` in constraints.txt, the
newest that were tried in constraints-newest.txt.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CORE = [
    "tests/test_host.py",
    "tests/test_policy.py",
    "tests/test_state.py",
    "tests/test_generate.py",
    "tests/test_training.py",
    "tests/test_roundtrip.py",
    "tests/test_errors.py",
    "tests/test_errors_of_calls.py",
]
# Of what is tested, for the line that says what is newer.
WATCHED = ("torch", "transformers", "peft", "accelerate", "trl", "huggingface-hub", "safetensors", "tokenizers")
OLDEST = ["transformers==5.16.1", "peft==0.20.0"]

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

# Pythons of pyenv are found whether they are activated or not.
VERSIONS = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
PYENV = sorted(VERSIONS.glob("3.*/bin"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)])
os.environ["PATH"] = os.pathsep.join([*map(str, reversed(PYENV)), os.environ["PATH"]])


def install(session: nox.Session, constraints: str | Path, *arguments: str) -> None:
    """`pip install` under a file of constraints, which takes the place of any that the machine's configuration has."""
    session.install(*arguments, env={"PIP_CONSTRAINT": str(constraints)})


def run_core(session: nox.Session, python: str = "python") -> None:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    session.run(python, "-m", "pytest", "-n", "2", "--dist", "worksteal", *CORE, env=environment)


@nox.session(python="3.11")
def oldest(session: nox.Session) -> None:
    """The oldest transformers and PEFT that are supported."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    keep = [line for line in pinned if line.startswith(("torch==", "pytest", "hypothesis"))]
    constraints.write_text("\n".join([*keep, *OLDEST]))
    install(session, constraints, "torch")
    install(session, constraints, "-e", ".[matrix]")
    run_core(session)


@nox.session(python="3.11")
def pinned(session: nox.Session) -> None:
    """What `make test` has."""
    install(session, ROOT / "constraints.txt", "torch")
    install(session, ROOT / "constraints.txt", "-e", ".[matrix]")
    run_core(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest of all that was tried."""
    install(session, ROOT / "constraints-newest.txt", "-e", ".[matrix,trl]")
    run_core(session)


@nox.session(python="3.13", venv_backend="none")
def latest(session: nox.Session) -> None:
    """What has come out since: reported in a line, and never a failure. In the environment of `newest`."""
    python = str(ROOT / ".nox" / "newest" / "bin" / "python")

    def versions() -> dict[str, str]:
        listed = session.run(python, "-m", "pip", "list", "--format=freeze", silent=True, log=False).splitlines()
        return dict(line.split("==", 1) for line in listed if line.partition("==")[0] in WATCHED)

    try:
        before = versions()
        upgrade = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager", *WATCHED]
        session.run(*upgrade, env={"PIP_CONSTRAINT": os.devnull})
        newer = [f"{name} {before.get(name)} -> {now}" for name, now in versions().items() if before.get(name) != now]
    except nox.command.CommandFailed:
        session.log("latest: the newest releases could not be installed")
        return
    if not newer:
        session.log("latest: nothing is newer than constraints-newest.txt")
        return
    try:
        run_core(session, python)
        verdict = "passes"
    except nox.command.CommandFailed:
        verdict = "FAILS"
    session.log(f"latest: {', '.join(newer)}: {verdict}")
