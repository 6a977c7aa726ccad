"""A long generation: what the cache holds, what a token costs, and whether the replay of all of it is what was drawn.

    python benchmarks/long_generation.py                                             # 65,536 tokens, about 5 minutes
    python benchmarks/long_generation.py --device cuda --shapes qwen2.5-3b qwen2.5-7b llama-8b

Weights are random, tokens are drawn at temperature 1. What starts as zeros in an adapter (A, gates, taps of the
convolution) is drawn at `--std`: 0.01, unless told otherwise, is what 30 to 60 steps of training leave in SmolLM2's
(examples/warm_start.py, examples/evaluate_demo.py). A row for each mark: bytes that the sequence carries, milliseconds
a token, and norms of the states (of the layer where they are largest).
Time is that of windows of 512 tokens, evictions among them; the figure of a mark is the median of the last five windows
before it. On the CPU it is the thread's own time, which other programs disturb less. `difference` is the largest one
between the log-probabilities that were noted while decoding and `sequence_logprobs` of the whole sequence afterwards:
rounding, which states carry on, so that it grows with the length and with `--std`; `--dtype float64` tells it from a
fault.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory
import torch
from measuring import Results, is_out_of_time, synchronize
from peft import get_peft_model

from peft_pte import PTECache, PTEConfig, sequence_logprobs
from peft_pte.hooks.generation import SampledLogProbs, current_recorder

Add = Callable[[dict[str, Any]], None]

PROMPT, SPAN, SPANS, STD = 64, 512, 5, 0.01
MARKS = (3072, 16384, 65536)


def make_model(options: argparse.Namespace, shape: str) -> torch.nn.Module:
    base = memory.make_base(shape, options.device, options.layers)
    if options.dtype:
        base = base.to(getattr(torch, options.dtype))
    config = PTEConfig(task_type="CAUSAL_LM", window_size=options.window_size)
    model = get_peft_model(base, config, autocast_adapter_dtype=options.dtype is None).eval()
    for name, parameter in model.named_parameters():
        if "pte_" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=options.std)
    return model


def state_norms(cache: PTECache) -> dict[str, float]:
    """Frobenius norms of what is carried and of what is read, of the layer where they are largest."""
    layers = [(layer.cores["default"], layer.states["default"]) for layer in cache.layers]
    cores, states = ([torch.linalg.matrix_norm(x.float()).max().item() for x in kind] for kind in zip(*layers))
    return dict(core_norm=round(max(cores), 4), state_norm=round(max(states), 4))


class Watch:
    """A stopping criterion that never stops: the time of every span, and a row for `add` at every mark but the last."""

    def __init__(self, cache: PTECache, marks: tuple[int, ...], device: str, add: Add):
        self.cache, self.marks, self.device, self.add = cache, marks, device, add
        self.clock = time.perf_counter if device == "cuda" else time.thread_time
        self.spans: list[float] = []  # ms a token
        self.last: dict[str, Any] = {}  # the row of the last mark
        self.start = self.clock()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        generated = input_ids.shape[1] - PROMPT
        if generated % SPAN == 0:
            synchronize(self.device)
            now = self.clock()
            self.spans.append((now - self.start) / SPAN * 1e3)
            if generated in self.marks:
                step_ms = round(statistics.median(self.spans[-SPANS:]), 4)
                about = dict(tokens=generated, cache_bytes=self.cache.nbytes, ms_per_token=step_ms)
                self.last = about | state_norms(self.cache)
                if generated != self.marks[-1]:
                    self.add(self.last)
            self.start = self.clock()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate(model: torch.nn.Module, marks: tuple[int, ...], device: str, add: Add, graph: bool = False) -> None:
    """A row for each mark as it is reached, the last one with the difference to the replay."""
    cache = PTECache(cuda_graph=graph)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    watch, noted = Watch(cache, marks, device, add), SampledLogProbs(temperature=1.0)
    token = current_recorder.set(noted)
    try:
        drawn = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=marks[-1],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[watch],
        )
    finally:
        current_recorder.reset(token)
    replayed = sequence_logprobs(model, drawn, prompt_lengths=PROMPT)[0][0, PROMPT:]
    differences = (replayed.cpu() - torch.tensor(noted.rows([marks[-1]])[0])).abs()
    add(watch.last | dict(difference=float(f"{differences.max().item():.2e}")))


def add_row(results: Results, about: dict[str, Any], row: dict[str, Any]) -> None:
    results.add(about | row)


def measure_long(options: argparse.Namespace, results: Results) -> None:
    """A part of gpu.py, too. As many tokens as the longest of `--lengths` says."""
    marks = tuple(mark for mark in MARKS if mark < max(options.lengths)) + (max(options.lengths),)
    for shape in options.shapes:
        if is_out_of_time(options):
            return
        about: dict[str, Any] = dict(shape=shape, layers=options.layers or "all", window=options.window_size)
        about |= dict(dtype=options.dtype or "auto", std=options.std)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="PTE decodes without a CUDA graph")
            graph = options.device == "cuda" and options.graphs
            add = functools.partial(add_row, results, about)
            generate(make_model(options, shape), marks, options.device, add, graph)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(memory.SHAPES), default=["small"])
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--tokens", type=int, default=MARKS[-1], help=f"to generate, a multiple of {SPAN}")
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--std", type=float, default=STD, help="of what starts as zeros in an adapter")
    parser.add_argument("--dtype", choices=["float32", "float64"], help="of all; by default bfloat16, on a CPU float32")
    parser.add_argument("--output", type=Path, help="CSV file, if another than results/long_generation_<device>.csv")
    options = parser.parse_args()
    if options.tokens < SPAN or options.tokens % SPAN:
        parser.error(f"--tokens is {options.tokens}, but must be a multiple of {SPAN}")
    options.lengths, options.minutes, options.start = [options.tokens], float("inf"), time.time()
    options.graphs = True
    output = options.output or Path(__file__).parent / "results" / f"long_generation_{options.device}.csv"
    command = " ".join(["python", "benchmarks/long_generation.py", *sys.argv[1:]])
    if options.device == "cpu":
        torch.set_num_threads(1)
    measure_long(options, Results(output, memory.provenance(options.device, command)))


if __name__ == "__main__":
    main()
