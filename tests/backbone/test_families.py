"""Models of all kinds: what the scan of benchmarks/families.py checks, and what is particular about mixtures."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CONTEXTS, assert_untouched, make_tokenizer, snapshot
from memories import (
    OTHER,
    QUESTIONS,
    TEXT,
    assert_deltas,
    cut_at_end,
    generated,
    labels_of,
    log_probs,
    loss_of,
)
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from fastmem_pl import (
    Backbone,
    FastMemError,
    MemorizationModule,
    MemorizationSettings,
    Memorizer,
    Memory,
    answer,
    generator,
)
from fastmem_pl.export import to_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(BENCHMARKS))
    families = importlib.import_module("families")

pytestmark = pytest.mark.usefixtures("one_thread")

STRONG = {"steps": 5, "learning_rate": 2e-2}
FAST, KV, LINEAR = "fast form", "KV", "KV and linear-attention states"
GATED, PLAIN, SHARED, ROUTED = "dense, gated", "dense, plain", "shared expert, gated", "routed experts"
INKLING = "own (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)"
SAMPLE: dict[str, tuple[str, str, str]] = {
    "llama": (GATED, FAST, KV),
    "phi3": (GATED, FAST, KV),  # gate and up in one matrix
    "starcoder2": (PLAIN, FAST, KV),
    "opt": (PLAIN, FAST, KV),  # both matrices in the block itself
    "bloom": (PLAIN, FAST, KV),  # takes the residual
    "mpt": (PLAIN, FAST, KV),
    "falcon": (PLAIN, FAST, KV),  # adds attention to the FFN's output, in place
    "gpt2": (PLAIN, FAST, KV),  # Conv1D
    "glm4": (GATED, FAST, KV),  # post norm
    "cohere": (GATED, FAST, KV),  # scale on the logits
    "granite": (GATED, FAST, KV),  # scale on the FFN's output too
    "gemma3n_text": (GATED, "replay (block and top)", KV),
    "gemma4_text": (GATED, "replay (block)", KV),
    "deepseek_v4": (SHARED, "replay (block and top)", "own (DeepseekV4CSACache, DeepseekV4HCACache)"),
    "qwen2_moe": (SHARED, "replay (block)", KV),  # a gate on the shared expert
    "deepseek_v3": (SHARED, FAST, KV),
    "qwen3_moe": (ROUTED, FAST, KV),
    "mixtral": (ROUTED, FAST, KV),
    "gpt_oss": (ROUTED, FAST, KV),  # transposed, with biases
    "olmoe": (ROUTED, FAST, KV),
    "llama4_text": (SHARED, FAST, KV),  # positions of all rows in one dimension
    "qwen3_next": (SHARED, "replay (block)", LINEAR),
    "falcon_h1": (GATED, FAST, "own (LinearAttentionAndFullAttentionLayer)"),
    "jamba": (ROUTED, FAST, LINEAR),
    "lfm2": (GATED, FAST, LINEAR),
    "nemotron_h": ("shared expert, plain", FAST, "own (DummyLayer, DynamicLayer, LinearAttentionLayer)"),
    "bamba": (GATED, FAST, LINEAR),
    "minimax": (ROUTED, FAST, "own"),
    "openai-gpt": (PLAIN, "replay (block)", "none"),
    "nanochat": (PLAIN, FAST, KV),  # calls its final norm on the embeddings too
    "inkling_text": (ROUTED, "replay (block)", INKLING),  # a convolution after its FFN
    "zamba": (SHARED, "replay (block)", "own (LinearAttentionAndFullAttentionLayer, LinearAttentionLayer)"),
    "longcat_flash": (SHARED, FAST, KV),  # two FFNs in a block, with attention in between
}
# What the package does not work on yet: where, and why.
REFUSED = {
    "dbrx": "DbrxForCausalLM (does not run .*without values|has no feed-forward network)",
    "jetmoe": "JetMoeForCausalLM does not run .*without values",
    "zamba2": "the last block of Zamba2ForCausalLM has no feed-forward network",
    "mamba": "the last block of MambaForCausalLM has no feed-forward network",
    "rwkv": "the last block of RwkvForCausalLM has no feed-forward network",
}


def new_backbone(kind: str, experts: str = "auto", **given: Any) -> Backbone:
    """A tiny random model of a type; ``given`` are fields of its configuration."""
    tokenizer = make_tokenizer()
    return Backbone(families.tiny_model(kind, tokenizer, **given), tokenizer, name=kind, experts=experts)


# Nothing writes to them.
backbone_of = cache(new_backbone)


@pytest.mark.parametrize(
    "kind",
    [
        *sorted(SAMPLE),
    ],
)
def test_a_type_works(kind: str) -> None:
    backbone = backbone_of(kind)
    families.check(backbone)
    assert (families.ffn_of(backbone), families.above_of(backbone), families.cache_of(backbone)) == SAMPLE[
        kind
    ]


@pytest.mark.slow
def test_all_types_work_but_known_ones() -> None:
    command = [sys.executable, str(BENCHMARKS / "families.py"), "scan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    *lines, count = done.stdout.splitlines()
    results = dict(line.split(": ", 1) for line in lines)
    failing = {kind: result for kind, result in results.items() if not result.startswith("works; ")}
    assert {kind: result for kind, result in failing.items() if not result.startswith("refused: ")} == {}
    assert failing.keys() <= REFUSED.keys()
    assert len(results) - len(failing) >= 121
    assert count.startswith(f"{len(results) - len(failing)} of {len(results)} types work")


@pytest.mark.parametrize(
    "kind",
    ["dbrx", "jetmoe", "zamba2", "mamba", "rwkv"],
)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    model = families.tiny_model(kind, make_tokenizer())
    with pytest.raises(FastMemError, match=REFUSED[kind]):
        Backbone(model, make_tokenizer())


def test_a_scan_goes_on_after_a_failure(monkeypatch, tmp_path: Path) -> None:
    """A line for each type, and a page made of what was found."""

    plain = families.tiny_model

    def build(kind: str, tokenizer: Any) -> Any:
        while kind == "slow":
            # As code that handles every exception.
            with contextlib.suppress(Exception):
                sum(range(1000))
        if kind == "broken":
            raise ValueError("no | such\nmodel")
        return plain(kind, tokenizer)

    monkeypatch.setattr(families, "tiny_model", build)
    said: list[str] = []
    families.scan(["slow"], 1, lambda line: said.append(str(line)))
    assert said[0] == "slow: not built here: it took more than 1 s"
    found = families.scan(["broken", "llama"], 600, lambda line: said.append(str(line)))
    assert said[2:4] == [
        "broken: not built here: ValueError: no | such model",
        f"llama: works; {GATED}; {FAST}; {KV}",
    ]
    assert said[4].startswith("1 of 2 types work (transformers ")
    page = tmp_path / "page.md"
    page.write_text(f"# Families\n\n{families.MARKERS[0]}\nold\n{families.MARKERS[1]}\n\nThe end.\n")
    for _ in range(2):
        families.write_page(found, page)
        text = page.read_text()
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1
        assert rows[-1] == f"| `llama` | yes | {GATED} | {FAST} | {KV} |"
        assert text.startswith("# Families\n\n<!--")
        assert text.endswith("\n\nThe end.\n")
        assert "old" not in text


def test_the_page_lists_every_type() -> None:
    text = families.PAGE.read_text("utf-8").partition(families.MARKERS[0])[2]
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == families.decoder_types()


def replaying(backbone: Backbone) -> Backbone:
    """The same backbone without fast forms."""
    twin = copy.copy(backbone)
    twin._shortcuts = replace(backbone._shortcuts, block=None, top=None)
    twin._tails, twin._trunks, twin._kinds = {}, {}, {}
    return twin


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        *(
            ("llama", 1),
            ("llama", 2),
            ("gemma2", 1),
            ("gemma2", 2),
            ("cohere", 1),
            ("granite", 1),
            ("glm4", 1),
        ),
        *(("gpt2", 1), ("opt", 1), ("bloom", 1), ("qwen3_moe", 1), ("deepseek_v3", 1)),
        *(("jamba", 1), ("bamba", 1)),
        ("falcon", 1),
        ("llama4_text", 1),
    ],
)
def test_a_replay_is_the_fast_form(kind: str, layers: int) -> None:
    fast = backbone_of(kind, **({"num_hidden_layers": 4} if layers > 1 else {}))
    slow = replaying(fast)
    assert slow.tail(layers).replays
    assert not fast.tail(layers).replays
    # A small learning rate: large ones make much of rounding.
    settings = {"steps": 4, "learning_rate": 1e-3, "num_layers": layers}
    one, other = (Memorizer(backbone, **settings)(list(CONTEXTS)) for backbone in (fast, slow))
    for found, expected in zip(other.curves, one.curves, strict=True):
        for name in ("cross_entropy", "kl", "grad_norm"):
            values = getattr(found, name), getattr(expected, name)
            assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-6), name
    assert_deltas(other, one, 1e-3)
    for decoder in ("greedy", "cd"):
        for context in (None, list(CONTEXTS[:3])):
            given = {"decoder": decoder, "max_new_tokens": 8}
            texts = answer(fast, QUESTIONS, context, one.rows(range(3)), **given)
            assert answer(slow, QUESTIONS, context, other.rows(range(3)), **given) == texts


def positions_by_expert(backbone: Backbone, ids: list[int], first: int) -> Counter[int]:
    """How often the router of the last block sends label positions, from ``first`` on, to each expert."""
    seen: list[torch.Tensor] = []
    experts = backbone.anatomy.experts(-1)
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        backbone.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return Counter(seen[0].view(len(ids), -1)[first:-1].flatten().tolist())


RATE, COEFFICIENT, STEPS, BOUND = 5e-3, 0.3, 4, 0.02


def plain_training(
    memorizer: Memorizer, context: str, places: list[str], chosen: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[tuple[float, float, float]]]:
    """Train weights of the model by their names, of experts the chosen ones', with autograd and AdamW.

    Returns their changes, and cross-entropy, KL and gradient norm by step.
    """
    model, encoded = memorizer.backbone.model, [memorizer.encode(context)]
    state = dict(model.named_parameters())
    base = [state[place].detach() for place in places]
    rows = [(w if chosen is None else w[chosen]).clone().requires_grad_() for w in base]

    def edited(input_ids: torch.Tensor) -> Any:
        whole = rows
        if chosen is not None:
            whole = [w.index_copy(0, chosen, part) for w, part in zip(base, rows, strict=True)]
        return functional_call(model, dict(zip(places, whole, strict=True)), (input_ids,))

    with torch.no_grad():
        reference = log_probs(model, encoded)
    optimizer = torch.optim.AdamW(rows, lr=RATE, weight_decay=0.01)
    curve = []
    for _ in range(STEPS):
        log_p = log_probs(edited, encoded)
        cross_entropy = F.nll_loss(log_p, labels_of(encoded))
        kl = F.kl_div(log_p, reference, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (cross_entropy + COEFFICIENT * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(rows, BOUND)
        optimizer.step()
        curve.append((cross_entropy.item(), kl.item(), norm.item()))
    before = base if chosen is None else [weight[chosen] for weight in base]
    return [part.detach() - weight for part, weight in zip(rows, before, strict=True)], curve


def assert_curve(memory: Memory, row: int, curve: list[tuple[float, float, float]]) -> None:
    found = memory.curves[row]
    for name, values in zip(("cross_entropy", "kl", "grad_norm"), zip(*curve, strict=True), strict=True):
        assert getattr(found, name) == pytest.approx(values, rel=2e-4, abs=2e-6), name
    assert found.grad_norm[0] > BOUND, "nothing was clipped"
    assert found.cross_entropy[-1] < found.cross_entropy[0]


def own_memorizer(kind: str, **settings: Any) -> Memorizer:
    settings = {"learning_rate": RATE, "kl_coeff": COEFFICIENT, "steps": STEPS, **settings}
    return Memorizer(backbone_of(kind), max_grad_norm=BOUND, **settings)


@pytest.mark.parametrize(
    "kind",
    [
        *("phi3", "opt", "bloom", "mpt", "gpt2", "glm4", "cohere", "granite", "gemma3n_text", "gemma4_text"),
        *("deepseek_v4", "qwen2_moe", "deepseek_v3", "qwen3_next", "falcon_h1", "lfm2", "nemotron_h"),
        *("openai-gpt", "apertus", "bitnet"),
        "falcon",
        "llama4_text",
        "nanochat",
    ],
)
def test_memories_are_the_ffns_own_training(kind: str) -> None:
    memorizer = own_memorizer(kind)
    anatomy = memorizer.backbone.anatomy
    names = {module: name for name, module in anatomy.model.named_modules()}
    places = [f"{names[module]}.weight" for module in anatomy.site_modules(memorizer.backbone.num_blocks - 1)]
    contexts = [TEXT, CONTEXTS[1]]
    memory, before = memorizer(contexts), snapshot(memorizer.backbone)
    for row, context in enumerate(contexts):
        changes, curve = plain_training(memorizer, context, places)
        assert_curve(memory, row, curve)
        found = [delta[row] for delta in memory.deltas[0].values()]
        norms = [sum(t.square().sum().item() for t in tensors) ** 0.5 for tensors in (changes, found)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert_untouched(memorizer.backbone, before)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *((kind, 2) for kind in ("qwen3_moe", "gpt_oss", "mixtral", "minimax", "jamba")),
        *((kind, None) for kind in ("gpt_oss", "minimax", "deepseek_v3", "nemotron_h")),
        ("qwen3_moe", None),
        ("mixtral", None),
    ],
)
def test_routed_memories_are_the_experts_own_training(kind: str, count: int | None) -> None:
    """Gradients reach the rows of the experts that the context uses most, and no others."""
    memorizer = own_memorizer(kind, experts="routed", max_experts=count)
    backbone, contexts = memorizer.backbone, [TEXT, CONTEXTS[1]]
    memory, before = memorizer(contexts), snapshot(backbone)
    experts = backbone.anatomy.experts(backbone.num_blocks - 1)
    name = {module: name for name, module in backbone.model.named_modules()}[experts]
    places = [f"{name}.{'gate_up_proj' if experts.has_gate else 'up_proj'}", f"{name}.down_proj"]
    for row, context in enumerate(contexts):
        encoded = memorizer.encode(context)
        chosen = memory.deltas[0]["experts"][row, :, 0]
        used = positions_by_expert(backbone, encoded.input_ids, encoded.header_length - 1)
        assert len(chosen) == (count or len(before[places[0]]))
        chosen = chosen[chosen >= 0]
        assert [used[expert] for expert in chosen.tolist()] == sorted(used.values())[::-1][:count]
        (up, down), curve = plain_training(memorizer, context, places, chosen)
        assert_curve(memory, row, curve)
        if experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        deltas = memory.deltas[0]
        for found, expected in (
            (deltas["up"][row], up.flatten(0, 1)),
            (deltas["down"][row], down.transpose(0, 1).flatten(1)),
        ):
            place = tuple(slice(size) for size in expected.shape)
            assert (found[place] - expected).norm() < 2e-3 * expected.norm()
            rest = found.clone()
            rest[place] = 0
            assert not rest.any(), "an expert that is not used was changed"
    assert_untouched(backbone, before)


def texts_of(backbone: Backbone, rows: list[list[int]]) -> list[str]:
    return [
        backbone.tokenizer.decode(row, skip_special_tokens=True)
        for row in cut_at_end(rows, backbone.stop_ids)
    ]


# Of one length: DeepSeek V4's own code reads padding.
PAIR = ["Where is the tower?", "Who built the tower"]


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        *(("qwen3_moe", "auto"), ("gpt_oss", "auto"), ("minimax", "auto"), ("qwen2_moe", "auto")),
        *(("deepseek_v3", "auto"), ("opt", "auto"), ("bloom", "auto"), ("qwen3_next", "auto")),
        *(("falcon_h1", "auto"), ("glm4", "auto"), ("jamba", "auto")),
        *(("llama4_text", "auto"), ("qwen2_moe", "routed"), ("deepseek_v3", "routed")),
        ("deepseek_v4", "auto"),
        ("gemma3n_text", "auto"),
    ],
)
def test_an_attached_memory_answers_as_the_package_does(kind: str, experts: str) -> None:
    backbone = backbone_of(kind)
    memory, before = Memorizer(backbone, experts=experts, **STRONG)([TEXT, OTHER]), snapshot(backbone)
    assert ("experts" in memory.deltas[0]) == (experts == "routed" or SAMPLE[kind][0] == ROUTED)
    settings = {"max_new_tokens": 8}
    expected = answer(backbone, PAIR, None, memory, **settings)
    assert expected != answer(backbone, PAIR, None, None, **settings), "the memory changes nothing"
    prompts = [backbone.chat.prompt(question) for question in PAIR]
    for row, prompt in enumerate(prompts):
        with memory.rows([row]).attached(backbone.model):
            found = generated(backbone.model, [prompt], **settings)
        assert texts_of(backbone, found) == [expected[row]]
        own = generator(backbone, memory.rows([row]))
        found = generated(backbone.model, [prompt], custom_generate=own, **settings)
        assert texts_of(backbone, found) == [expected[row]]
    with memory.attached(backbone.model):
        assert texts_of(backbone, generated(backbone.model, prompts, **settings)) == expected
    assert_untouched(backbone, before)


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3"])
def test_a_routed_memory_attaches_to_a_backbone_on_shared_experts(kind: str) -> None:
    backbone = backbone_of(kind)
    memory = Memorizer(backbone, experts="routed", **STRONG)([TEXT])
    ids = torch.tensor([backbone.chat.prompt(PAIR[0])])
    with torch.no_grad(), memory.attached(backbone.model):
        expected = backbone.model(ids).logits
    with torch.no_grad(), memory.attached(backbone):
        assert torch.equal(backbone.model(ids).logits, expected)


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        *(("qwen3_moe", "auto"), ("gpt_oss", "auto"), ("mixtral", "auto"), ("qwen2_moe", "auto")),
        *(("qwen2_moe", "routed"), ("deepseek_v3", "routed")),
    ],
)
def test_files_and_checkpoints_keep_the_answers(tmp_path: Path, kind: str, experts: str) -> None:
    backbone = backbone_of(kind)
    memory = Memorizer(backbone, experts=experts, max_experts=3, **STRONG)([TEXT])
    settings = {"max_new_tokens": 8}
    expected = answer(backbone, QUESTIONS, None, memory, **settings)
    assert expected != answer(backbone, QUESTIONS, None, None, **settings)
    memory.save(tmp_path / "notes.fastmem")
    fingerprint = backbone.fingerprint()
    for loaded in (
        Memory.load(tmp_path / "notes.fastmem"),
        Memory.load(tmp_path / "notes.fastmem", fingerprint),
        Memory.load(tmp_path / "notes.fastmem", backbone),
    ):
        assert_deltas(loaded, memory)
        assert answer(backbone, QUESTIONS, None, loaded, **settings) == expected
    before = snapshot(backbone)
    report = to_checkpoint(memory, backbone, tmp_path / "out", context=TEXT)
    assert_untouched(backbone, before)
    assert report.kl < 1e-6 < report.kl_base
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = generated(plain, [backbone.chat.prompt(question) for question in QUESTIONS], **settings)
    assert texts_of(backbone, found) == expected


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "deepseek_v4", "qwen3_next"])
def test_routed_experts_beside_shared_ones(kind: str) -> None:
    """Both kinds of memory of one backbone, each with the other's experts as they are."""
    backbone = backbone_of(kind)
    before, settings = snapshot(backbone), {"max_new_tokens": 8}
    memories = {
        experts: Memorizer(backbone, experts=experts, **STRONG)([TEXT, OTHER])
        for experts in ("routed", "shared")
    }
    assert "experts" in memories["routed"].deltas[0]
    assert "experts" not in memories["shared"].deltas[0]
    for memory in memories.values():
        assert all(curve.cross_entropy[-1] < curve.cross_entropy[0] for curve in memory.curves)
        for decoder in ("greedy", "cd"):
            together = answer(backbone, PAIR, None, memory, decoder=decoder, **settings)
            for row, question in enumerate(PAIR):
                one = memory.rows([row])
                assert answer(backbone, question, None, one, decoder=decoder, **settings) == [together[row]]
    own = new_backbone(kind, experts="routed")
    assert_deltas(Memorizer(own, **STRONG, experts="routed")([TEXT, OTHER]), memories["routed"])
    assert_untouched(backbone, before)


