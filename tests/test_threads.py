"""What belongs to a call lives in the call: threads on one model give what each gives alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny_model, with_adapter
from torch import nn
from torch.utils.data import DataLoader

from peft_pte import PTECache, sequence_logprobs

ROUNDS = 30  # of two results each
GREEDY = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)


def prompt(seed: int, length: int = 7, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def both(first: Callable[[], torch.Tensor], second: Callable[[], torch.Tensor], rounds: int = ROUNDS) -> int:
    """How many of 2 * `rounds` results, computed by two threads at the same time, are those of each alone."""
    wanted, right = [first(), second()], []

    def serve(index: int, act: Callable[[], torch.Tensor], barrier: threading.Barrier) -> None:
        barrier.wait()
        right.append(torch.equal(act(), wanted[index]))

    for _ in range(rounds):
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=serve, args=(*pair, barrier)) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sum(right)


@pytest.fixture
def model():
    return with_adapter(tiny_model("llama", torch.float32), window_size=8)


def generation(model: nn.Module, seed: int, **options: Any) -> Callable[[], torch.Tensor]:
    return lambda: model.generate(input_ids=prompt(seed), **(GREEDY | options))


def training(model: nn.Module, seed: int) -> Callable[[], torch.Tensor]:
    """A loss and the gradients of all adapter parameters, not accumulated on the parameters."""
    ids, parameters = prompt(seed, length=30, rows=2), [p for p in model.parameters() if p.requires_grad]

    def act() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids.where(torch.arange(30) >= 5, -100)).loss
        gradients = torch.autograd.grad(loss, parameters)
        return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])

    return act


def test_two_generations(model) -> None:
    assert both(generation(model, 0), generation(model, 1)) == 2 * ROUNDS


def test_two_generations_without_a_cache(model) -> None:
    options = dict(use_cache=False, max_new_tokens=6, min_new_tokens=6)
    assert both(generation(model, 0, **options), generation(model, 1, **options), rounds=10) == 20


@pytest.mark.parametrize("gradient", ["full", "truncated"])
def test_checkpointed_training_beside_a_generation(gradient: str) -> None:
    model = with_adapter(tiny_model("llama", torch.float32), window_size=8, gradient=gradient).train()
    model.gradient_checkpointing_enable()
    assert both(training(model, 0), generation(model, 1)) == 2 * ROUNDS


def test_checkpointing_is_not_lost_beside_a_generation() -> None:
    """While another thread decodes, a replay still sees that checkpointing is on, and so does the base model."""
    from peft_pte.replay.checkpointing import checkpoints_layers, layer_checkpointing_off

    model = with_adapter(tiny_model("llama"), window_size=8).train()
    model.gradient_checkpointing_enable()
    decoder, seen = model.get_base_model().model, []

    def look() -> None:
        seen.append((checkpoints_layers(decoder), bool(decoder.layers[0].gradient_checkpointing)))

    with layer_checkpointing_off(decoder):
        assert not decoder.layers[0].gradient_checkpointing
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert seen == [(True, True)] * 2
    model.gradient_checkpointing_disable()
    assert not checkpoints_layers(decoder)
    model.gradient_checkpointing_enable()
    base = model.unload()
    assert base.model.layers[0].gradient_checkpointing is True


def test_two_trainings(model) -> None:
    model.train()
    assert both(training(model, 0), training(model, 1), rounds=10) == 20


def test_scoring_beside_decoding(model) -> None:
    """One thread scores a text, the other one decodes it step by step."""
    ids = prompt(2, length=40)

    def score() -> torch.Tensor:
        with torch.no_grad():
            return sequence_logprobs(model, ids, prompt_lengths=7)[0]

    def decode() -> torch.Tensor:
        cache, logits = PTECache(), []
        with torch.no_grad():
            for columns in (slice(0, 7), *(slice(i, i + 1) for i in range(7, 40))):
                logits.append(model(input_ids=ids[:, columns], past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    assert both(score, decode, rounds=10) == 20


def test_an_error_in_one_thread_leaves_the_other_alone(model) -> None:
    wrong = prompt(3, length=20)

    def fails() -> torch.Tensor:
        with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
            model(input_ids=wrong, use_cache=False)
        with pytest.raises(IndexError), torch.no_grad():
            model(input_ids=wrong + 1000, prompt_lengths=5)
        return torch.zeros(1)

    assert both(fails, generation(model, 1), rounds=10) == 20


def replicated(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """As `torch.nn.parallel.replicate` does, which needs several GPUs: copies that share everything but their children
    and parameters."""
    replica = known[module] = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else known.get(child) or replicated(child, known)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(replica, name, parameter.detach().clone())
    return replica


def test_replicas_of_data_parallel_are_refused(model) -> None:
    """Else they would compute with the weights of the original, in silence where both are on one device."""
    replica = replicated(model, {})
    with pytest.raises(RuntimeError, match="does not support `torch.nn.DataParallel`"):
        replica(input_ids=prompt(0), labels=prompt(0))
    model(input_ids=prompt(0), labels=prompt(0))  # the original still works


def test_data_loader_workers_may_hold_the_model(model) -> None:
    """Collators that hold a tokenizer or a model are pickled into worker processes."""
    loader = DataLoader([0, 1], num_workers=1, collate_fn=Collator(model), multiprocessing_context="spawn")
    expected = model.generate(input_ids=prompt(0), max_new_tokens=2, do_sample=False)
    assert torch.equal(next(iter(loader)), expected)


class Collator:
    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, rows: list[int]) -> torch.Tensor:
        return self.model.generate(input_ids=prompt(0), max_new_tokens=2, do_sample=False)
