"""PEFT's own tests for decoder models and configurations, unmodified, against PTE.

They come with the source distribution of the installed PEFT version. Two pytest plugins (`peft_suite/`) point them at
`PTEConfig` and at tiny models in a local Hub cache; tests of other methods are deselected.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

import peft_pte

PLUGINS = Path(__file__).parent / "peft_suite"
CACHE = Path(__file__).parents[1] / ".cache" / "peft_suite"
SUITES = ["tests/test_decoder_models.py", "tests/test_config.py"]
# 255 pass with PEFT 0.21.2, 236 with 0.20.0. Fewer than this means that something did not run.
MIN_PASSED = 225


@dataclass(frozen=True)
class Explained:
    """A skip that is right: the reason it gives, the tests it may come from, and why PTE does not need them."""

    reason: str  # a regular expression for the whole reason
    tests: str  # a regular expression for the test's name without parameters
    why: str


PTE = r"<class 'peft_pte\.config\.PTEConfig'>"
EXPLAINED = [
    Explained(
        r"PTE does not support merging adapters: .*",
        r"test_merge_layers\w*|test_safe_merge",
        "A S B differs from sequence to sequence, so there is no constant weight to merge.",
    ),
    Explained(
        r"Skip tests for Llama models because layers have no bias term",
        r"test_merge_layers\w*",
        "A check for BEFT that stands before the check for merging in upstream's merging tests, and hits every method.",
    ),
    Explained(
        r"PTE refuses reentrant gradient checkpointing, .*",
        r"test_training_decoders_gradient_checkpointing",
        "Reentrant checkpointing loses gradients through cached keys and values; test_peft_ported.py has the refusal.",
    ),
    Explained(
        r"Mixed adapter batches not supported for this config\.",
        r"test_mixed_adapter_batches|test_generate_with_mixed_adapter_batches",
        "Upstream runs these for LoRA only; PTE refuses `adapter_names` (test_peft_ported.py).",
    ),
    Explained(
        rf"Test not applicable for ({PTE}|PTEConfig\(.*)|Test does not work with model .*qwen2",
        r"test_weighted_combination_of_adapters",
        "Upstream runs it for LoRA and IA3 only; PTE refuses weighted adapters (test_peft_ported.py).",
    ),
    Explained(
        rf"Test not applicable for {PTE}",
        r"test_training_prompt_learning_tasks",
        "PTE is no prompt learning method: it has no virtual tokens.",
    ),
    Explained(
        rf"This test does not apply to {PTE}",
        r"test_prompt_tuning_\w+_prepare_for_training",
        "About the initialisation of prompt tuning.",
    ),
    Explained(
        r"This test is only for prompt learning methods\.",
        r"test_set_requires_grad_prompt_learning_raises",
        "PTE is no prompt learning method: `set_requires_grad` works (test_peft_ported.py).",
    ),
    Explained(
        rf"{PTE} does not support the 'bias' argument, skipping this test\.",
        r"test_adding_multiple_adapters_with_bias_raises",
        "PTE trains no biases of the base model, so adapters cannot disagree about them.",
    ),
]


@dataclass
class Results:
    """Outcomes of a run, from its JUnit report."""

    passed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (test without parameters, reason)
    failed: list[tuple[str, str]] = field(default_factory=list)  # (test, message); errors too

    @classmethod
    def read(cls, report: Path) -> Results:
        results = cls()
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "")
            bad = [element for tag in ("failure", "error") for element in case.findall(tag)]
            skip = case.find("skipped")
            if bad:
                results.failed.append((name, bad[0].get("message", "")))
            elif skip is not None:
                results.skipped.append((name.partition("[")[0], skip.get("message", "")))
            else:
                results.passed.append(name)
        return results

    def summary(self) -> str:
        """Counts, and the skips by test and reason with their explanations."""
        counts = f"{len(self.passed)} passed, {len(self.skipped)} skipped, {len(self.failed)} failed"
        lines = [f"PEFT {importlib.metadata.version('peft')} on PTE: {counts}"]
        entries = [(test, reason[:150], explain(test, reason)) for test, reason in self.skipped]
        for (test, reason, entry), count in sorted(Counter(entries).items(), key=str):
            lines += [f"  {count:3} x {test}: {reason}", f"        {entry.why if entry else 'NOT EXPLAINED'}"]
        return "\n".join(lines + [f"  failed: {name}: {message}" for name, message in self.failed])


def explain(test: str, reason: str) -> Explained | None:
    """The entry for a skip, if there is one."""
    matches = (e for e in EXPLAINED if re.fullmatch(e.tests, test) and re.fullmatch(e.reason, reason, re.DOTALL))
    return next(matches, None)


def source_of_peft() -> Path:
    """The unpacked source distribution of the installed PEFT version, from the cache or from the package index.

    Skips the calling test if it cannot be had.
    """
    version = importlib.metadata.version("peft")
    folder = CACHE / f"peft-{version}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        # pip asks the distribution for its metadata; with setuptools at hand it needs no environment of its own.
        isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
        download = ["-m", "pip", "download", "--no-deps", "--no-binary", "peft", *isolation, "--dest", temporary]
        try:
            subprocess.run(
                [sys.executable, *download, f"peft=={version}"], check=True, capture_output=True, text=True, timeout=300
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"pip could not download the source distribution of peft {version}: {error.stderr or error}")
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        (unpacked,) = (path for path in Path(temporary).iterdir() if path.is_dir())
        # Upstream's repository has this empty file, which the distribution lacks: the tests import their neighbours.
        (unpacked / "tests" / "__init__.py").touch()
        unpacked.rename(folder)
    return folder


def run_suites(source: Path, folder: Path) -> tuple[Results, str]:
    """Run the suites in a process of their own, with a fresh Hub in `folder`; returns the results and the output."""
    # PEFT's pytest settings ask for coverage, so use empty ones.
    settings, report = folder / "pytest.ini", folder / "report.xml"
    settings.write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    paths = [str(Path(peft_pte.__file__).parents[1]), str(PLUGINS), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PEFT_SUITE_HUB"] = str(folder / "hub")
    environment["OMP_NUM_THREADS"] = "1"
    arguments = ["-c", settings, "--rootdir", source, "--junit-xml", report, "-n", "2", "-q", "--tb", "short"]
    plugins = ["-p", "offline_hub", "-p", "conformance", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, arguments), *plugins, *SUITES],
        cwd=source,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if not report.exists():
        pytest.fail(f"pytest ended with {process.returncode} and no report:\n{process.stdout[-5000:]}")
    return Results.read(report), process.stdout


def test_pefts_own_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No failures, enough passes, and no skip without an explanation."""
    results, output = run_suites(source_of_peft(), tmp_path)
    with capsys.disabled():
        print("\n" + results.summary())
    assert not results.failed, output[-20000:]
    assert len(results.passed) >= MIN_PASSED, output[-5000:]
    assert not [skip for skip in results.skipped if explain(*skip) is None]
