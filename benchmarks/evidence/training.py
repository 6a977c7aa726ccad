"""Training of the base and of the arms, and their evaluation by distance past the window; one process a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from arms import ARMS, CONTROLS, EVICTION_RATIO, Arm, adapt, lora
from baselines import slots
from peft_pte import PTECache, attention_loss, distillation_loss, record_attention
from peft_pte.cache.schedule import Schedule
from shared import CapturedSteps, is_converted, prepare
from streams import Stream, SymbolTask, Task, answers
from tasks import TASKS
from unfinished import Step, Unfinished

TRANSFER_STEPS, TRANSFER_RATE = 4, 3e-3  # on each batch of attention transfer; the learning rate
TEACHING_RATE, TEACHING_SEED = 1e-3, 3_000_000  # of bases that learn a task first; other streams than those of arms


@dataclass(frozen=True)
class Settings:
    """What all arms of a table share. Tasks may have other defaults."""

    task: str
    base: Path  # folder
    window_size: int = 16
    rank: int = 32
    scaling: float = 0.5  # of the update, LoRA's too: alpha over rank
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2.5e-3
    trained_distance: int = 64  # streams have 0 to this many tokens of filler in training
    distance_step: int = 1  # and a multiple of this
    distances: tuple[int, ...] = (0, 16, 32, 64, 128, 256)  # in the evaluation
    beyond: tuple[int, ...] = (1024, 4096)  # the same, once at the end, on a quarter of the streams
    num_evaluated: int = 512
    base_steps: int = 6000  # of the base's own training, at most
    difficulty: tuple[tuple[str, int], ...] = ()  # where it is not the task's own
    hidden_size: int = 64  # of the base, if it is trained here
    base_dtype: str = "float32"  # of the frozen base; adapters are float32
    device: str = "cpu"
    graphs: bool = False  # steps of training are replayed as CUDA graphs, one for each distance
    unfinished: Path | None = None  # folder of what killed runs go on from

    @classmethod
    def of(cls, task: str, base: Path, difficulty: tuple[tuple[str, int], ...] = ()) -> Settings:
        """The usual ones of a task."""
        return replace(cls(task, base, difficulty=difficulty), **TASKS[task].settings)

    @property
    def streams(self) -> Task:
        """The task, ready to sample."""
        return TASKS[self.task].opened(self.base)

    @property
    def pace(self) -> float:
        """Learning rates are for a base of 64 dimensions; wider ones get smaller ones."""
        return (64 / self.hidden_size) ** 0.5

    @property
    def curve_steps(self) -> tuple[int, ...]:
        """When an arm is evaluated on its way, at two of the distances."""
        return tuple(self.steps * part // 8 for part in (1, 2, 3, 4, 6))

    @property
    def two_distances(self) -> Settings:
        """For what is not evaluated at every distance: the longest trained, and the farthest."""
        return replace(self, distances=(self.trained_distance, self.distances[-1]))

    @property
    def few(self) -> Settings:
        """A quarter of the streams."""
        return replace(self, num_evaluated=self.num_evaluated // 4)

    def batch(self, generator: torch.Generator) -> Stream:
        """Streams to train on, at one of the trained distances."""
        steps = self.trained_distance // self.distance_step
        distance = self.distance_step * int(torch.randint(steps + 1, (), generator=generator))
        return self.streams.sample(self.batch_size, distance, generator, **dict(self.difficulty))

    def held_out(self, distance: int) -> Stream:
        """The streams of the evaluation, which no training has seen: training counts its seeds from 0."""
        generator = torch.Generator().manual_seed(1_000_000 + distance)
        return self.streams.held_out.sample(self.num_evaluated, distance, generator, **dict(self.difficulty))


def loss_and_hits(
    model: torch.nn.Module, stream: Stream, prompt_length: int, windowed: bool, cache: PTECache | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers; NLL and correctness of each scored token, [N, scored].

    `cache`: a new one, to look at it afterwards.
    """
    options: dict[str, Any] = dict(prompt_lengths=prompt_length) if windowed else {}
    options |= dict(use_cache=False) if cache is None else dict(past_key_values=cache)
    stream = stream.to(model.device)
    # Logits of the answers alone: over a real vocabulary those of whole streams would not fit.
    columns = stream.answers[0].nonzero()[:, 0]
    logits = model(input_ids=stream.input_ids, logits_to_keep=columns - 1, **options).logits
    nll, right = answers(logits, stream.input_ids, columns)
    scored = stream.scored[0, columns]
    return nll.mean(), nll[:, scored], right[:, scored]