def test_a_model_without_such_experts_says_which_it_has() -> None:
    for kind, experts in (("llama", "routed"), ("llama4_text", "routed"), ("qwen3_moe", "shared")):
        with pytest.raises(
            FastMemError, match=rf"model\.memorize\.experts: .* no {experts} experts; allowed: auto"
        ):
            Memorizer(backbone_of(kind), experts=experts)
    with pytest.raises(
        FastMemError, match="num_layers: 2 is more than one, which memories on routed experts"
    ):
        Memorizer(backbone_of("qwen3_moe"), num_layers=2)


@pytest.mark.parametrize("decoder", ["greedy", "cd"])
@pytest.mark.parametrize(
    "kind", ["qwen3_next", "falcon_h1", "jamba", "lfm2", "minimax", "qwen3_moe", "openai-gpt"]
)
def test_rows_that_leave_a_batch_change_no_others(kind: str, decoder: str) -> None:
    backbone = backbone_of(kind)
    questions = [*QUESTIONS, "And why, of all the places by the river, there?"]
    memory = Memorizer(backbone, **STRONG)([TEXT, OTHER, CONTEXTS[1], CONTEXTS[3]])
    settings = {"decoder": decoder, "max_new_tokens": 14}
    alone = [
        answer(backbone, question, None, memory.rows([row]), **settings)[0]
        for row, question in enumerate(questions)
    ]
    assert answer(backbone, questions, None, memory, **settings) == alone
    # A letter that ends some answers when others go on.
    letters = sorted({letter for text in alone for letter in text} - {"\ufffd"})
    cuts = {letter: [text.partition(letter)[0] for text in alone] for letter in letters}
    stop, cut = max(cuts.items(), key=lambda item: len({len(text) for text in item[1]}))
    assert len({len(text) for text in cut}) > 1, "all rows end together"
    assert answer(backbone, questions, None, memory, stop=(stop,), **settings) == cut


