"""Checks a reference run of the published code against the package, through the module's own predict step."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import pytest
from conftest import make_module
from tokenizers.processors import TemplateProcessing

from fastmem_pl import Backbone, ContextSample, FastMemModule
from fastmem_pl.data import TASKS, FieldError, RawRecord
from fastmem_pl.decoding import Decoding
from fastmem_pl.metrics import contains_answer, extract_answer, normalize_answer
from fastmem_pl.run.encoding import EncodedSample
from fastmem_pl.run.published import UnlimitedDoLa

# Ten times the spread between two implementations that the traces' README states in its section 6, by the
# learning rate of the run.
_USUAL = {"cross_entropy": 2e-5, "kl": 3e-6, "grad_norm": 3e-4, "first8": 5e-7}
_STRONG = {"cross_entropy": 1e-4, "kl": 2e-3, "grad_norm": 6e-4, "first8": 1.5e-5}
_FEW_TOKENS = {"cross_entropy": 2e-4, "kl": 3e-6, "grad_norm": 5e-2, "first8": 5e-7}
_DELTA_NORM = {1e-5: 1e-5, 3e-5: 1e-5, 3e-4: 2e-4}
# Updates of one size round alike in float32 weights; a delta beside them does not round (docs/LOG.md).
_DELTA_NORM_UNROUNDED = 5e-5
# Answers that nothing limits run into a loop, and on to 399 tokens: the first of them are compared, with
# GOLDEN_TOKENS=399 all.
_LONG = int(os.environ.get("GOLDEN_TOKENS", "100"))
QUIRKS = {
    "layer2": ["norm-every-layer"],
    "dola": ["dola-unlimited"],
    "bos": ["context-round-trip", "parse-special-tokens"],
    "cleanup": ["context-round-trip"],
    "edge": ["parse-special-tokens"],
}


def quirks_of(name: str, settings: Mapping[str, Any], round_weights: bool) -> list[str]:
    """The named options under which a run's traces were made."""
    quirks = ["round-weights"] if round_weights else []
    if settings["model_args"]["train_layer"] > 1 and "fixed" not in name:
        quirks += QUIRKS["layer2"]
    if settings["choose_dola"] and not settings["dola_intended"]:
        quirks += QUIRKS["dola"]
    for part in ("bos", "cleanup", "edge"):
        if part in name:
            quirks += QUIRKS[part]
    return quirks


def method_of(settings: Mapping[str, Any]) -> str:
    decoder = "cd" if settings["choose_cd"] else "dola" if settings["choose_dola"] else None
    if not settings["num_train_epochs"]:
        return decoder or "zero-shot"
    return f"fastmem+{decoder}" if decoder else "fastmem"


def golden_module(name: str, settings: Mapping[str, Any], round_weights: bool = True) -> FastMemModule:
    return make_module(
        methods=[method_of(settings)],
        steps=settings["num_train_epochs"],
        learning_rate=settings["lr"],
        kl_coeff=settings["kl_coeff"],
        num_layers=settings["model_args"]["train_layer"],
        max_context_tokens=settings["data_args"]["doc_token"],
        max_new_tokens=settings["max_new_tokens"],
        dola_layers=list(range(14, 30, 2)),
        published_quirks=quirks_of(name, settings, round_weights),
    )


def make_sample(sample: Mapping[str, Any], settings: Mapping[str, Any]) -> ContextSample:
    """Read a trace's record with the task that its run names; traces of summaries hold no article."""
    task = settings["dataset_name"]
    if settings["task_type"] == "summary":
        context = sample["instruction"].replace("<|endoftext|>", "")
        reference = sample["record"]["gold_answers"]
        return ContextSample(sample["index"], "", task, context, "", (reference,))
    try:
        read = TASKS[task].read(RawRecord(sample["record"]))
    except FieldError:
        # The one empty context of the edge cases, which the reader refuses.
        record = sample["record"]
        answers = (record["sub_answer"],)
        return ContextSample(sample["index"], "", task, record["sub_context"], record["input"] + "?", answers)
    return ContextSample(sample["index"], "", task, read.context, read.question, read.references)


def backbone_of(model_name: str, backbone: Backbone) -> Backbone:
    """The demo model with the tokenizer variant that a run was made with."""
    if model_name == "smollm2":
        return backbone
    tokenizer = copy.deepcopy(backbone.tokenizer)
    if model_name == "smollm2_bos":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    elif model_name == "smollm2_cleanup":
        tokenizer.clean_up_tokenization_spaces = True
        # transformers 5 leaves BPE texts alone without this.
        tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return Backbone(backbone.model, tokenizer)


