"""What PTE costs beside its arithmetic: operations that are dispatched, and the host's time. No GPU is needed.

    python benchmarks/overhead.py                                                       # a minute or two
    TRITON_INTERPRET=1 PTE_KERNELS=triton python benchmarks/overhead.py --no-times      # counts with kernels (slow)

A small model with many layers: its arithmetic takes next to no time, so what is measured grows with layers and not with
widths. Operations are counted as PyTorch dispatches them, views left aside; one of ours counts once. Times are CPU
times of the thread, medians; other programs on the machine disturb them, so eager arms take turns in one run and the
ratios count. A replayed step replays nothing here: what is left is the host's part.
Results: `benchmarks/results/overhead.csv`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from peft_pte import PTECache, PTEConfig
from peft_pte.cache import graph
from peft_pte.cache.step import DecodeStep

ROWS, PROMPT, WINDOW = 4, 12, 16  # 4 thoughts leave at once
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Operations that launch nothing: views, and memory that is not filled.
NO_LAUNCH = (
    *("view", "slice", "select", "unsqueeze", "squeeze", "expand", "transpose", "permute", "detach", "alias", "unbind"),
    *("_unsafe_view", "t", "narrow", "split", "lift_fresh", "as_strided", "empty", "new_empty", "empty_like"),
    *("_reshape_alias", "split_with_sizes", "unfold"),
)


class Count(TorchDispatchMode):
    """The operations inside that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.by_name[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.by_name.total()


def counted(call: Callable[[], Any]) -> int:
    with Count() as count:
        call()
    return count.total


def base(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **sizes, **tokens)).eval()


def with_pte(layers: int, **settings: Any) -> torch.nn.Module:
    config = dict(task_type="CAUSAL_LM", r=8, window_size=WINDOW, init_weights=False) | settings
    return get_peft_model(base(layers), PTEConfig(**config)).eval()


def with_lora(layers: int) -> torch.nn.Module:
    return get_peft_model(base(layers), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=PROJECTIONS)).eval()


class Nothing:
    """Stands for a CUDA graph."""

    def replay(self) -> None:
        """Leaves the host's part of the step."""


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Steps are captured and replayed without a GPU, from the first one on; a replay computes nothing."""
    capture = DecodeStep.capture

    def capture_nothing(step: DecodeStep) -> None:
        capture(step)
        step.graph = Nothing()

    with (
        patch.object(graph, "can_replay", lambda device: True),
        patch.object(graph, "EAGER_STEPS", 0),
        patch.object(DecodeStep, "capture", capture_nothing),
        patch.object(PTECache, "cuda_graph", True),
    ):
        yield


def stepper(model: torch.nn.Module, cache: Any = None, padded: bool = False) -> Callable[[], None]:
    """After the prompt: a function that decodes one token."""
    mask = torch.ones(ROWS, PROMPT, dtype=torch.long)
    mask[0, :3] = 1 - padded
    given = dict(attention_mask=mask if padded else None, use_cache=True)
    cache = model(input_ids=torch.full((ROWS, PROMPT), 5), past_key_values=cache, **given).past_key_values
    token = torch.full((ROWS, 1), 5)

    def step() -> None:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        model(input_ids=token, attention_mask=mask if padded else None, past_key_values=cache)

    return step


@torch.no_grad()
def operations_of_an_eviction(layers: int) -> int:
    """Of the step with the second eviction, beyond those of the step before it."""
    step = stepper(with_pte(layers), PTECache(cuda_graph=False))
    for _ in range(WINDOW + 3):
        step()
    before = counted(step)
    return counted(step) - before


@torch.no_grad()
def operations_of_a_replayed_step(layers: int, padded: bool) -> int:
    """Beside the graph, in a loop of one's own; the language-model head is one of them."""
    with replaying():
        step = stepper(with_pte(layers, window_size=64), PTECache(), padded)
        step()
        step()
        return counted(step)


def operations_of_a_segment(layers: int) -> tuple[int, int]:
    """Forward and backward of one more segment of a training step."""
    model = with_pte(layers).train()

    def run(length: int) -> tuple[int, int]:
        ids = torch.full((ROWS, length), 5)
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        loss = []
        forward = counted(lambda: loss.append(model(input_ids=ids, labels=labels).loss))
        return forward, counted(loss[0].backward)

    num_evicted = WINDOW // 4
    shorter, longer = (run(PROMPT + WINDOW + count * num_evicted) for count in (3, 4))
    return longer[0] - shorter[0], longer[1] - shorter[1]


def median_times(steps: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Microseconds of the thread for each function; they take turns."""
    times = collections.defaultdict(list)
    for _ in range(count + 5):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            times[name].append(time.thread_time() - start)
    return {name: statistics.median(values[5:]) * 1e6 for name, values in times.items()}


def generation_times(model: torch.nn.Module, padded: bool, count: int) -> float:
    """Median of the decoder's time for a token inside of `generate`."""
    times, kind = [], type(model.get_base_model())

    def timed(top: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        result = torch.nn.Module.__call__(top, *args, **kwargs)
        times.append(time.thread_time() - start)
        return result

    mask = torch.ones(ROWS, PROMPT, dtype=torch.long)
    mask[0, :3] = 1 - padded
    with patch.object(kind, "__call__", timed):
        model.generate(
            input_ids=torch.full((ROWS, PROMPT), 5),
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
        )
    return statistics.median(times[5:]) * 1e6


@torch.no_grad()
def measure_times(layers: int, add: Callable[[str, float, str], None], count: int) -> None:
    wide = with_pte(layers, window_size=1024)
    arms = {"base": stepper(base(layers)), "LoRA": stepper(with_lora(layers))}
    arms["PTE"] = stepper(wide, PTECache(cuda_graph=False))
    times = median_times(arms, count)
    for name, value in times.items():
        add(f"eager step, {name}", value, "us")
    for name in ("LoRA", "PTE"):
        add(f"eager step beyond the base, {name}", (times[name] - times["base"]) / layers, "us a layer")
    add("eager step beyond the base, PTE / LoRA", (times["PTE"] - times["base"]) / (times["LoRA"] - times["base"]), "")
    with replaying():
        for padded in (False, True):
            kind = "padded" if padded else "whole"
            own = median_times({"": stepper(wide, PTECache(), padded)}, count)[""]
            add(f"replayed step in a loop of one's own, {kind}", own, "us")
            add(f"replayed step in generate, {kind}", generation_times(wide, padded, count), "us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=60, help="of which a time is the median")
    parser.add_argument("--no-times", action="store_true", help="only what does not depend on the machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overhead.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    rows: list[dict[str, Any]] = []

    def add(what: str, value: float, unit: str) -> None:
        value = round(value, 2)
        rows.append(dict(what=what, value=value, unit=unit, layers=options.layers, commit=commit, versions=versions))
        print(f"{what}: {value} {unit}", flush=True)

    add("an eviction, beyond a step", operations_of_an_eviction(options.layers), "operations")
    for padded in (False, True):
        value = operations_of_a_replayed_step(options.layers, padded)
        add(f"a replayed step, beside the graph, {'padded' if padded else 'whole'}", value, "operations")
    forward, backward = operations_of_a_segment(options.layers)
    add("a training segment, forward", forward / options.layers, "operations a layer")
    add("a training segment, backward", backward / options.layers, "operations a layer")
    if not options.no_times:
        measure_times(options.layers, add, options.steps)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
