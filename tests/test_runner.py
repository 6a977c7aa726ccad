"""`python -m peft_pte`: scripts, commands and modules that never heard of PTE."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from peft_pte.__main__ import main

ASK = """\
import sys
from peft import PeftType
print(PeftType.PTE.value, sys.argv[1:], __name__)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A script, a package, and two commands."""
    (tmp_path / "script.py").write_text(ASK)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(ASK)
    (tmp_path / "bin").mkdir()
    for name, text in (("command", f"#!{sys.executable}\n{ASK}"), ("shell", "#!/bin/sh\necho 1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    return tmp_path


def run(folder: Path, *arguments: str, launcher: tuple[str, ...] = ("-m", "peft_pte")) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, argv",
    [
        (["script.py", "--x", "-m"], ["--x", "-m"]),
        (["-m", "script", "--help"], ["--help"]),
        (["-m", "package", "-m", "1"], ["-m", "1"]),
        (["command", "launch"], ["launch"]),
    ],
)
def test_runs(folder: Path, arguments: list[str], argv: list[str]) -> None:
    done = run(folder, *arguments)
    assert done.stdout == f"PTE {argv} __main__\n", done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.py"], "there is no script and no command 'missing.py'"),
        (["shell"], "shell is not a Python script"),
        (["-m"], "-m needs the name of a module"),
        (["--fast"], "unknown option '--fast'"),
        (["accelerate", "launch", "script.py"], "Run `accelerate launch -m peft_pte script.py ...`"),
        (["torchrun", "script.py"], "Run `torchrun -m peft_pte script.py ...`"),
        (["-m", "torch.distributed.run", "script.py"], "Run `torchrun -m peft_pte script.py ...`"),
    ],
)
def test_refuses(folder: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / "bin"))
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert message in str(refusal.value)


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    assert capsys.readouterr().out.startswith("usage: python -m peft_pte script.py")


@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peft_pte"),
        ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "peft_pte"),
    ],
)
def test_launchers_run_it_in_every_process(folder: Path, launcher: tuple[str, ...]) -> None:
    done = run(folder, "script.py", "--x", launcher=launcher)
    count = 2 if "torch.distributed.run" in launcher else 1
    assert done.stdout.count("PTE ['--x'] __main__\n") == count, done.stderr