def loss_of_columns(
    model: torch.nn.Module, columns: torch.Tensor, prompt_length: int, windowed: bool, input_ids: torch.Tensor
) -> torch.Tensor:
    """As `loss_and_hits`, the loss alone, where the host has to wait for nothing: answers are at `columns`."""
    options = dict(prompt_lengths=prompt_length) if windowed else {}
    logits = model(input_ids=input_ids, logits_to_keep=columns - 1, use_cache=False, **options).logits
    return answers(logits, input_ids, columns)[0].mean()


def transfer(model: torch.nn.Module, settings: Settings, seed: int, num_batches: int) -> None:
    """Each layer alone learns what attention to thoughts that have left gave: some steps on each of the batches.

    Of the streams' distribution, but others than those of the training that follows.
    """
    task, generator = settings.streams, torch.Generator().manual_seed(2_000_000 + seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, steps = torch.optim.AdamW(parameters, weight_decay=0.0), num_batches * TRANSFER_STEPS
    for step in range(steps):
        if step % TRANSFER_STEPS == 0:
            ids = settings.batch(generator).input_ids.to(model.device)
            record = record_attention(model, ids)
        for group in optimizer.param_groups:
            group["lr"] = TRANSFER_RATE * share_of_rate(step, steps)
        loss = attention_loss(model, ids, prompt_lengths=task.prompt_length, record=record)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def loss_of_step(model: torch.nn.Module, stream: Stream, prompt_length: int, arm: Arm) -> torch.Tensor:
    """What a step of training makes smaller: see `Arm.distilled`."""
    if arm.distilled:
        return distillation_loss(model, stream.input_ids, prompt_lengths=prompt_length)
    return loss_and_hits(model, stream, prompt_length, arm.windowed)[0]


def new_base(task: SymbolTask, hidden_size: int) -> torch.nn.Module:
    num_heads = task.base_heads if hidden_size == 64 else hidden_size // 64
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=task.base_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        initializer_range=0.4 * hidden_size**-0.5,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    return model


def make_base(settings: Settings, source: Path | None) -> None:
    """Train the base, or make the folder of the checkpoint (from `source` if it is there already)."""
    if isinstance(settings.streams, SymbolTask):
        train_base(settings, settings.streams)
    elif settings.streams.is_taught:
        teach_base(settings, source)
    else:
        prepare(settings.base, source)


def teach_base(settings: Settings, source: Path | None) -> None:
    """The checkpoint with a LoRA that has learned the task with the full cache, merged; there once it is complete."""
    torch.set_num_threads(1)
    torch.manual_seed(TEACHING_SEED)
    settings.base.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=settings.base.parent, prefix=".taught-") as part:
        untaught, taught = Path(part) / "untaught", Path(part) / "taught"
        if source and is_converted(source):
            untaught = source
        else:
            prepare(untaught, source)
        base = AutoModelForCausalLM.from_pretrained(untaught, dtype=settings.base_dtype).to(settings.device)
        model = get_peft_model(base, lora(settings.rank, settings.scaling))
        teaching = replace(
            settings, base=untaught, steps=settings.base_steps, learning_rate=TEACHING_RATE, graphs=False
        )
        for step in supervised(model, teaching, TEACHING_SEED, ARMS["LoRA, full cache"]):
            if step.number % 50 == 0:
                print(f"base for {settings.task}: step {step.number}, loss {step.loss:.3f}", flush=True)
        model.merge_and_unload().to(torch.bfloat16).save_pretrained(taught)
        AutoTokenizer.from_pretrained(untaught).save_pretrained(taught)
        taught.replace(settings.base)