def check_run(name: str, run: Mapping[str, Any], backbone: Backbone, round_weights: bool = True) -> int:
    """Answer the samples of a run in one batch and compare everything; returns how many were checked."""
    settings, samples = run["settings"], run["samples"]
    backbone = backbone_of(settings["model_args"]["model_name_or_path"], backbone)
    module = golden_module(name, settings, round_weights)
    module.load_backbone("32-true", backbone.device, backbone)
    seen: dict[str, Any] = {}
    fit = module.memorizer.fit

    def spy(encoded):
        seen["memory"] = fit(encoded)
        return seen["memory"]

    module.memorizer.fit = spy

    class Kept(Decoding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen["decoding"] = self

    batch = [make_sample(sample, settings) for sample in samples]
    encoded = [module.encoder(sample) for sample in batch]
    with patch("fastmem_pl.decoding.loop.Decoding", Kept), patch.object(UnlimitedDoLa, "limit", _LONG):
        records = module.predict_step(batch)
    for row, (record, sample) in enumerate(zip(records, samples, strict=True)):
        check_tokens(encoded[row], sample)
        if "train" in sample:
            check_training(seen["memory"], row, sample, settings, module.memory_quirks)
        check_output(record, sample, row, seen["decoding"])
        if "scoring" in sample and len(sample["output"]["ids"]) <= _LONG:
            check_scoring(record, sample["scoring"])
    return len(samples)


def check_bfloat16_run(
    name: str, run: Mapping[str, Any], exact: Mapping[str, Any], backbone: Backbone
) -> int:
    """Check a run of the published bfloat16 setting, which its README gives for information only.

    Token ids must be equal. Its losses fall less than those of float32, since its updates round away; ours
    in bfloat16 must follow float32 instead (``exact``, of the same records).
    """
    settings, samples = run["settings"], run["samples"]
    module = golden_module(name, settings)
    module.load_backbone(
        "bf16-mixed", backbone.device, Backbone(backbone.model, backbone.tokenizer, "bf16-mixed")
    )
    encoded = [module.encoder(make_sample(sample, settings)) for sample in samples]
    for found, sample in zip(encoded, samples, strict=True):
        check_tokens(found, sample)
    if settings["num_train_epochs"]:
        # One of them: a CPU takes a minute for each in bfloat16.
        memory = module.memorizer.fit([encoded[0].context])
        for curve, sample, reference in zip(memory.curves, samples, exact["samples"], strict=False):
            published = [step["ce"] for step in sample["train"]["steps"]]
            wanted = [step["ce"] for step in reference["train"]["steps"]]
            fall = curve.cross_entropy[0] - curve.cross_entropy[-1]
            assert published[0] - published[-1] < 0.8 * (wanted[0] - wanted[-1])
            assert fall == pytest.approx(wanted[0] - wanted[-1], rel=0.01)
    return len(samples)


def check_tokens(found: EncodedSample, sample: Mapping[str, Any]) -> None:
    assert found.prompts["prompt"] == sample["prompt"]["ids"]
    assert found.context.input_ids == sample["memorization"]["ids"]
    assert found.context.header_length == sample["memorization"]["prompt_length"]


def check_training(
    memory, row: int, sample: Mapping[str, Any], settings: Mapping[str, Any], quirks: list[str]
) -> None:
    steps = sample["train"]["steps"]
    limits = _STRONG if settings["lr"] > 1e-4 else _USUAL
    if "norm-every-layer" in quirks:
        # Not among the runs whose spread is stated: its KL is about 12, where float32 has steps of 1e-6.
        limits = {**limits, "kl": 2e-4}
    if steps[0]["n_loss_tokens"] <= 2:
        limits = _FEW_TOKENS
    curve = memory.curves[row]
    for name, key in (("cross_entropy", "ce"), ("kl", "kl"), ("grad_norm", "grad_norm")):
        assert getattr(curve, name) == pytest.approx([step[key] for step in steps], abs=limits[name])
    assert curve.kl[0] == 0.0
    for key, golden in sample["train"]["deltas"].items():
        layer = int(key.split(".")[2]) - 30 + memory.num_layers
        delta = memory.deltas[layer][key.split(".")[4].removesuffix("_proj")][row]
        limit = _DELTA_NORM[settings["lr"]] if "round-weights" in quirks else _DELTA_NORM_UNROUNDED
        assert delta.double().norm().item() == pytest.approx(golden["delta_l2"], rel=limit)
        assert delta[0, :8].tolist() == pytest.approx(golden["delta_row0_first8"], abs=limits["first8"])


def check_output(record: Mapping[str, Any], sample: Mapping[str, Any], row: int, decoding: Decoding) -> None:
    golden = sample["output"]
    whole = len(golden["ids"]) <= _LONG
    assert record["token_ids"] == golden["ids"][:_LONG]
    assert not whole or record["prediction"] == golden["text"]
    if "dola" in golden:
        assert not whole or record["dola_layers"] == golden["dola"]["layer_histogram"]
        chosen = [decoding.decoder.early_layers[place] for place in decoding.notes[row]]
        assert chosen == golden["dola"].get("layers_all_steps", chosen)[:_LONG]


def check_scoring(record: Mapping[str, Any], golden: Mapping[str, Any]) -> None:
    assert extract_answer(record["prediction"]) == golden["output_answer"]
    assert normalize_answer(golden["output_answer"]) == golden["normalized_output"]
    assert [normalize_answer(a) for a in golden["answers"]] == golden["normalized_answers"]
    assert bool(record["scores"]["accuracy"]) == golden["matched"]
    assert contains_answer(golden["output_answer"], golden["answers"], published=True) == golden["matched"]
