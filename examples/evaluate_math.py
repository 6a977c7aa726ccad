"""Mathematics benchmarks under several windows: one adapter or many, n samples a problem, right to the last figure.

    python examples/evaluate_math.py --model Qwen/Qwen2.5-3B-Instruct --data math500 --arms base pte \\
        --adapter pte=outputs/grpo_math/pte-0 --window 512 1024 --samples 4 --temperature 0.6 --output outputs/math500
    python examples/evaluate_math.py --output outputs/math500 --report        # table and figure, from the lines alone

`--data` is math500, aime24, aime25, amc23, olympiadbench, minerva, or a file of JSON lines with "problem" and "answer"
(examples/math_benchmarks.py makes one up). The arms: `base` and `lora` with their full cache, `lora-windowed` (the same
LoRA under the bounded cache, without the encoding), `global-only` (an adapter that was trained with
`state_update="none"`) and `pte`; those with a bounded cache run once for each `--window`, as `peft_pte.window` does it.

In `--output`: `settings.json`, a line for each completion in `completions/`, written when it ends, and one for each
batch in `timings/`; then `report.md` and `report.png`. A run may be killed at any moment (`kill -9`): the same command
goes on. Batches are always the same ones (problems by length of their prompts, a problem's samples beside each other),
each with a seed of its own, and a batch that was cut is made again whole; so the lines are those of a run that was
never killed. Other settings in the same folder are refused by name; more arms, and more windows, may be added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from checkpoint import dtype_here
from evaluate_engines import ARMS, VLLM, Engine, Generate, adapter_config, cache_policy, stop_tokens
from evaluate_report import json_lines, report
from math_benchmarks import BENCHMARKS, Problem, digest, is_right, load_problems, parsed_answer, require_grader
from peft_pte import PTEConfig

Row = dict[str, Any]
# What must not change in a folder; what may grow, arms and their adapters, is compared by name.
COMPARED = (
    *("model", "data", "problems", "problem_count", "dtype", "engine", "template", "template_arguments"),
    *("system_prompt", "samples", "temperature", "top_p", "max_new_tokens", "batch_size", "seed"),
    *("eviction_ratio", "retained_prefix"),
)


class Item(NamedTuple):
    """One completion that is to be made."""

    problem: int
    sample: int
    prompt: list[int]


class Job:
    """What all arms share: problems, prompts, batches."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.problems = load_problems(options.data, options.limit)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.stops = stop_tokens(options.model, self.tokenizer)
        prompts = [prompt_tokens(problem, self.tokenizer, options) for problem in self.problems]
        items = [Item(i, sample, prompts[i]) for i in range(len(prompts)) for sample in range(options.samples)]
        items.sort(key=lambda item: (-len(item.prompt), item.problem, item.sample))  # the longest first: it fits or not
        self.batches = [items[i : i + options.batch_size] for i in range(0, len(items), options.batch_size)]
        self.longest = max(map(len, prompts))

    def __len__(self) -> int:
        return len(self.problems) * self.options.samples


def prompt_tokens(problem: Problem, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[int]:
    if options.template == "plain":
        return tokenizer("\n\n".join(filter(None, [options.system_prompt, problem.problem])) + "\n\n")["input_ids"]
    if tokenizer.chat_template is None:
        raise SystemExit(f"--model {options.model}: its tokenizer has no chat template. Give --template plain.")
    messages = [dict(role="system", content=options.system_prompt)] if options.system_prompt else []
    messages.append(dict(role="user", content=problem.problem))
    arguments = dict(add_generation_prompt=True, tokenize=True, return_dict=True) | options.template_arguments
    return list(tokenizer.apply_chat_template(messages, **arguments)["input_ids"])


# ------------------------------------------------------------------------------------------------------------ settings


def fingerprint(path: str) -> str:
    """Of an adapter's folder: what is in its files. Of one on the Hub, its name."""
    files = [p for p in sorted(Path(path).glob("adapter_*")) if p.is_file()]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16] if files else path


