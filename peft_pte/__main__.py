"""`python -m peft_pte [-m module | script.py | command] ...`: run a program with the PEFT type "PTE" registered."""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import sys
from typing import NoReturn

import peft_pte  # noqa: F401  (registers the PEFT type)

USAGE = """\
usage: python -m peft_pte script.py [arguments]      a Python script
       python -m peft_pte command [arguments]        a command that is a Python script, such as lm_eval or transformers
       python -m peft_pte -m module [arguments]      a module, as `python -m module` runs it

Runs a program that does not `import peft_pte` itself, with the PEFT type "PTE" registered; otherwise PEFT answers
KeyError: 'PTE' where an adapter is loaded. Launchers start processes of their own, which need it in turn:

       accelerate launch -m peft_pte script.py [arguments]
       torchrun --nproc-per-node 2 -m peft_pte script.py [arguments]
"""

# Commands and modules that start other processes: what is registered here does not reach them.
LAUNCHERS = {
    "accelerate": "accelerate launch -m peft_pte script.py",
    "accelerate.commands.launch": "accelerate launch -m peft_pte script.py",
    "torchrun": "torchrun -m peft_pte script.py",
    "torch.distributed.run": "torchrun -m peft_pte script.py",
    "torch.distributed.launch": "torchrun -m peft_pte script.py",
    "deepspeed": "deepspeed --module peft_pte script.py",
}
# What PTE adds to programs that have a registry of their own.
EXTENSIONS = {"lm_eval": "peft_pte.lm_eval"}


def fail(message: str) -> NoReturn:
    sys.exit(f"python -m peft_pte: {message}")


def refuse_launcher(name: str, arguments: list[str]) -> None:
    if name in LAUNCHERS and not (name == "accelerate" and arguments[:1] != ["launch"]):
        fail(f"{name} starts processes of its own, where PTE would not be registered. Run `{LAUNCHERS[name]} ...`.")


def extend(name: str) -> None:
    """Import what PTE adds to a program."""
    extension = EXTENSIONS.get(name.partition(".")[0].replace("-", "_"))
    if extension is not None:
        importlib.import_module(extension)


def find_script(name: str) -> str:
    """The path of a script, or of a command that is one."""
    if os.path.isfile(name):
        return name
    # Those of this Python's own environment first, whether it is activated or not.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    command = None if os.sep in name else shutil.which(name, path=path)
    if command is None:
        fail(f"there is no script and no command {name!r}. `python -m peft_pte --help` shows the usage.")
    with open(command, "rb") as file:
        if b"python" not in file.readline(200):
            fail(f"{command} is not a Python script, so nothing can be registered in it.")
    return command


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "-m":
        if len(arguments) < 2:
            fail("-m needs the name of a module.")
        _, module, *rest = arguments
        refuse_launcher(module, rest)
        extend(module)
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    if arguments[0].startswith("-"):
        fail(f"unknown option {arguments[0]!r}.\n{USAGE}")
    name = os.path.splitext(os.path.basename(arguments[0]))[0]
    is_command = not arguments[0].endswith(".py")
    if is_command:
        refuse_launcher(name, arguments[1:])
    script = find_script(arguments[0])
    if is_command:
        extend(name)
    sys.argv = [script, *arguments[1:]]
    # As `python script.py` does, so that the script can import its neighbours.
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
