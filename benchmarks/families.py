"""Which of transformers' decoder-only language models the package works on: the table in docs/families.md.

    python benchmarks/families.py scan                    # a line a type and a count, in two minutes or so
    python benchmarks/families.py scan llama qwen3_moe    # some types
    python benchmarks/families.py page                    # scan all, and write the table into the page

Every type that the installed transformers can build from its own configuration is built tiny, with random
weights in float32 on the CPU, and checked through the public API: logits token by token and zero-shot answers
are those of the model and of its ``generate``; memorizing lowers the loss; a batch of contexts of different
length gives what single runs give; contrastive decoding runs; no weight of the model changes. A type has
--limit seconds; what fails is a line of its own, and the scan goes on.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.auto import modeling_auto

from fastmem_pl import Backbone, FastMemError, Memorizer, Memory, answer, encode_prompt
from fastmem_pl.backbone import FixedCache, continued
from fastmem_pl.backbone.layout import is_experts
from fastmem_pl.base.errors import one_line

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
MARKERS = "<!-- families: by benchmarks/families.py page -->", "<!-- end of families -->"
LIMIT = 120
CONTEXTS = (
    "The tower of Velm is red and old.",
    "Ann lives in Velm, says Tom, who moved there in May of that year with his two dogs.",
)
QUESTION = "What colour is the tower?"

# Decoders of more than text, parts of other models, and those that need a tokenizer of their own.
_OTHERS = {
    *("bert-generation", "blt", "cohere_compass_text", "cpmant", "dots3_note_text", "gemma4_assistant"),
    *("gemma4_unified_assistant", "hrm_text", "trocr", "whisper", "xlnet"),
}
NO_FFN = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}

# By the whole name of a field, the first that fits.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"(num_|n_)?(hidden_)?layers?", 2),
    (r"hidden_size|n_embd|d_model|lru_width|word_embed_proj_dim", 32),
    (r"intermediate_size|(dense_|mlp_)?(ffn_)?(intermediate|hidden)_size(_mlp)?|ffn_dim|dff|n_inner", 64),
    (r"(moe_|expert_|shared_)+(expert_)?(ffn_)?(intermediate|hidden)_size", 32),
    (r"hidden_size_per_layer_input|ple_embed_dim|hc_lowrank|mamba_d_state|ssm_state_size", 8),
    (r"(num|n)_(attention_|mamba_)?heads?|attention_heads|(swa_|linear_)num_(attention_)?heads", 4),
    (r"mamba_(n|num)_heads|num_query_groups", 4),
    # With few, many of an indexer's scores are zero, and ties are broken by chance.
    (r"index_n_heads", 16),
    (r"(swa_)?num_(key_value|kv)_heads|linear_num_(key|value)_heads|o_groups", 2),
    (r"(?!qk_head_dim)\w*head_dim|rotary_dim|kv_channels|index_topk|query_pre_attn_scalar", 8),
    (
        r"(router_hidden_size|mamba_d_head|mamba_head_dim|\w+_lora_rank|index_block_size|rel_extent|block_multiple_of)",
        16,
    ),
    (r"(num_|n_)(local_|routed_)?experts|moe_num_experts|(adapter|laurel|gated_norm)_rank|mamba_dt_rank", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|zero_expert_num|expansion_ratio|altup_num_inputs", 2),
    (r"n_groups?|topk_group|num_expert_groups?|mamba_n_?groups|(n_|num_|moe_num_)shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|index_topk_blocks", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|ngram_vocab_size_base", 0),
    (
        r"(mamba_|index_)?chunk_size|sliding_window(_size)?|window_size|local_attention|attention_chunk_size",
        64,
    ),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", 512),
    (r"initializer_range|init_std", 0.1),
    (r"use_mamba_kernels", False),
)
# What no rule gives, as numbers depend on each other; ``...`` leaves a field at its default.
_LATENT = {"num_key_value_heads": 4, "head_dim": ...}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_SHARED = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_head_dim": 16,
}
_EXOTIC: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": _MIXED,
    "hy_v4": {"indexer_types": ["full", "full"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MIXED,
    **{kind: {"layer_types": ["conv", "full_attention"]} for kind in ("lfm2", "lfm2_moe", "lfm3")},
    "llama4_text": {"moe_layers": ...},
    "longcat_flash": {"head_dim": 8},
    "nemotron_h": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "full_attention", "moe"],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": _SHARED | {"n_mamba_heads": 2},
    "zamba2": _SHARED | {"n_mamba_heads": 4, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


class _Late(BaseException):
    """Time is up: no ordinary exception, which code on the way might handle."""


@dataclass(frozen=True)
class Finding:
    """What the scan says of a type; ``ffn``, ``above`` and ``cache`` are empty where it is not taken."""

    kind: str
    result: str
    ffn: str = ""
    above: str = ""
    cache: str = ""

    @property
    def works(self) -> bool:
        """Whether all checks passed."""
        return self.result == "works"

    def __str__(self) -> str:
        return f"{self.kind}: {'; '.join(filter(None, (self.result, self.ffn, self.above, self.cache)))}"


def decoder_types() -> list[str]:
    """All types of decoder-only language models of text with a feed-forward network."""
    encoders = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    known = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - encoders - _OTHERS - NO_FFN
    # A model of text and pictures has its language model in the list as a type of its own.
    parts = {"attn_config", "ffn_config"}
    return sorted(kind for kind in known if set(CONFIG_MAPPING[kind].sub_configs) <= parts)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def tiny_config(kind: str, tokenizer: Any, **given: Any) -> Any:
    """The configuration of a type with sizes shrunk by the names of its fields; what is ``given`` wins."""
    make = CONFIG_MAPPING[kind]
    parameters = signature(make.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty} | make().to_dict()
    given = _EXOTIC.get(kind, {}) | given
    depth, wanted = make().num_hidden_layers, given.get("num_hidden_layers", 2)
    tokens = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer)}
    tokens["pad_token_id"] = tokenizer.pad_token_id
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        rule = next((value for pattern, value in _SIZES if re.fullmatch(pattern, name)), ...)
        if name in tokens:
            found[name] = tokens[name]
        elif name.endswith("_token_id"):
            found[name] = tokenizer.eos_token_id
        elif rule is not ...:
            found[name] = rule
        elif isinstance(default, list | tuple) and len(default) == depth > wanted:
            # An entry a block.
            found[name] = list(default[-wanted:])
    if "kv_lora_rank" in defaults:
        found |= _LATENT
    found |= given
    return make(**{name: value for name, value in found.items() if value is not ...})


def tiny_model(kind: str, tokenizer: Any, **given: Any) -> Any:
    """A random model of a type that fits a tokenizer, in float32, whose own code runs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(kind, tokenizer, **given), dtype=torch.float32
    ).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 1e7:
        raise ValueError(f"it is not tiny: {size / 1e6:.0f}M weights")
    for name in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    with torch.no_grad():
        logits = model(torch.arange(3, 21).view(2, 9)).logits
    if not logits.isfinite().all():
        raise ValueError("its own logits are not finite")
    return model


