"""Loading from the Hugging Face Hub without waiting for a network that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_PROBE_SECONDS = 3.0


def cache_first(source: str, load: Callable[[bool], T]) -> T:
    """Call ``load(local_files_only)`` for a folder or what is in the Hub's cache, else with the Hub.

    Without a network the Hub's client would retry for most of a minute before it gives up.

    Args:
        source: local folder or Hub id.
        load: loads it; told whether to keep to local files.

    Raises:
        OSError: when neither the cache nor the Hub has it.
    """
    from huggingface_hub import constants

    if Path(source).is_dir():
        return load(True)
    if _in_cache(source):
        try:
            return load(True)
        except OSError:
            pass  # Some of its files are still to be fetched.
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"{source!r} is not in the Hub cache, and HF_HUB_OFFLINE forbids to fetch it")
    if not _hub_answers():
        raise OSError(f"{source!r} is not in the Hub cache, and {constants.ENDPOINT} does not answer")
    return load(False)


def _in_cache(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(
            isinstance(try_to_load_from_cache(source, name), str)
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