def train_base(settings: Settings, task: SymbolTask) -> None:
    """Train a small Llama with a full cache until it answers over all distances, and save it.

    While the loss is small, it gets one hop more, up to the task's own number, then longer filler up to the farthest
    evaluated, then a learning rate that goes to zero.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = new_base(task, settings.hidden_size).to(settings.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    longest, tail, average, farthest = 4, 200, 3.0, max(settings.distances)
    hops, most_hops = 1, task.difficulty.get("hops", 1)
    for step in range(settings.base_steps):
        if not tail:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * settings.pace * min(1, (step + 1) / 20) * tail / 200
        distance = int(torch.randint(longest + 1, (), generator=generator))
        harder = dict(hops=hops) if most_hops > 1 else task.base_difficulty(generator)
        stream = task.sample(32, distance, generator, **harder)
        loss, _, _ = loss_and_hits(model, stream, task.prompt_length, windowed=False)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average += 0.05 * (loss.item() - average)
        if average < (0.2 if hops < most_hops else task.solved_loss):
            if hops < most_hops:
                hops, average = hops + 1, 3.0
            elif longest < farthest:
                longest = min(farthest, longest + 1 + longest // 16)
            else:
                tail -= 1
        if step % 200 == 0:
            print(f"base for {settings.task}: step {step}, loss {average:.3f}, filler up to {longest}", flush=True)
    model.save_pretrained(settings.base)


def evictions(stream: Stream, task: Task, settings: Settings) -> int:
    """Evictions under the window until the first scored token is predicted."""
    length = int(stream.scored[0].int().argmax())
    schedule = Schedule.create(settings.window_size, EVICTION_RATIO)
    return sum(segment.evict for segment in schedule.segments(task.prompt_length, length))


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, settings: Settings, arm: Arm, control: str = ""
) -> list[dict[str, float | int | str]]:
    """Accuracy and NLL of the scored tokens at each distance, on streams that no training has seen."""
    task, rows = settings.streams, []
    model.eval()
    for distance in settings.distances:
        stream = settings.held_out(distance).until_scored()
        cache = PTECache() if arm.windowed else None
        with CONTROLS[control]() if control else nullcontext():
            if arm.answer:
                capacity = slots(model, task.prompt_length, settings.window_size, settings.rank)
                nll, hits = arm.answer(model, stream.to(model.device), task.prompt_length, capacity)
            else:
                _, nll, hits = loss_and_hits(model, stream, task.prompt_length, arm.windowed, cache)
        hits = hits.all(1) if task.whole_answers else hits
        values = dict(accuracy=round(hits.float().mean().item(), 4), nll=round(nll.mean().item(), 4))
        about = dict(control=control, distance=distance, evictions=evictions(stream, task, settings), streams=len(hits))
        rows.append(about | values | state_norms(cache))
    return rows


def state_norms(cache: PTECache | None) -> dict[str, float | str]:
    """Frobenius norms at the end of a stream, of the layer where they are largest: mean over the rows of a batch."""
    norms: dict[str, float | str] = dict(core_norm="", state_norm="")
    for name in cache.adapters if cache is not None else ():
        layers = [layer for layer in cache.layers if name in layer.states]
        for key, per_layer in (
            ("core_norm", [layer.cores[name][:, : layer.cores[name].shape[-1]] for layer in layers]),
            ("state_norm", [layer.states[name] for layer in layers]),
        ):
            norms[key] = round(max(torch.linalg.matrix_norm(x).mean().item() for x in per_layer), 3)
    return norms


def run_arm(name: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """Train one arm and evaluate it: a row for each distance and control, and some on the way there."""
    with ARMS[name].variant():
        return train_and_evaluate(name, seed, settings)


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rate: twenty steps of warm-up, then half a cosine down to a twentieth."""
    return min(1, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def supervised(
    model: torch.nn.Module, settings: Settings, seed: int, arm: Arm, unfinished: Unfinished | None = None
) -> Iterator[Step]:
    """Train what is trainable on the answers (or as `Arm.distilled` says), step by step.

    The data depend on the seed alone, and are the same for every arm.
    """
    task, generator = settings.streams, torch.Generator().manual_seed(seed)
    by_pace: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_pace.setdefault(arm.slower_by(name), []).append(parameter)
    parameters = [parameter for group in by_pace.values() for parameter in group]
    optimizer = torch.optim.AdamW([dict(params=p, slower=x) for x, p in by_pace.items()], weight_decay=0.0)
    done = unfinished.load(parameters, optimizer, generator) if unfinished else 0
    if arm.transfer and not done:
        transfer(model.train(), settings, seed, arm.transfer)
    captured = CapturedSteps(parameters) if settings.graphs else None
    for step in range(done, settings.steps):
        model.train()
        for group in optimizer.param_groups:
            rate = settings.learning_rate * settings.pace
            group["lr"] = rate * share_of_rate(step, settings.steps) / group["slower"]
        stream = settings.batch(generator)
        if captured is None or arm.distilled:
            loss = loss_of_step(model, stream.to(model.device), task.prompt_length, arm)
            optimizer.zero_grad()
            loss.backward()
        else:
            columns = stream.answers[0].nonzero()[:, 0].to(model.device)
            loss_of = partial(loss_of_columns, model, columns, task.prompt_length, arm.windowed)
            loss = captured(stream.input_ids.to(model.device), loss_of)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield Step(step + 1, loss.item(), norm.item())
        if unfinished and step + 1 in settings.curve_steps:
            unfinished.save(step + 1, parameters, optimizer, generator)


def adapted(arm: Arm, settings: Settings, seed: int, **cache: Any) -> torch.nn.Module:
    """The frozen base with the adapter of an arm."""
    torch.set_num_threads(1)
    if settings.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(settings.base, dtype=settings.base_dtype).requires_grad_(False)
    shared = dict(rank=settings.rank, window_size=settings.window_size, scaling=settings.scaling)
    model = adapt(base.to(settings.device), arm, **shared, matched_rank=settings.streams.matched_rank, **cache)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def train_and_evaluate(name: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    arm, start = ARMS[name], time.time()
    model = adapted(arm, settings, seed)
    identity = name, arm.settings, arm.rank, arm.scaling, arm.slower, arm.distilled, arm.transfer, seed, settings
    unfinished = Unfinished.of(settings.unfinished, *identity) if settings.unfinished else None
    rows: list[dict[str, Any]] = unfinished.rows if unfinished else []
    steps: list[Step] = unfinished.steps if unfinished else []
    if arm.is_trained:
        for step in supervised(model, settings, seed, arm, unfinished):
            steps.append(step)
            if step.number in settings.curve_steps:
                rows += at_step(steps, evaluate(model, settings.two_distances.few, arm))
    about = dict(
        arm=name,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        train_loss=round(steps[-1].loss, 4) if steps else float("nan"),
    )
    last = evaluate(model, settings, arm)
    last += evaluate(model, replace(settings.few, distances=settings.beyond), arm)
    if arm.adapter == "pte" and arm.settings.get("state_update") != "none":
        for control in CONTROLS:
            last += evaluate(model, settings.two_distances, arm, control)
    rows += [dict(row, step=settings.steps) for row in at_step(steps, last)]
    about["seconds"] = round(time.time() - start)
    if unfinished:
        unfinished.path.unlink(missing_ok=True)
    return [about | row | about_training(settings, arm) for row in rows]


def at_step(steps: list[Step], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an evaluation, with the median and the largest norm of the gradient in the last 100 steps."""
    norms = torch.tensor([step.gradient_norm for step in steps[-100:]] or [float("nan")])
    about = dict(gradient_norm=round(norms.median().item(), 3), largest_gradient_norm=round(norms.max().item(), 3))
    return [dict(row, step=steps[-1].number if steps else 0, **about) for row in rows]


def about_training(settings: Settings, arm: Arm) -> dict[str, Any]:
    """The settings that a row of results tells; the scaling is the arm's."""
    left_out = {"base", "unfinished", "distances", "beyond", "num_evaluated", "difficulty", "device", "graphs"}
    usual = {"hidden_size", "base_dtype", "distance_step"}  # told where they are other than usual
    left_out |= {field.name for field in fields(settings) if getattr(settings, field.name) == field.default} & usual
    told = {key: value for key, value in asdict(settings).items() if key not in left_out}
    difficulty = " ".join(f"{key}={value}" for key, value in settings.difficulty)
    return told | dict(scaling=arm.scaling_among(settings.scaling), difficulty=difficulty)