def check(backbone: Backbone) -> Memory:
    """The checks of the scan; gives the memory of both contexts.

    Raises:
        AssertionError: that says which one failed.
    """
    model, settings = backbone.model, {"learning_rate": 3e-3, "steps": 4}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = Memorizer(backbone, **settings)(CONTEXTS)
    for row, curve in enumerate(memory.curves):
        losses = curve.cross_entropy
        assert losses[-1] < losses[0], f"memorizing does not lower the loss: {losses}"
        alone = Memorizer(backbone, **settings)(CONTEXTS[row]).curve.cross_entropy
        apart = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
        assert apart < 1e-4 * losses[0], f"a batch is not its single runs: losses differ by {apart:.1e}"
    apart = difference_by_steps(backbone)
    assert apart < 1e-4, f"the model read token by token has other logits, by {apart:.1%}"
    ids = torch.tensor([encode_prompt(backbone, QUESTION, CONTEXTS[0])])
    own = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        eos_token_id=backbone.stop_ids, pad_token_id=backbone.pad_id,
    )  # fmt: skip
    expected = backbone.tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True)
    (found,) = answer(backbone, QUESTION, CONTEXTS[0], max_new_tokens=8)
    assert found == expected, f"zero-shot is not generate: {found!r}, not {expected!r}"
    for decoder in ("greedy", "cd"):
        answer(backbone, [QUESTION] * 2, CONTEXTS, memory, decoder=decoder, max_new_tokens=6)
    after = model.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert not changed, f"weights of the model were written to: {', '.join(changed)}"
    return memory


@torch.no_grad()
def difference_by_steps(backbone: Backbone) -> float:
    """How far logits of trunk and tail, read token by token, are from the model's own, relative to these."""
    ids, tail = torch.tensor([encode_prompt(backbone, QUESTION)]), backbone.tail()
    caches = [None, None] if cache_of(backbone) == "none" else [backbone.new_cache(), backbone.new_cache()]
    states = backbone.new_cache() if tail.keeps_states else None
    found, expected = [], []
    for start, end in zip([0, *range(-6, 0)], [*range(-6, 0), ids.shape[1]], strict=True):
        part = ids[:, (0 if caches[0] is None else start) : end]
        expected.append(backbone.model(part, past_key_values=caches[0]).logits[:, -1])
        inputs = backbone.run_trunk(1, part, cache=caches[1])
        with backbone.numerics():
            hidden = tail.hidden(inputs, tail.base(inputs), None, states)[:, -1]
            found.append(tail.finish_logits(tail.raw_logits(hidden)))
    own = torch.stack(expected)
    return ((torch.stack(found) - own).norm() / own.norm()).item()


