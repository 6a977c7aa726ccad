"""lm-evaluation-harness, run for real: what it scores and generates is the policy of the bounded cache."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import tiny_model, with_adapter
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evaluate_report import pass_at_k
from math_benchmarks import BENCHMARKS, is_right
from peft_pte import sequence_logprobs

pytest.importorskip("lm_eval", reason="needs the extra [test]")

MATH = Path(__file__).parents[1] / "benchmarks" / "lm_eval"
WORDS = [f"w{i:02}" for i in range(61)]  # none is a part of another, since "w01" is a special token
TASKS = {
    # Not the perplexity, whose error takes 100,000 draws.
    "score": dict(output_type="loglikelihood", doc_to_target=" {{target}}", metric_list=[dict(metric="acc")]),
    "choose": dict(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{0}}"),
    "roll": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{prompt}} {{target}}"),
    "write": dict(
        output_type="generate_until",
        doc_to_target="{{target}}",
        generation_kwargs=dict(until=["w02"], max_gen_toks=40, do_sample=False),
        metric_list=[dict(metric="exact_match")],
    ),
}


def text(length: int, generator: torch.Generator) -> str:
    return " ".join(WORDS[i] for i in torch.randint(3, 61, (length,), generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a tokenizer, an adapter with a window of 8, rows of text, and a task of each kind."""
    folder = tmp_path_factory.mktemp("lm_eval")
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(folder / "base")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w00"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w00", bos_token="w01", eos_token="w02")
    tokenizer.save_pretrained(folder / "base")
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    with_adapter(base, window_size=8).save_pretrained(folder / "adapter")
    generator = torch.Generator().manual_seed(0)
    rows = [
        dict(
            prompt=text(length, generator),
            target=text(50 - 2 * length, generator),
            choices=[text(n, generator) for n in (1, 20, 30)],
        )
        for length in range(3, 12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        common = dict(
            task=name,
            dataset_path="json",
            dataset_kwargs=dict(data_files={"test": str(folder / "rows.jsonl")}),
            test_split="test",
            doc_to_text="{{prompt}}",
        )
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return folder


def harness(folder: Path, model: str, *tasks: str) -> tuple[dict, str]:
    """The samples of each task, and what was printed on the way."""
    output = folder / model
    arguments = f"pretrained={folder / 'base'},peft={folder / 'adapter'},dtype=float32,max_length=100"
    command = [sys.executable, "-m", "peft_pte", "-m", "lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(output)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "cache"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    files = {task: next(output.rglob(f"samples_{task}_*.jsonl")) for task in tasks}
    return {t: [json.loads(line) for line in path.read_text().splitlines()] for t, path in files.items()}, done.stderr


def tokens(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


@torch.no_grad()
def score(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    return float(sequence_logprobs(model, ids, prompt_lengths=len(context))[0].sum())


def test_scores_and_texts_are_those_of_the_policy(folder: Path) -> None:
    samples, errors = harness(folder, "hf", *TASKS)
    assert "PTE was called outside of" not in errors
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype="float32").eval()
    for sample in samples["score"]:
        (result,) = sample["filtered_resps"]
        assert float(result[0]) == pytest.approx(
            score(model, tokens(sample["doc"]["prompt"]), tokens(sample["target"])), 1e-4
        )
    for sample in samples["choose"]:
        for choice, result in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            expected = score(model, tokens(sample["doc"]["prompt"]), tokens(choice))
            assert float(result[0]) == pytest.approx(expected, 1e-4)
    for sample in samples["roll"]:
        expected = score(model, [1], tokens(f"{sample['doc']['prompt']} {sample['doc']['target']}"))
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, 1e-4)
    for sample in samples["write"]:
        ids = torch.tensor([tokens(sample["doc"]["prompt"])])
        (written,) = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        written = written[ids.shape[1] :].tolist()
        written = [token for token in (written[: written.index(2)] if 2 in written else written) if token > 2]
        assert tokens(sample["filtered_resps"][0]) == written


def test_batches_lengths_and_models_without_an_adapter(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scores do not depend on the batch size, also one that is searched for; without an adapter they are `hf`'s."""
    from lm_eval.models.huggingface import HFLM

    import peft_pte.lm_eval  # noqa: F401  (scores adapters as the policy)

    base: dict[str, Any] = dict(pretrained=str(folder / "base"), dtype="float32", max_length=50, device="cpu")
    generator = torch.Generator().manual_seed(1)

    def request(context: int, continuation: int) -> tuple:
        draw = [torch.randint(3, 61, (size,), generator=generator).tolist() for size in (context, continuation)]
        return (str(context), str(continuation)), *draw

    requests = [request(*sizes) for sizes in ((5, 20), (9, 3), (40, 30), (3, 1), (7, 40), (1, 49))]

    def scores(model: HFLM) -> list[tuple[float, bool]]:
        return model._loglikelihood_tokens(requests, disable_tqdm=True)

    base_model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32").eval()
    plain = scores(HFLM(**base, batch_size=2))
    for (_, context, continuation), (found, _) in zip(requests, plain):
        ids = torch.tensor([(context + continuation)[-51:]])
        with torch.no_grad():
            logprobs = base_model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        assert found == pytest.approx(float(logprobs[0, -len(continuation) :].sum()), 1e-5)
    assert "A context of 40 tokens loses its beginning" not in caplog.text
    adapter = base | dict(peft=str(folder / "adapter"))
    searched = scores(HFLM(**adapter, batch_size="auto", max_batch_size=4))
    assert "A context of 40 tokens loses its beginning" in caplog.text
    assert [s for s, _ in searched] == pytest.approx([s for s, _ in scores(HFLM(**adapter, batch_size=1))], 1e-5)
    assert [s for s, _ in searched] != pytest.approx([s for s, _ in plain], 1e-2)
    for sizes in ((0, 4), (4, 0), (4, 51)):
        with pytest.raises(ValueError, match=r"`max_length` \(50\) at most"):
            HFLM(**adapter)._loglikelihood_tokens([request(*sizes)], disable_tqdm=True)


def test_what_does_not_say_where_the_context_ends_is_refused(folder: Path) -> None:
    """Other calls of the harness's models, and models that call theirs in a way of their own."""
    from lm_eval.models.huggingface import HFLM

    import peft_pte.lm_eval  # noqa: F401

    class Steered(HFLM):
        def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super()._model_call(*args, **kwargs)

    given: dict[str, Any] = dict(pretrained=str(folder / "base"), dtype="float32", max_length=50, device="cpu")
    texts = torch.randint(3, 61, (2, 20))
    assert Steered(**given)._model_call(texts).shape == (2, 20, 61)
    given["peft"] = str(folder / "adapter")
    with pytest.raises(ValueError, match="does not say where the context ends; with a PTE adapter"):
        HFLM(**given)._model_call(texts)
    with pytest.raises(ValueError, match="Steered calls its model in a way of its own.*use `--model hf`"):
        Steered(**given)._loglikelihood_tokens([(("a", "b"), [3], [4])], disable_tqdm=True)


SCRIPT = """\
import sys, peft_pte
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], peft=sys.argv[2], dtype="float32", device="cpu")
short, long = [(("a", "b"), [3, 4], [5] * length) for length in (7, 8)]
print(len(model._loglikelihood_tokens([short], disable_tqdm=True)))  # the last token is not read
model._loglikelihood_tokens([long], disable_tqdm=True)
"""


def test_outside_of_the_runner_it_is_an_error(folder: Path) -> None:
    """A script that has PTE registered, and the harness's own scores: as long as all fits the window they are right."""
    command = [sys.executable, "-c", SCRIPT, str(folder / "base"), str(folder / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 1 and done.stdout == "1\n"
    assert "RuntimeError: PTE was called outside of `generate`" in done.stderr
    assert "This call is lm_eval's: run it as `python -m peft_pte -m lm_eval ...`" in done.stderr


def test_tasks_are_those_of_the_one_table() -> None:
    """Every benchmark that the harness lacks, or has without samples; all with as many samples as their figures say."""
    found = {path.stem: path.read_text() for path in MATH.glob("*.yaml")}
    assert set(found) == set(BENCHMARKS) - {"math500"}
    for name, text in found.items():
        task, benchmark = yaml.safe_load(text), BENCHMARKS[name]
        named = (task["dataset_path"], task.get("dataset_name"), task["test_split"])
        assert named == (benchmark.path, benchmark.config, benchmark.split)
        assert task["doc_to_text"].startswith(f"{{{{{benchmark.problem}}}}}\n")
        assert benchmark.answer in ("answer", "final_answer")  # which is all that utils.py looks for


def test_a_task_of_the_folder_on_local_rows(folder: Path) -> None:
    """Eight samples a problem, and their averages, of rows as OlympiadBench has them."""
    pytest.importorskip("math_verify", reason="grading needs math-verify: pip install peft-pte[evaluate]")
    rows = [dict(question="w05 w06 w07", final_answer=["$\\frac{1}{2}$"]), dict(question="w08 w09", final_answer=["7"])]
    (folder / "olympiad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    local = dict(
        include=str(MATH / "olympiadbench.yaml"),
        task="local_pass_k",
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=dict(data_files={"train": str(folder / "olympiad.jsonl")}),
        generation_kwargs=dict(until=[], do_sample=True, temperature=2.0, max_gen_toks=3),
    )
    (folder / "tasks" / "local.yaml").write_text(json.dumps(local))
    samples, _ = harness(folder, "hf", "local_pass_k")
    assert [sample["target"] for sample in samples["local_pass_k"]] == ["\\frac{1}{2}", "7"]
    for sample in samples["local_pass_k"]:
        (texts,) = sample["filtered_resps"]
        right = sum(is_right(sample["target"], text) for text in texts)
        assert len(texts) == 8 and len(set(texts)) > 4
        assert sample["avg@8"] == right / 8 and sample["pass@8"] == (right > 0)
        assert sample["pass@4"] == pytest.approx(pass_at_k(8, right, 4))


def test_figures_of_eight_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of eight are right: pass@4 is 1 - C(5, 4) / C(8, 4)."""
    pytest.importorskip("math_verify", reason="grading needs math-verify: pip install peft-pte[evaluate]")
    monkeypatch.syspath_prepend(str(MATH))
    utils = importlib.import_module("utils")
    samples = ["\\boxed{\\frac{1}{2}}", "It is 0.5.", "1/2", "\\boxed{2}", "No.", "", "\\boxed{0.25}", "\\boxed{1}"]
    found = utils.process_results(dict(question="?", final_answer=["$\\frac{1}{2}$"]), [samples])
    assert found == pytest.approx({"avg@8": 3 / 8, "pass@4": 1 - 5 / 70, "pass@8": 1.0})
    assert utils.target(dict(answer=27.0)) == "27"
