"""Estimated memory of each preset in configs/ on a GPU: the numbers in their first comment.

    python benchmarks/preset_memory.py

Nothing is loaded: models of the released sizes are built without storage, and run/memory_plan.py counts.
`python train.py --config configs/NAME.yaml --dry-run` measures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.lora import add_lora  # noqa: E402
from model.qwen2_config import Qwen2Config  # noqa: E402
from qwen2_llm import Qwen2ForCausalLM  # noqa: E402
from run.config import CONFIGS, load_config  # noqa: E402
from run.memory_plan import estimate  # noqa: E402

# The released config.json: hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


def preset_gib(preset: Path) -> tuple[float, float] | None:
    """(device, host) of a preset of a released model. None for those laid over another."""
    config = load_config(preset)
    text = f"{preset.stem} {config.ckpt}".upper()
    size = next((size for size in SIZES if size in text), None)
    if size is None:
        return None
    D, F, L, H, G, V, tied = SIZES[size]
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(V, D, F, L, H, G, D // H, tie_word_embeddings=tied)).bfloat16()
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    return estimate(model, config, place="host")


def main() -> None:
    found = {preset.stem: preset_gib(preset) for preset in sorted(CONFIGS.glob("*.yaml"))}
    found = {name: [round(gib, 1) for gib in pair] for name, pair in found.items() if pair}
    for name, (device, host) in found.items():
        print(f"{name:20} about {device:5.1f} GiB on the GPU, {host:5.1f} GiB beside it")
    print(json.dumps({"preset_memory_gib": found}))


if __name__ == "__main__":
    main()
