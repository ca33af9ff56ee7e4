"""Write a model folder with Llama 3's shapes, random weights and the demo model's tokenizer.

    python benchmarks/random_model.py /tmp/llama3-8b --shape 8b        # 16 GB
    fastmem fit-predict --config paper-profile --model.backbone /tmp/llama3-8b \\
        --trainer.precision bf16-true --trainer.accelerator gpu --run_dir /tmp/profile

What a run takes depends on the shapes alone: so times and memory can be measured where there are no weights.
``benchmarks/results/paper_profile_h200.json`` is the profile of such a run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from speed import _8B, _70B, _TINY
from transformers import AutoModelForCausalLM, LlamaConfig

from fastmem_pl import Backbone

SHAPES = {"8b": _8B, "70b": _70B, "tiny": _TINY}


def main() -> None:
    """Make the model on the device, and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    options = parser.parse_args()
    tokenizer = Backbone.load("demo").tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {**SHAPES[options.shape], **ids}
    # A small shape's own vocabulary may lack tokens of the tokenizer.
    shape["vocab_size"] = max(shape["vocab_size"], len(tokenizer))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters")


if __name__ == "__main__":
    main()
