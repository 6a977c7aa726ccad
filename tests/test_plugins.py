"""The plugins of `examples/plugins` map their framework's options; the script of `docs/frameworks.md` trains.

The frameworks themselves are not installed here: a few names stand in for what the plugins import of them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_pte import PTECache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Import a plugin beside stand-ins, given as module name = its content."""

    def load(plugin: str, stand_ins: dict[str, dict[str, Any]]) -> ModuleType:
        for name, content in stand_ins.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location(plugin, ROOT / "examples" / "plugins" / f"{plugin}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, plugin, module)
        spec.loader.exec_module(module)
        return module

    return load


# ------------------------------------------------------------------------------------------------------------- ms-swift


@dataclass
class SwiftArguments:
    """Those of swift's arguments that matter, with swift's defaults."""

    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    target_modules: Any = field(default_factory=lambda: ["all-linear"])
    modules_to_save: list[str] = field(default_factory=list)
    use_dora: bool = False
    packing: bool = False
    use_vllm: bool = False
    task_type: str = "causal_lm"
    rlhf_type: str | None = None


@pytest.fixture
def swift(load: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    monkeypatch.delenv("PTE_CONFIG", raising=False)

    class Template:
        def data_collator(self, batch: dict[str, Any]) -> dict[str, Any]:
            return dict(batch)

    stand_ins = {
        "swift": {},
        "swift.template": dict(Template=Template),
        "swift.tuner_plugin": dict(PeftTuner=object, tuners_map={}),
        "swift.utils": dict(get_logger=logging.getLogger),
    }
    return load("ms_swift_pte", stand_ins)


def test_swift_options(swift: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """swift's options where given, even if given their default; then `PTE_CONFIG`; else PTE's defaults, not swift's."""
    assert swift.tuners_map["pte"] is swift.PTETuner
    config = swift.pte_config(SwiftArguments())
    assert (config.r, config.pte_alpha, config.pte_dropout, config.target_modules) == (32, 16, 0.0, None)

    monkeypatch.setattr(sys, "argv", ["sft.py", "--lora_rank", "8", "--target-modules=all-linear"])
    monkeypatch.setenv("PTE_CONFIG", '{"pte_alpha": 2, "window_size": 64}')
    config = swift.pte_config(SwiftArguments(lora_alpha=4.0, modules_to_save=["lm_head"]))
    assert (config.r, config.pte_alpha, config.window_size, config.target_modules) == (8, 2, 64, None)
    assert config.modules_to_save == ["lm_head"]

    monkeypatch.setenv("PTE_CONFIG", "")
    assert swift.pte_config(SwiftArguments(target_modules=["v_proj"])).target_modules == {"v_proj"}


@pytest.mark.parametrize(
    "options",
    [dict(use_dora=True), dict(packing=True), dict(use_vllm=True), dict(rlhf_type="kto"), dict(task_type="seq_cls")],
)
def test_swift_refuses(swift: ModuleType, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        swift.PTETuner.prepare_model(SwiftArguments(**options), tiny_model("llama"))


def test_swift_border(swift: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What swift's GRPO says, one number for all rows, is too little; with the collator's entry each has its own."""
    monkeypatch.setenv("PTE_CONFIG", '{"window_size": 2, "init_weights": false}')
    model = swift.PTETuner.prepare_model(SwiftArguments(lora_rank=4, lora_alpha=2.0), tiny_model("llama"))
    assert isinstance(model, PeftModel) and model.peft_config["default"].r == 4
    ids = torch.randint(3, 61, (3, 12))
    labels = ids.clone()
    labels[0, :4], labels[1, :7], labels[2] = -100, -100, -100
    batch = sys.modules["swift.template"].Template().data_collator(dict(input_ids=ids, labels=labels))
    border = batch["prompt_lengths"]
    assert border.tolist() == [4, 7, 12]
    expected = model(input_ids=ids, prompt_lengths=border).logits[:, -9:]
    cut = dict(input_ids=ids, logits_to_keep=9)
    torch.testing.assert_close(model(**cut, prompt_lengths=border).logits, expected, rtol=1e-10, atol=1e-10)
    wrong = (model(**cut).logits - expected).abs().amax((1, 2))
    assert wrong[0] < 1e-10 < wrong[1]  # all rows had the border of the first
    cut["labels"] = labels[:, -9:]  # as in its SFT: there the model finds the border of each row with a label
    torch.testing.assert_close(model(**cut).logits[:2], expected[:2], rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------------------------------- axolotl


class Options(dict):
    """Like axolotl's configuration: items are attributes, and what is not there is None."""

    def __missing__(self, name: str) -> None:
        return None

    __getattr__ = dict.__getitem__


@pytest.fixture
def axolotl(load: Callable[..., ModuleType]) -> ModuleType:
    pytest.importorskip("pydantic", reason="axolotl brings it")

    @dataclass
    class AdapterCapabilities:
        name: str

    base = dict(BasePlugin=object, AdapterCapabilities=AdapterCapabilities)
    return load("axolotl_pte", {"axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": base})


def test_axolotl_adapter(axolotl: ModuleType, tmp_path: Path) -> None:
    """New, saved and loaded; the block `pte` goes before axolotl's own options."""
    plugin = axolotl.PTEPlugin()
    assert [capability.name for capability in plugin.get_adapter_capabilities()] == ["pte"]
    module, _, name = plugin.get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name)(pte={"r": 4}).pte == {"r": 4}

    assert plugin.load_adapter(None, Options(adapter="lora")) is None
    cfg = Options(adapter="pte", lora_r=8, lora_alpha=2, lora_dropout=0.0, pte=Options(r=4, window_size=8))
    model, config = plugin.load_adapter(None, cfg, config_only=True)
    assert model is None and (config.r, config.pte_alpha, config.window_size) == (4, 2, 8)

    model, config = plugin.load_adapter(tiny_model("llama"), cfg)
    model.save_pretrained(tmp_path)
    loaded, config = plugin.load_adapter(tiny_model("llama"), Options(cfg, lora_model_dir=str(tmp_path)))
    assert config.window_size == 8 and any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    "options",
    [
        dict(peft_use_dora=True),
        dict(sample_packing=True),
        dict(rl="kto"),
        dict(trl=Options(use_vllm=True)),
        dict(context_parallel_size=2),
    ],
)
def test_axolotl_refuses(axolotl: ModuleType, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        axolotl.PTEPlugin().load_adapter(None, Options(adapter="pte", **options), config_only=True)


def test_axolotl_dpo_says_the_border(axolotl: ModuleType) -> None:
    trainer = SimpleNamespace(data_collator=lambda rows: dict(completion_mask=torch.tensor(rows)))
    axolotl.PTEPlugin().post_trainer_create(Options(adapter="pte", rl="dpo"), trainer)
    assert trainer.data_collator([[0, 0, 1, 1], [0, 1, 1, 0]])["prompt_lengths"].tolist() == [2, 1]


# ------------------------------------------------------------------------------------------------------------------ TRL


def test_script_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that stands in for `trl sft`, as it is printed."""
    pytest.importorskip("trl", reason="TRL is an optional dependency: pip install peft-pte[trl]")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "frameworks.md").read_text(), flags=re.DOTALL)
    (tmp_path / "sft_pte.py").write_text(code)
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    row = json.dumps(dict(prompt="w5 w6 w7 ", completion=" ".join(f"w{3 + i % 50}" for i in range(20))))
    (tmp_path / "data" / "train.jsonl").write_text(f"{row}\n" * 4)

    monkeypatch.setenv("PTE_CONFIG", '{"r": 4, "pte_alpha": 2, "num_global_tokens": 3, "window_size": 8}')
    paths = dict(model_name_or_path="base", dataset_name="data", output_dir="out")
    options = [part for name, path in paths.items() for part in (f"--{name}", str(tmp_path / path))]
    options += ["--max_steps", "2", "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", ["sft_pte.py", *options])
    runpy.run_path(str(tmp_path / "sft_pte.py"), run_name="__main__")

    model = PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path / "out")
    cache = PTECache()
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, past_key_values=cache, eos_token_id=None)
    assert output.shape[1] == 23 and cache.num_evicted[0] >= 10