def settings_of(options: argparse.Namespace, job: Job) -> Row:
    given = {name: getattr(options, name, None) for name in COMPARED}
    given |= dict(problems=digest(job.problems), problem_count=len(job.problems), dtype=dtype_here(options.dtype))
    given |= cache_policy(options) if options.window else dict(eviction_ratio=None)
    adapters = {arm: f"{path} ({fingerprint(path)})" for arm, path in options.adapters.items()}
    return given | dict(arms=options.arms, adapters=adapters)


def agree(settings: Row, path: Path) -> Row:
    """The settings of the folder, with the arms that have come; written if they are new.

    Raises:
        SystemExit: completions are there that were made with others.
    """
    if path.exists():
        before = json.loads(path.read_text())
        for name in ("eviction_ratio", "retained_prefix"):  # None: no arm with a bounded cache has come yet
            settings[name] = before[name] if settings[name] is None else settings[name]
            before[name] = settings[name] if before[name] is None else before[name]
        changed = {n: (before[n], settings[n]) for n in COMPARED if before[n] != settings[n]}
        for arm in before["adapters"].keys() & settings["adapters"].keys():
            if before["adapters"][arm] != settings["adapters"][arm]:
                changed[f"adapter of {arm}"] = before["adapters"][arm], settings["adapters"][arm]
        if changed:
            said = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in changed.items())
            raise SystemExit(f"{path.parent} holds completions of other settings: {said}. Give another --output.")
        settings["arms"] = list(dict.fromkeys([*before["arms"], *settings["arms"]]))
        settings["adapters"] = before["adapters"] | settings["adapters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=1))
    part.replace(path)
    return settings


# --------------------------------------------------------------------------------------------------------- completions


def open_lines(path: Path) -> TextIO:
    """A file of lines, to be appended to; a last line that is not whole is cut away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        whole = path.read_bytes()
        path.open("r+b").truncate(whole.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def write_line(file: TextIO, row: Row) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def complete(job: Job, arm: str, window: int | None, make_engine: Callable[[], Engine]) -> None:
    """Make what is missing of an arm under a window. The engine is asked for if anything is."""
    options, name = job.options, arm if window is None else f"{arm}-{window}"
    path = options.output / "completions" / f"{name}.jsonl"
    done = {(line["problem"], line["sample"]): line["text"] for line in json_lines(path)}
    if len(done) == len(job):
        return
    with (
        closing(make_engine()) as engine,
        open_lines(path) as lines,
        open_lines(options.output / "timings" / path.name) as timings,
        tqdm(total=len(job), initial=len(done), desc=name, unit=" completions") as bar,
    ):
        for number, batch in enumerate(job.batches):
            if all((item.problem, item.sample) in done for item in batch):
                continue
            tokens = [0] * len(batch)

            def note(row: int, ids: list[int], ended: bool) -> None:
                item, tokens[row] = batch[row], len(ids)  # noqa: B023  (called before the next batch)
                text = job.tokenizer.decode(ids, skip_special_tokens=True)
                key, answer = (item.problem, item.sample), job.problems[item.problem].answer
                if key in done:
                    if done[key] != text:
                        bar.write(f"{name}: problem {key[0]}, sample {key[1]} is not what it was before the kill")
                    return
                right = is_right(answer, text)
                written = dict(tokens=len(ids), ended=ended, correct=right, answer=answer, text=text)
                write_line(lines, dict(arm=arm, window=window, problem=key[0], sample=key[1]) | written)
                bar.update()

            start = time.perf_counter()
            held = engine.complete([item.prompt for item in batch], options.seed + number, note)
            seconds = time.perf_counter() - start
            write_line(timings, dict(batch=number, tokens=sum(tokens), seconds=round(seconds, 3), cache_bytes=held))


def run_arm(job: Job, arm: str) -> None:
    options = job.options
    windows: list[int | None] = [*options.window] if ARMS[arm].bounded else [None]
    model: list[Generate] = []  # one for all windows, and none if nothing is missing

    def generate(window: int | None) -> Engine:
        if not model:
            model.append(Generate(arm, options, job.stops))
        model[0].window = window
        return model[0]

    def vllm(window: int | None) -> Engine:
        return VLLM(arm, window, options, job.stops, job.longest)

    for window in windows:
        complete(job, arm, window, partial(vllm if options.engine == "vllm" else generate, window))


# ------------------------------------------------------------------------------------------------------------- options


def adapters_of(given: list[str], fail: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    for text in given:
        arm, _, path = text.partition("=")
        known = [name for name in ARMS if ARMS[name].adapter]
        if not path or arm not in known:
            fail(f"--adapter {text}: must be ARM=PATH, and ARM one of {', '.join(known)}")
        yield arm, path
        if arm == "lora":
            yield "lora-windowed", path


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id or folder of the base")
    add("--data", help=f"{', '.join(BENCHMARKS)}, or JSON lines with problem and answer")
    add("--limit", type=int, help="only the first problems")
    add("--arms", nargs="+", choices=ARMS, default=["base"])
    add("--adapter", nargs="+", default=[], metavar="ARM=PATH", help="folders or Hub ids; lora is also lora-windowed's")
    add(
        "--window", nargs="+", type=int, default=[], metavar="W", help="thoughts kept, of the arms with a bounded cache"
    )
    add("--eviction-ratio", type=float, help="of the window (default: as the PTE adapter's)")
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    add("--system-prompt", default=boxed, help="'' for none")
    add("--template", choices=["chat", "plain"], default="chat", help="plain: system prompt and problem as they are")
    add(
        "--template-arguments",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""such as {"enable_thinking": true}""",
    )
    add("--samples", type=int, default=1, help="completions of each problem")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top-p", type=float, default=1.0)
    add("--max-new-tokens", type=int, default=32768, help="the largest budget; smaller ones follow from it")
    add("--batch-size", type=int, default=16)
    add("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto", help="of the base")
    add("--engine", choices=["generate", "vllm"], default="generate")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True, help="folder; a run that was killed goes on there")
    add("--report", action="store_true", help="only the table and the figure, of what is in --output")
    options = parser.parse_args(argv)
    if not options.report:
        check(options, parser.error)
    return options