def ffn_of(backbone: Backbone) -> str:
    """What the FFN is that memories act on."""
    anatomy, last = backbone.anatomy, backbone.num_blocks - 1
    if anatomy.routed:
        return "routed experts"
    shape = "gated" if "gate" in backbone.tail().ffns[0].shapes else "plain"
    mixture = any(is_experts(module) for module in anatomy.blocks[last].modules())
    return f"shared expert, {shape}" if mixture else f"dense, {shape}"


def above_of(backbone: Backbone) -> str:
    """How what follows the FFN is run."""
    shortcuts = backbone.tail().shortcuts
    replayed = [n for n, part in (("block", shortcuts.block), ("top", shortcuts.top)) if part is None]
    assert backbone.tail().replays == bool(replayed)
    return f"replay ({' and '.join(replayed)})" if replayed else "fast form"


def cache_of(backbone: Backbone) -> str:
    """What the model keeps of what it has read, as fastmem_pl/backbone/cache.py sees it."""
    ids = torch.arange(6)[None]
    cache = backbone.new_cache()
    with torch.no_grad():
        found = backbone.model(ids, use_cache=True)
    if getattr(found, "past_key_values", None) is None:
        return "none"
    backbone.run_trunk(1, ids, cache=cache)
    if not isinstance(continued(cache, 64, torch.tensor([6]), 6), FixedCache):
        kinds = {type(layer).__name__ for layer in cache.layers}
        return "own" if type(cache) is not DynamicCache else f"own ({', '.join(sorted(kinds))})"
    linear = any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)
    return "KV and linear-attention states" if linear else "KV"


def scan_type(kind: str, tokenizer: Any, limit: int = LIMIT) -> Finding:
    """Build a type and check it, within ``limit`` seconds."""
    stage, parts = "not built here", ()
    try:
        with _time_limit(limit):
            model = tiny_model(kind, tokenizer)
            stage = "fails"
            backbone = Backbone(model, tokenizer, name=kind)
            parts = ffn_of(backbone), above_of(backbone), cache_of(backbone)
            check(backbone)
            return Finding(kind, "works", *parts)
    except _Late:
        return Finding(kind, f"{stage}: it took more than {limit} s", *parts)
    except FastMemError as error:
        return Finding(kind, f"refused: {one_line(error)}", *parts)
    except Exception as error:
        return Finding(kind, f"{stage}: {type(error).__name__}: {one_line(error)[:300]}", *parts)


def scan(kinds: Sequence[str], limit: int, say: Callable[[object], None]) -> list[Finding]:
    """Scan types one after the other."""
    tokenizer, found = byte_tokenizer(), []
    for kind in kinds:
        found.append(scan_type(kind, tokenizer, limit))
        say(found[-1])
    say(count_line(found))
    return found


def count_line(found: Sequence[Finding]) -> str:
    """How many of the types work."""
    works = sum(one.works for one in found)
    return f"{works} of {len(found)} types work (transformers {transformers.__version__})"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table(found: Sequence[Finding]) -> str:
    """The table of the page, in Markdown."""
    rows = [("type", "works", "feed-forward network", "above it", "cache")]
    rows += [
        (f"`{one.kind}`", "yes" if one.works else _short(one.result), one.ffn, one.above, one.cache)
        for one in found
    ]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([f"{count_line(found)}:", "", lines[0], "| --- | --- | --- | --- | --- |", *lines[1:]])


def _short(reason: str) -> str:
    # The sentence without details in brackets, and up to what is allowed instead.
    reason = re.sub(r" \([^)]*\)", "", reason.partition("; allowed")[0]).replace("model.backbone: ", "")
    return shorten(reason, 120, placeholder=" …")


def write_page(found: Sequence[Finding], page: Path = PAGE) -> None:
    """Put the table between the two markers of a page."""
    text = page.read_text("utf-8")
    head, _, rest = text.partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    if not end:
        raise SystemExit(f"{page}: it lacks the markers {' and '.join(MARKERS)}")
    page.write_text(f"{head}{MARKERS[0]}\n\n{table(found)}\n\n{MARKERS[1]}{tail}", "utf-8")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("scan", "page"))
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for a type")
    options = parser.parse_args()
    if unknown := sorted(set(options.types) - set(CONFIG_MAPPING)):
        parser.error(f"TYPE: {', '.join(unknown)}: the installed transformers has no such type")
    if options.command == "page" and options.types:
        parser.error("page: it holds all types; leave out TYPE")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    found = scan(options.types or decoder_types(), options.limit, lambda line: print(line, flush=True))
    if options.command == "page":
        write_page(found)


if __name__ == "__main__":
    main()
