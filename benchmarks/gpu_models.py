"""Whole decoding steps and training steps against PEFT's LoRA, and memory against length; weights are random."""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import memory
import torch
from captured import CapturedSteps
from measuring import Peak, Results, is_out_of_time, plain_torch, synchronize
from transformers.cache_utils import Cache, CacheLayerMixin

from peft_pte import PTECache, sequence_logprobs

Step = Callable[[], Any]


# ------------------------------------------------------------------------------------------------------------ decoding


class FixedLayer(CacheLayerMixin):
    """Slots of one layer of which the last is written anew at every step: a step at a given length, without growth."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


def fixed_cache(config: Any, batch: int, slots: int, device: str, dtype: torch.dtype) -> Cache:
    shape = batch, config.num_key_value_heads, slots, config.hidden_size // config.num_attention_heads
    layers = [
        FixedLayer(*(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)))
        for _ in range(config.num_hidden_layers)
    ]
    return Cache(layers=layers)


def lora_step(model: torch.nn.Module, batch: int, slots: int, device: str, graph: bool) -> Step:
    """A step of LoRA with `slots` stored, the new token among them."""
    cache = fixed_cache(model.config, batch, slots, device, next(model.parameters()).dtype)
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    positions = torch.full_like(ids, slots - 1)

    def step() -> Any:
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits

    if not graph:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step.output = step()  # what a graph writes has to stay
    return captured.replay


def pte_step(model: torch.nn.Module, batch: int, window: int, device: str, graph: bool) -> Step:
    """A step of PTE whose window is full; every call takes another token."""
    cache = PTECache(cuda_graph=graph)
    for length in (memory.PROMPT, window):
        ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def decode_arms(window: int, full: int, graphs: bool) -> Iterator[tuple[str, str, bool, int]]:
    """(arm, adapter, whether as a CUDA graph, slots in use on average)."""
    slots = memory.PROMPT + window - window // 8  # a quarter of the window leaves at once
    for graph in (True, False) if graphs else (False,):
        launched = "graph" if graph else "eager"
        yield f"PTE, {launched}", "full", graph, slots
        yield f"LoRA, same number of slots, {launched}", "lora", graph, slots
        yield f"LoRA, {full} slots, {launched}", "lora", graph, full


def measure_decode(options: argparse.Namespace, results: Results) -> None:
    """One token for every row, and the host waits for it, as when a token is drawn.

    `step_ms` is the median; `mean_ms` has PTE's evictions in it, over as many steps as there are between two. The peak
    is beyond the model's own memory.
    """
    device, window = options.device, options.window_size
    full, batches, most = (8192, (1, 16), window // 4) if device == "cuda" else (512, (1,), 4)
    for shape in options.shapes:
        arms = sorted(
            decode_arms(window, full, device == "cuda" and options.graphs), key=lambda arm: arm[1]
        )  # one model after the other
        model, adapter = None, ""
        for arm, wanted, graph, slots in arms:
            if is_out_of_time(options):
                return
            if wanted != adapter:
                model = run = None  # the last one goes first
                gc.collect()
                model, adapter = memory.make_model(shape, wanted, False, window, device).eval(), wanted
            for batch in batches:
                make, size = (pte_step, window) if adapter == "full" else (lora_step, slots)
                steps = most if adapter == "full" and graph else min(most, 32)

                def run(model=model, make=make, batch=batch, size=size, graph=graph, steps=steps) -> dict[str, Any]:
                    with warnings.catch_warnings(), torch.inference_mode(), Peak(device) as peak:
                        warnings.filterwarnings("error", message="PTE decodes without a CUDA graph")
                        times = step_times(make(model, batch, size, device, graph), steps, device)
                    median, mean = (round(f(times) * 1e3, 3) for f in (statistics.median, statistics.mean))
                    return dict(steps=steps, step_ms=median, mean_ms=mean, peak_bytes=peak.bytes)

                results.measure(dict(shape=shape, batch=batch, arm=arm, slots=slots), run)


def step_times(step: Step, count: int, device: str, warm_up: int = 12) -> list[float]:
    """Seconds of `count` steps one by one, after some that let libraries and graphs set themselves up."""
    for _ in range(warm_up if device == "cuda" else 1):
        step()
    times = []
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


# ------------------------------------------------------------------------------------------------------------ training

TRAIN_ARMS = (
    "LoRA, full cache",
    "LoRA, full cache, checkpointed",
    "PTE",
    "PTE, checkpointed",
    "PTE, checkpointed, head",
    "PTE, truncated, head",
)
# With a change, at the end: compiled layers take minutes to start.
TRAINED = [
    *((arm, "") for arm in TRAIN_ARMS),
    ("PTE, checkpointed", "PyTorch"),
    *((arm, "as a CUDA graph") for arm in ("PTE", "PTE, checkpointed", "LoRA, full cache")),
    *((arm, "compiled") for arm in ("PTE", "PTE, truncated, head", "LoRA, full cache")),
]
TRAIN_WINDOW = 512  # so that 1024 tokens evict several times


def train_step(model: torch.nn.Module, head: bool, batch: int, length: int, device: str) -> Step:
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    labels = ids.clone()
    labels[:, : memory.PROMPT] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        if head:
            loss = -sequence_logprobs(model, ids, prompt_lengths=memory.PROMPT)[0].sum() / (length - memory.PROMPT)
        else:
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def captured_step(model: torch.nn.Module, windowed: bool, batch: int, length: int, device: str) -> Step:
    """As `train_step`, with forward and backward as one graph. Borders are told as a number, which needs no waiting."""
    ids = torch.randint(model.config.vocab_size, (batch, length), device=device)
    border = dict(prompt_lengths=memory.PROMPT) if windowed else {}

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, **border).logits[:, memory.PROMPT - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, memory.PROMPT :].flatten())

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, captured = torch.optim.AdamW(parameters, lr=1e-4), CapturedSteps(parameters)

    def step() -> None:
        captured(ids, loss_of)
        optimizer.step()

    return step


def measure_train(options: argparse.Namespace, results: Results) -> None:
    """Forward, backward and the optimizer's step; the peak is beyond the model's own memory."""
    device = options.device
    batch, length, steps = (8, 1024, 5) if device == "cuda" else (1, 160, 1)
    window = TRAIN_WINDOW if device == "cuda" else 32
    for shape in options.shapes:
        for arm, change in TRAINED if device == "cuda" else TRAINED[:-2]:
            if change == "as a CUDA graph" and device != "cuda":
                continue
            if is_out_of_time(options):
                return

            def run(shape: str = shape, arm: str = arm, change: str = change) -> dict[str, Any]:
                adapter, checkpointing, head = memory.ARMS[arm]
                model = memory.make_model(shape, adapter, checkpointing, window, device)
                if change == "compiled":
                    torch._dynamo.reset()
                    for layer in model.get_base_model().model.layers:
                        layer.compile(backend="inductor" if device == "cuda" else "eager")
                if change == "as a CUDA graph":
                    step = captured_step(model, adapter != "lora", batch, length, device)
                else:
                    step = train_step(model, head, batch, length, device)
                with plain_torch() if change == "PyTorch" else nullcontext():
                    step()  # the optimizer's state exists, and what is built on first use
                    with Peak(device) as peak:
                        times = step_times(step, steps, device, warm_up=1)
                return dict(seconds=round(statistics.median(times), 4), peak_bytes=peak.bytes)

            row = dict(
                shape=shape, arm=", ".join(filter(None, [arm, change])), batch=batch, length=length, window=window
            )
            results.measure(row, run)
            gc.collect()


# -------------------------------------------------------------------------------------------------------------- memory


def measure_memory(options: argparse.Namespace, results: Results) -> None:
    """Shapes one after the other; of each, longest lengths last, so that the time limit cuts those."""
    for shape in options.shapes:
        options.shape = shape
        too_long: set[str] = set()  # longer ones do not fit either
        for length in options.lengths:
            for arm in [arm for arm in memory.ARMS if arm not in too_long]:
                if is_out_of_time(options):
                    return
                row = dict(shape=shape, arm=arm, length=length)
                if not results.measure(row, functools.partial(memory.measure, arm, length, options)):
                    too_long.add(arm)