def check(options: argparse.Namespace, fail: Callable[[str], Any]) -> None:
    if not options.model or not options.data:
        fail("--model and --data are needed (or --report)")
    for name in ("samples", "max_new_tokens", "batch_size", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        fail(f"--temperature {options.temperature} and --top-p {options.top_p}: must be >= 0, and in (0, 1]")
    if options.temperature == 0 and (options.samples > 1 or options.top_p < 1):
        fail("--temperature is 0, which is greedy: all samples would be the same. Give --samples 1 and no --top-p")
    bounded = [arm for arm in options.arms if ARMS[arm].bounded]
    if bool(bounded) != bool(options.window):
        fail(f"--window is {options.window}, but goes with arms that have a bounded cache, which are {bounded} here")
    options.adapters = dict(adapters_of(options.adapter, fail))
    for arm in options.arms:
        if ARMS[arm].adapter and arm not in options.adapters:
            fail(f"--arms {arm}: give its adapter, --adapter {'lora' if 'lora' in arm else arm}=PATH")
    unused = options.adapters.keys() - set(options.arms)
    if "lora" in options.arms or "lora-windowed" in options.arms:
        unused -= {"lora", "lora-windowed"}
    if unused:
        fail(f"--adapter is given for {', '.join(sorted(unused))}, but not among --arms")
    for arm in options.arms:
        if options.engine == "vllm" and ARMS[arm].adapter == "LORA":
            fail(f"--arms {arm}: not with --engine vllm, which runs base, global-only and pte")
        if arm in options.adapters:
            adapter_config(arm, options.adapters[arm])
    for window in options.window:
        try:
            PTEConfig().check(window_size=window, **cache_policy(options))
        except ValueError as error:
            fail(f"--window {window}: {error}")


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    path = options.output / "settings.json"
    if options.report:
        if not path.exists():
            raise SystemExit(f"--report: there is no {path}, which a run writes.")
        print(report(options.output, json.loads(path.read_text())))
        return
    require_grader()
    job = Job(options)
    settings = agree(settings_of(options, job), path)
    unread = [problem.answer for problem in job.problems if not parsed_answer(problem.answer)]
    if unread:
        print(f"{len(unread)} answers cannot be read by math-verify, so no completion is right: {unread[:5]} ...")
    for arm in options.arms:
        run_arm(job, arm)
    print(report(options.output, settings))


if __name__ == "__main__":
    main()