def test_going_on_from_a_routed_memory_trains_its_experts() -> None:
    backbone = backbone_of("mixtral")
    memorizer = Memorizer(backbone, **STRONG, max_experts=2)
    first = memorizer([TEXT])
    # One that uses others, or in another order.
    experts = first.deltas[0]["experts"]
    texts = [*CONTEXTS, *QUESTIONS, "aaaa", "Zz 9", "..."]
    other = next(text for text in texts if not torch.equal(memorizer(text).deltas[0]["experts"], experts))
    encoded = [memorizer.encode(other)]
    module = MemorizationModule(memorizer.backbone, 1, memorizer.settings, start=first)
    with torch.no_grad(), first.attached(backbone.model):
        expected = loss_of(backbone.model, *encoded)
    loss = module.losses(memorizer.prepare(encoded, first)).cross_entropy.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(FastMemError, match="start: the memory holds 2 experts, the settings 4"):
        MemorizationModule(Memorizer(backbone, max_experts=4).backbone, 1, memorizer.settings, start=first)
    with pytest.raises(FastMemError, match=r"Memory\.stack: .* of different numbers of them"):
        Memory.stack([first, Memorizer(backbone, **STRONG, max_experts=3)([OTHER])])
    module = MemorizationModule(memorizer.backbone, 1, memorizer.settings)
    with pytest.raises(FastMemError, match=r"call choose_experts\(\[batch\]\) before the fit"):
        module.configure_optimizers()


@pytest.mark.parametrize(
    "kind", ["gemma2", "gemma3_text", "olmo2", "glm4", "openai-gpt", "qwen2_moe", "bloom"]
)
def test_each_layer_has_norms_of_its_own(kind: str) -> None:
    model = families.tiny_model(kind, make_tokenizer(), num_hidden_layers=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    backbone, ids = Backbone(model, make_tokenizer()), torch.randint(3, 250, (2, 12))
    for num_layers in (1, 2):
        tail, inputs = backbone.tail(num_layers), backbone.run_trunk(num_layers, ids)
        with backbone.numerics():
            found = tail.finish_logits(tail.raw_logits(tail.hidden(inputs, tail.base(inputs))))
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_sparse_middle_keeps_nothing_of_a_batch() -> None:
    backbone = backbone_of("deepseek_v4")
    module = MemorizationModule(backbone, 1, MemorizationSettings())
    deltas = [weakref.ref(delta) for delta in module.deltas.parameters()]
    memorizer = Memorizer(backbone)
    module.losses(memorizer.prepare([memorizer.encode(TEXT)])).total.sum().backward()
    del module
    gc.collect()
    assert [delta() for delta in deltas] == [None] * len(deltas)
