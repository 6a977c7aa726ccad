"""`python -m peft_pte script.py args...`: run any script with the PEFT type registered."""

import os
import runpy
import sys

import peft_pte  # noqa: F401  (registers the PEFT type)

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m peft_pte script.py [arguments of the script]")
    sys.argv = sys.argv[1:]
    # As `python script.py` does, so that the script can import its neighbours.
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
