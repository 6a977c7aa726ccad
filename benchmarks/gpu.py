"""Everything that is to be run on a GPU, in one command and in the order of importance.

    python benchmarks/gpu.py                                   # about 10 minutes on one GPU
    python benchmarks/gpu.py --only kernels encode             # some parts; memory and long take the longest
    python benchmarks/gpu.py --device cpu --shapes small --lengths 1024 2048   # the same path without a GPU
    python benchmarks/plot.py                                  # pictures of what there is

Correctness comes first, of kernels and then of models, and nothing is measured if it fails; where only CUDA graphs do,
decoding is measured without them. Results go to `benchmarks/results/gpu_<part>.csv` row by row, so that an interrupted
run keeps what it has; each row names card, versions, commit and command. A measurement that fails is a row with its
error, and the next one goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import memory
import torch
from gpu_checks import check_kernels, check_models
from gpu_kernels import measure_apply, measure_encode
from gpu_models import measure_decode, measure_memory, measure_train
from long_generation import STD, measure_long
from measuring import Results
from packaging.version import Version

from peft_pte.cache import snapshot
from peft_pte_kernels import dispatch

CHECKS = {"kernels": check_kernels, "correctness": check_models}
MEASUREMENTS = {
    "encode": measure_encode,
    "apply": measure_apply,
    "decode": measure_decode,
    "train": measure_train,
    "memory": measure_memory,
    "long": measure_long,
}


def provenance(options: argparse.Namespace) -> dict[str, str]:
    """Where figures come from."""
    about = memory.provenance(options.device, " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]))
    if dispatch.HAS_TRITON:
        import triton

        about["triton"] = triton.__version__
    note = "" if options.device == "cuda" else "smoke test without a GPU, times say nothing"
    return about | dict(kernels=dispatch.MODE, note=note)


def main() -> None:
    parts = [*CHECKS, *MEASUREMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-3b", "llama-8b", "qwen2.5-7b"])
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[3072, 8192, 16384, 32768, 65536],
        help="for memory; the last one for long",
    )
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing new is begun after that")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--layers", type=int, help="for long: fewer than the shape has")
    options = parser.parse_args()
    options.start = time.time()
    if options.device == "cuda":
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
        # Float32 checks compare with full precision, not with TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        # A failing capture breaks an old torch, so the package makes none there; this process can be run again.
        snapshot.SAFE_TO_FAIL = Version("0")
    about = provenance(options)
    options.output.mkdir(parents=True, exist_ok=True)
    checked = Results(options.output / "gpu_correctness.csv", about)
    options.std, options.dtype = STD, None  # for long
    options.graphs = True  # until they are found to be wrong
    if not all([check(options, checked) for part, check in CHECKS.items() if part in options.only]):
        raise SystemExit("correctness failed: nothing is measured")
    failed = [] if options.graphs else ["CUDA graphs"]
    for part, measure in MEASUREMENTS.items():
        if part not in options.only:
            continue
        results = Results(options.output / f"gpu_{part}.csv", about)
        results.run(measure, options)
        failed += [part] * results.has_failed
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
