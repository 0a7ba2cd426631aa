"""Checkpoints of the published system, made in memory, and what their layout implies, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

KINDS = ("prefix", "answer", "assignment", "reason", "memory")
# adapter_config.json as PEFT wrote it: few fields at first, more later, some of them unknown by now
PEFT_04 = {
    "auto_mapping": None,
    "base_model_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "revision": None,
    "target_modules": ["gate_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
PEFT_12 = {
    **PEFT_04,
    "alpha_pattern": {},
    "layer_replication": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "a_field_of_some_fork": 7,
}


def prompt_text(
    n_prefix: int = 2, n_special: int = 2, kinds: tuple[str, ...] = KINDS, space: str = " "
) -> dict[str, str]:
    counts = {kind: n_prefix if kind == "prefix" else n_special for kind in kinds}
    return {kind: "".join(f"{space}<{kind}_{i}>" for i in range(count)) for kind, count in counts.items()}


def make(
    folder: Path,
    model: Any,
    *,
    texts: dict[str, str] | None = None,
    config: dict[str, Any] | None = PEFT_04,
    safe: bool = False,
    seed: int = 1,
) -> Path:
    """folder/run/prompt_text.json and folder/run/checkpoint-30, whose LoRA and rows are drawn at random."""
    texts = prompt_text() if texts is None else texts
    count = sum(text.count(">") for text in texts.values())
    torch.manual_seed(seed)
    run = folder / "run"
    checkpoint = run / "checkpoint-30"
    checkpoint.mkdir(parents=True)
    (run / "prompt_text.json").write_text(json.dumps(texts, indent=4))
    width = model.config.hidden_size
    torch.save(nn.Embedding(count, width), checkpoint / "input_embeddings.pt")
    head = nn.Linear(width, count)
    nn.init.normal_(head.weight, std=0.5)
    torch.save(head, checkpoint / "output_embeddings.pt")
    if config:
        (checkpoint / "adapter_config.json").write_text(json.dumps(config))
        lora = lora_of(model, config)
        if safe:
            save_file(lora, checkpoint / "adapter_model.safetensors")
        else:
            torch.save(lora, checkpoint / "adapter_model.bin")
    return checkpoint


def lora_of(model: Any, config: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in config["target_modules"]:
            rows, columns = module.weight.shape
            stem = f"base_model.model.{name}"
            found[f"{stem}.lora_A.weight"] = torch.randn(config["r"], columns) * 0.1
            found[f"{stem}.lora_B.weight"] = torch.randn(rows, config["r"]) * 0.1
    return found


def implied_logits(model: Any, checkpoint: Path, ids: list[int], *, bias: bool = True) -> Tensor:
    """(tokens, rows of the base + new rows): W + alpha/r B A; ids from the base's row count on are new."""
    embedding = torch.load(checkpoint / "input_embeddings.pt", weights_only=False).weight
    head = torch.load(checkpoint / "output_embeddings.pt", weights_only=False)
    if (checkpoint / "adapter_config.json").is_file():
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        lora = torch.load(checkpoint / "adapter_model.bin") if (checkpoint / "adapter_model.bin").is_file() else None
        if lora is None:
            from safetensors.torch import load_file

            lora = load_file(checkpoint / "adapter_model.safetensors")
        for name, module in model.named_modules():
            if f"base_model.model.{name}.lora_A.weight" in lora:
                down, up = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
                module.weight.data += config["lora_alpha"] / config["r"] * up @ down
    with torch.no_grad():
        table = torch.cat([model.get_input_embeddings().weight, embedding])
        hidden = model.model(inputs_embeds=table[torch.tensor(ids)][None], use_cache=False).last_hidden_state[0]
        new = hidden @ head.weight.T + (head.bias if bias else 0)
        return torch.cat([hidden @ model.get_output_embeddings().weight.T, new], dim=-1)
