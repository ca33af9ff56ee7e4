"""``fastmem export``: a memory file becomes an adapter, a checkpoint, or a smaller file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.files import check_target
from fastmem_pl.cli.options import (
    CommandParser,
    add_model_options,
    check_exists,
    load_backbone,
    model_settings,
    read_text,
)

DESCRIPTION = """\
Ship a memory to other programs.

  fastmem export notes.fastmem --to lora          a LoRA adapter for PEFT, of the smallest rank that keeps it
  fastmem export notes.fastmem --to checkpoint    the model with the memory merged in, for plain transformers
  fastmem export notes.fastmem --to memory --form low-rank    a smaller memory file (or int8, bfloat16)

What is lost is printed, and kept as export.json: the deltas' relative error, and the KL from the exact
memory on the memorized text.
"""
_FORMS = ("float32", "bfloat16", "int8", "low-rank")


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        FastMemError: for a mistake.
    """
    options = _parser().parse(arguments)
    _check_combination(options)
    check_exists(options.memory)

    from fastmem_pl.export import to_checkpoint, to_lora, to_memory
    from fastmem_pl.memory import Memory, read_header, trained_layers
    from fastmem_pl.memory.document import BETWEEN

    header = read_header(options.memory)
    out = Path(options.out or _default_out(Path(options.memory), options))
    if out.exists() and out.samefile(options.memory):
        raise FastMemError(f"--out: {out} is the memory itself; give another")
    check_target(out, options.force, folder=options.to != "memory")
    context = BETWEEN.join(read_text(path) for path in options.context) if options.context else None
    if context is None and "text" not in header and _rank_of(options) == "auto":
        raise FastMemError(
            f"--rank: auto measures on the memorized text, which {options.memory} does not hold; give "
            "--context FILE with it, or a rank"
        )
    backbone = load_backbone(model_settings(options), trained_layers(header))
    memory = Memory.load(options.memory, backbone, backbone.device)
    common = {"context": context, "force": options.force}
    rank = "auto" if options.rank is None else options.rank
    low_rank = {"rank": rank, "max_kl": 0.01 if options.max_kl is None else options.max_kl}
    if options.to == "lora":
        report = to_lora(memory, backbone, out, dtype=options.dtype or "bfloat16", **low_rank, **common)
    elif options.to == "checkpoint":
        report = to_checkpoint(memory, backbone, out, options.dtype, **common)
    else:
        form = options.form or "low-rank"
        report = to_memory(memory, backbone, out, form, text=options.text, **low_rank, **common)
    for line in report.lines():
        print(line)
    if options.to == "lora":
        # A LoRA is of the plain model, whatever the memory's trunk was kept in.
        model = f'fastmem_pl.Backbone.load("{backbone.name}").model'
        print(f'load it: peft.PeftModel.from_pretrained({model}, "{out}")')
    elif options.to == "checkpoint":
        print(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{out}")')
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="fastmem export", description=DESCRIPTION)
    parser.add_argument("memory", metavar="MEMORY", help="file that fastmem memorize or fit wrote")
    parser.add_argument("--to", required=True, choices=("lora", "checkpoint", "memory"), help="what to write")
    parser.add_argument("--out", metavar="PATH", help="default: MEMORY's name and what it became")
    parser.add_argument("--force", action="store_true", help="replace what exists")
    parser.add_argument(
        "--rank",
        type=_rank,
        metavar="auto|N",
        help="of lora and low-rank (default: auto, the smallest within --max-kl)",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="KL(exact || exported) on the memorized text that auto allows, nats a token (default: 0.01)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of lora (default: bfloat16) and checkpoint (default: as the model is loaded)",
    )
    parser.add_argument("--form", choices=_FORMS, help="of --to memory (default: low-rank)")
    parser.add_argument(
        "--context",
        nargs="+",
        metavar="FILE",
        help="the memorized text (files in the order of memorize), where MEMORY does not hold it",
    )
    parser.add_argument(
        "--no-text", dest="text", action="store_false", help="leave the text out of --to memory's file"
    )
    add_model_options(parser, config=False)
    return parser


def _rank(value: str) -> int | str:
    if value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no rank; allowed: auto or a whole number") from None


def _rank_of(options: argparse.Namespace) -> int | str | None:
    """The rank that will be used, where one is."""
    used = options.to == "lora" or (options.to == "memory" and (options.form or "low-rank") == "low-rank")
    if not used:
        return None
    return "auto" if options.rank is None else options.rank


def _check_combination(options: argparse.Namespace) -> None:
    """Refuse options that would be of no account."""
    for name, value, fits in (
        ("--rank", options.rank, _rank_of(options) is not None),
        ("--max-kl", options.max_kl, _rank_of(options) == "auto"),
        ("--dtype", options.dtype, options.to != "memory"),
        ("--form", options.form, options.to == "memory"),
        ("--no-text", None if options.text else True, options.to == "memory"),
    ):
        if value is not None and not fits:
            raise FastMemError(f"{name}: is of no account here; leave it out (fastmem export --help)")
    if options.max_kl is not None and not options.max_kl > 0:
        raise FastMemError(f"--max-kl: {options.max_kl} is out of range; allowed: above 0")


def _default_out(memory: Path, options: argparse.Namespace) -> Path:
    if options.to == "memory":
        return memory.with_name(f"{memory.stem}-{options.form or 'low-rank'}.fastmem")
    return memory.with_name(f"{memory.stem}-{options.to}")
