"""The paper's three models: what an adapter weighs, what a sequence carries, and whether all runs at their widths.

    python benchmarks/shapes.py                     # sizes, on the meta device, a minute
    python benchmarks/shapes.py --run --layers 2    # also train, generate, save, load and export, on random weights

Sizes come from the models themselves, with all layers and in bfloat16 (the state is float32), on the meta device, where
nothing is computed: trained parameters, the bytes of a PTE cache whose window is full, and those of the full cache that
LoRA needs. The prompt has 64 tokens, which PTE keeps. `--run` uses fewer layers, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache

from peft_pte import PTECache, PTEConfig, export_lora, sequence_logprobs, window

SHAPES = [name for name in memory.SHAPES if name != "small"]
WINDOWS, LENGTHS, RANK = (768, 1024, 2048), (3072, 16384, 65536), 32


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def forward(model: torch.nn.Module, length: int, cache: Any) -> Any:
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def sizes(shape: str) -> dict[str, Any]:
    """Parameters of the adapters and bytes of a sequence."""
    model = get_peft_model(memory.make_base(shape, "meta"), PTEConfig(task_type="CAUSAL_LM", r=RANK)).to("meta")
    row: dict[str, Any] = dict(shape=shape, rank=RANK, pte_parameters=trained(model))
    for width in WINDOWS:
        with window(model, width):
            cache = forward(model, 2 * width, forward(model, memory.PROMPT, PTECache()))
        row[f"pte_bytes_window_{width}"] = cache.nbytes
    model = get_peft_model(model.unload(), LoraConfig(r=RANK, target_modules=memory.PROJECTIONS))
    row["lora_parameters"] = trained(model)
    for length in LENGTHS:
        cache = forward(model, length, DynamicCache(config=model.config))
        row[f"full_bytes_{length}"] = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return row


def run(shape: str, layers: int) -> dict[str, Any]:
    """Attach, a step of training, generate past the window, save, load, export: each leaves a figure or fails."""
    base = memory.make_base(shape, "cpu", layers).requires_grad_(False)
    config = PTEConfig(task_type="CAUSAL_LM", r=RANK, window_size=16, init_weights=False)
    model = get_peft_model(base, config)
    ids = torch.randint(model.config.vocab_size, (1, 96))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = -sequence_logprobs(model, ids, prompt_lengths=8)[0].sum()
    loss.backward()
    optimizer.step()
    still = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    if still:
        raise SystemExit(f"{shape}: a step of training did not change {still}")
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
    drawn = model.eval().generate(input_ids=ids[:, :8], attention_mask=torch.ones(1, 8), **options)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = sequence_logprobs(model, drawn, prompt_lengths=8)[0]
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(model.unload(), folder).eval()
        loaded = sequence_logprobs(again, drawn, prompt_lengths=8)[0]
        again.delete_adapter("default")
        static = PTEConfig(
            task_type="CAUSAL_LM", r=RANK, output_source="attention_output", output_gate=False, init_weights=False
        )
        model = get_peft_model(again.unload(), static).eval()
        first = model(ids[:, :8], use_cache=False).logits
        export_lora(model, folder)
        lora = PeftModel.from_pretrained(model.unload(), folder).eval()
        exported = (lora(ids[:, :8], use_cache=False).logits - first).abs().max().item()
    return dict(
        run_layers=layers,
        generated_past_the_window=drawn.shape[1] - 8 - 16,
        train_loss_per_token=round(loss.item() / 88, 4),
        loaded_differs_by=(loaded - expected).abs().max().item(),
        exported_differs_by=float(f"{exported:.2e}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(memory.SHAPES), default=SHAPES)
    parser.add_argument("--run", action="store_true", help="also train, generate, save, load and export")
    parser.add_argument("--layers", type=int, default=2, help="of --run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "shapes.csv")
    options = parser.parse_args()
    about = memory.provenance("cpu", " ".join(["python", "benchmarks/shapes.py", *sys.argv[1:]]))
    rows = []
    for shape in options.shapes:
        rows.append(sizes(shape) | (run(shape, options.layers) if options.run else {}) | about)
        gc.collect()
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    columns = [name for name in rows[0] if name not in about]
    for name in columns:
        values = [f"{row[name] / 2**20:,.1f} MiB" if "bytes" in name else f"{row[name]}" for row in rows]
        print(f"{name:<24}" + "".join(f"{value:>20}" for value in values))


if __name__ == "__main__":
    main()
