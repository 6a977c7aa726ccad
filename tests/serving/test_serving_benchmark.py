"""benchmarks/rollouts.py: all arms run the same requests, and only a full cache grows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_rollouts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "rollouts.py"), "--output", str(tmp_path / "rows.csv")]
    command += ["--requests", "5", "--at-a-time", "2", "--window-size", "8", "--prompt", "3", "20"]
    command += ["--completion", "5", "30", "--lengths", "64", "1024"]
    job = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    with (tmp_path / "rows.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["generate, PTE", "vLLM, PTE", "vLLM, LoRA, full cache", "vLLM, base, full cache"]
    assert len({row["tokens"] for row in rows.values()}) == 1
    for arm, row in rows.items():
        assert float(row["tokens_per_second"]) > 0
        short, long = int(row["bytes_at_64"]), int(row["bytes_at_1024"])
        assert 0 < short < long if "full cache" in arm else 0 < short == long
    # The same slots and states; `generate` notes positions beside them, and vLLM aligns its pages.
    sizes = [int(rows[arm]["bytes_at_1024"]) for arm in ("generate, PTE", "vLLM, PTE")]
    assert max(sizes) < 1.1 * min(sizes)
