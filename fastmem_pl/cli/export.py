"""``fastmem export``: a memory file becomes an adapter, a checkpoint, or a smaller file."""

from pathlib import Path
from typing import Literal

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import check_target
from fastmem_pl.cli.model import ModelOptions, read_text
from fastmem_pl.export import to_checkpoint, to_lora, to_memory
from fastmem_pl.memory import Memory, read_header, trained_part
from fastmem_pl.memory.document import BETWEEN


def export(
    memory: str,
    *,
    to: Literal["lora", "checkpoint", "memory"] | None = None,
    out: str | None = None,
    force: bool = False,
    rank: int | Literal["auto"] = "auto",
    max_kl: float = 0.01,
    dtype: Literal["float32", "bfloat16"] | None = None,
    form: Literal["float32", "bfloat16", "int8", "low-rank"] | None = None,
    context: list[str] = [],  # noqa: B006 (never changed)
    no_text: bool = False,
    options: ModelOptions = ModelOptions(),  # noqa: B008 (a frozen dataclass)
) -> None:
    """Ship a memory to other programs.

      fastmem export notes.fastmem --to lora        a LoRA adapter for PEFT, of the least rank that keeps it
      fastmem export notes.fastmem --to checkpoint  the model with the memory merged in, for transformers
      fastmem export notes.fastmem --to memory      a smaller file, of --form low-rank, int8 or bfloat16

    What is lost is printed, and kept as export.json: the deltas' relative error, and the KL from the exact
    memory on the memorized text.

    Args:
        memory: file that fastmem memorize or fit wrote.
        to: what to write (required).
        out: path to write (default: MEMORY's name and what it became).
        force: replace what exists.
        rank: rank of lora and low-rank; auto is the smallest within --max-kl.
        max_kl: KL(exact || exported) on the memorized text that auto allows, nats a token.
        dtype: number format of lora (default: bfloat16) and checkpoint (default: as the model is loaded).
        form: form of --to memory (default: low-rank).
        context: the memorized text, where MEMORY does not hold it; repeated for several files, in the order
            of memorize.
        no_text: leave the text out of --to memory's file.
        options: the model.
    """
    if to is None:
        raise FastMemError("--to: is required; allowed: lora, checkpoint, memory")
    low_rank = to == "lora" or (to == "memory" and form in (None, "low-rank"))
    automatic = low_rank and rank == "auto"
    if not max_kl > 0:
        raise FastMemError(f"--max-kl: {max_kl} is out of range; allowed: above 0")
    header, source = read_header(memory), Path(memory)
    suffix = f"{form or 'low-rank'}.fastmem" if to == "memory" else to
    target = Path(out) if out else source.with_name(f"{source.stem}-{suffix}")
    if target.exists() and target.samefile(source):
        raise FastMemError(f"--out: {target} is the memory itself; give another")
    check_target(target, force, folder=to != "memory")
    text = BETWEEN.join(map(read_text, context)) if context else None
    if text is None and "text" not in header and automatic:
        raise FastMemError(f"--rank: auto needs the text, which {memory} does not hold; give --context FILE")
    backbone = options.load(**trained_part(header))
    loaded = Memory.load(memory, backbone, backbone.device)
    size = {"rank": rank, "max_kl": max_kl}
    common = {"context": text, "force": force}
    if to == "lora":
        report = to_lora(loaded, backbone, target, dtype=dtype or "bfloat16", **size, **common)
    elif to == "checkpoint":
        report = to_checkpoint(loaded, backbone, target, dtype, **common)
    else:
        report = to_memory(loaded, backbone, target, form or "low-rank", text=not no_text, **size, **common)
    print("\n".join(report.lines()))
    if to == "lora":
        # A LoRA belongs to the plain model, whatever the memory's trunk was kept in.
        model = f'fastmem_pl.Backbone.load("{backbone.name}").model'
        print(f'load it: peft.PeftModel.from_pretrained({model}, "{target}")')
    elif to == "checkpoint":
        print(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{target}")')
