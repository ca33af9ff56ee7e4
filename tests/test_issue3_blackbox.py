"""Black-box checks of the whole method: every decoder, task, option and score, as a user sees them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import statistics
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import (
    FAMILY_CONFIGS,
    SHARED,
    assert_untouched,
    make_model,
    make_module,
    make_tokenizer,
    snapshot,
)
from rouge_score.rouge_scorer import RougeScorer
from test_issue_blackbox import FIELDS, HOTPOT, MEMOTRAP, NQ, QA, files, read, write
from tokenizers import pre_tokenizers
from torch.nn import functional as F

import fastmem_pl
from fastmem_pl import FastMemDataModule, FastMemError, FastMemTrainer, Memorizer
from fastmem_pl.cli import main

METHODS = ["zero-shot", "one-shot", "cad", "dola", "fastmem", "fastmem+cd", "fastmem+cad", "fastmem+dola"]
QUIRKS = ["norm-every-layer", "round-weights", "dola-unlimited", "context-round-trip", "parse-special-tokens"]
QA_SCORES = {"accuracy", "contained", "exact_match", "f1", "format_failure"}
ROUGE = {"rouge1", "rouge2", "rougeL", "rougeLsum"}
MODEL_SCORES = {"bert_precision", "factkb"}
SUMMARIES = [
    {"article": "The cats sat on a red mat.\nA dog barked.", "summary": "The cat slept.\nA dog barked."},
    {"article": "Zoë's river rose by the mill.", "summary": "the cats slept soundly, as a river rose"},
    {"article": "Rain fell; nothing else happened that day in the long valley.", "summary": "Rain."},
]
SUMMARY_TASKS = ("xsum", "cnndm", "wikihow", "summary")
NO_SWAP = [record | {"sub_context": "Nobody reads this.", "sub_answer": "x"} for record in NQ]
ICL = (
    "Please extract from the context the span that best answers the question and provide the answer in the "
    'following format: "The answer is: ...".\nContext: '
)
RECORDS = {"nqswap": NQ, "nq": NO_SWAP, "nqswap_icl": NQ, "nq_icl": NO_SWAP, "memotrap": MEMOTRAP}
RECORDS |= {"hotpotqa": HOTPOT, "qa": QA[:2]} | dict.fromkeys(SUMMARY_TASKS, SUMMARIES)
TEXTS = {  # what stands for {context} and {question} in the prompts
    "nqswap": [(r["sub_context"], r["input"] + "?") for r in NQ],
    "nq": [(r["context"], r["input"] + "?") for r in NQ],
    "nqswap_icl": [(ICL + r["sub_context"], r["input"] + "?") for r in NQ],
    "nq_icl": [(ICL + r["context"], r["input"] + "?") for r in NQ],
    "memotrap": [
        (f'Write a quote that ends in the word "{end}".', f'{start}\nCandidates: "{a}" or "{b}"')
        for end, start, a, b in (
            ("first", "He laughs best who laughs", "first", "last"),
            ("fast", "Slow and steady wins the", "race", "fast"),
        )
    ],
    "hotpotqa": [
        ("The Long is a river.  It is long.\nShort.", "Which river is longer?"),
        ("Bob crossed it.", "Who crossed it?"),
    ],
    "qa": [(r["context"], r["question"]) for r in QA[:2]],
    **{task: [(r["article"], "") for r in SUMMARIES] for task in SUMMARY_TASKS},
}
TOKENIZER = make_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


pytestmark = pytest.mark.usefixtures("one_thread")


answer, stream_answer = fastmem_pl.answer, fastmem_pl.stream_answer


def flags(**settings: object) -> list[object]:
    """Options of the command line; model settings where no section is named."""
    named = {name.replace("__", ".") if "__" in name else f"model.{name}": v for name, v in settings.items()}
    return [part for name, value in named.items() for part in (f"--{name}", value)]


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Answer a task's records in `tmp_path`, by the command line or, faster, the trainer; gives the records."""
    monkeypatch.chdir(tmp_path)

    def call(task: str, methods=METHODS, data=None, run_dir="run", command=None, **settings) -> list[dict]:
        model = {"backbone": tiny_folder, "methods": [*methods], "steps": 2, "learning_rate": 0.01}
        model |= {"max_new_tokens": 3} | {name: v for name, v in settings.items() if "__" not in name}
        model = {name: str(value) if isinstance(value, Path) else value for name, value in model.items()}
        source = {"task": task, "path": str(write(tmp_path / f"{task}.jsonl", data or RECORDS[task]))}
        source |= {name[6:]: value for name, value in settings.items() if "__" in name}
        if command is None:
            trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
            trainer.fit_predict(make_module(**model), FastMemDataModule(**source), run_dir=run_dir)
        else:
            options = flags(**model, **{f"data__{name}": value for name, value in source.items()})
            options += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
            options = [o if isinstance(o, str) else json.dumps(o) for o in options]
            assert main([command, "--run_dir", run_dir, *options]) == 0
        return read(tmp_path / run_dir) if command != "fit" else []

    return call


@pytest.fixture
def refused(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run a command that must be refused in one line, with nothing written; gives the line."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "nq.json", NQ)

    def call(*options: object, command: str = "fit-predict") -> str:
        before = files(tmp_path)
        given = flags(backbone=tiny_folder, data__task="nqswap", data__path="nq.json")
        given += ["--model.methods", "[dola]", "--run_dir", "run", "--trainer.accelerator", "cpu"]
        status = main([command, *map(str, given if command == "fit-predict" else ()), *map(str, options)])
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), f"exit status {status}: {err}"
        assert re.fullmatch(r"fastmem: error: .*\n", err), f"not one line: {err!r}"
        assert files(tmp_path) == before, "something was written"
        return err

    return call


def ids_of(records: list[dict]) -> dict[tuple[int, str], list[int]]:
    return {(r["index"], r["method"]): r["token_ids"] for r in records}


def texts(records: list[dict], method: str) -> list[str]:
    return [r["prediction"] for r in records if r["method"] == method]


def metrics_of(folder: Path, method: str) -> dict:
    return json.loads((folder / "metrics.json").read_text())["groups"]["all"][method]["metrics"]


@cache
def shown(task: str) -> dict[str, str]:
    """What `fastmem tasks TASK` prints under each of its headings."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["tasks", task]) == 0
    _, *parts = re.split(r"^  (\w[^\n]*):$\n", out.getvalue(), flags=re.MULTILINE)
    bodies = [re.sub(r"^    ", "", body, flags=re.MULTILINE).rstrip("\n") for body in parts[1::2]]
    return dict(zip(parts[::2], bodies, strict=True))


def plain_ids(text: str) -> list[int]:
    """Ids of text, one a byte; nothing in it is a control token."""
    return [i for character in text for i in TOKENIZER.encode(character, add_special_tokens=False)]


def plain_prompt(task: str, form: str, sample: int) -> list[int]:
    named = dict(zip(("{context}", "{question}"), TEXTS[task][sample], strict=True))
    text = re.sub("{context}|{question}", lambda found: named[found[0]], shown(task)[form])
    return [START, *plain_ids(f"user\n{text}"), END, *plain_ids("\n"), START, *plain_ids("assistant\n")]


def plain_memorize(context: str, steps: int = 2, layers: int = 1, kl_coeff: float | list[float] = 0.1):
    """The published loop: edit the weights of one model by autograd and torch's AdamW."""
    model, header = make_model(), [START, *plain_ids("assistant\n")]
    ids = torch.tensor([[*header, *plain_ids(context), END]])
    trained = [p for block in model.model.layers[-layers:] for p in block.mlp.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.01)
    reference, curve = None, {"cross_entropy": [], "kl": [], "grad_norm": []}
    for coefficient in kl_coeff if isinstance(kl_coeff, list) else [kl_coeff] * steps:
        logs = model(ids).logits[0, len(header) - 1 : -1].log_softmax(-1)
        reference = logs.detach() if reference is None else reference
        loss = F.nll_loss(logs, ids[0, len(header) :])
        kl = (reference.exp() * (reference - logs)).sum(-1).mean()
        model.zero_grad()
        (loss + coefficient * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for name, value in zip(curve, (loss, kl, norm), strict=True):
            curve[name].append(value.item())
    return model, curve


@torch.no_grad()
def plain_scores(method: str, model, base, ids, bare, settings: dict, histogram: Counter) -> torch.Tensor:
    """Scores of the next token by whole forward passes; DoLa as golden/README.md states it."""
    alpha, penalty = settings.get("alpha", 0.5), settings.get("repetition_penalty")
    found = model(torch.tensor([ids]), output_hidden_states=True)
    scores = found.logits[0, -1]
    if method.endswith("+cd"):
        scores = (1 + alpha) * scores - alpha * base(torch.tensor([ids])).logits[0, -1]
    elif method.endswith("cad"):
        scores = (1 + alpha) * scores - alpha * base(torch.tensor([bare])).logits[0, -1]
    elif method.endswith("dola"):
        mature, penalty, divergence, early = scores.log_softmax(-1), penalty or 1.2, {}, {}
        for i in settings["dola_layers"]:
            early[i] = model.lm_head(found.hidden_states[i][0, -1]).log_softmax(-1)
            middle = (mature.exp() + early[i].exp()) / 2
            divergence[i] = (middle * (2 * middle.log() - mature - early[i])).sum().item()
        chosen = max(divergence, key=divergence.get)
        histogram[chosen] += 1
        kept = mature >= mature.max() + math.log(settings.get("relative_top", 0.1))
        scores = torch.where(kept, mature - early[chosen], -torch.inf)
    seen = torch.tensor(sorted(set(ids)))
    if penalty:
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def check_records(records: list[dict], task: str, count: int, n: int) -> None:
    assert set(ids_of(records)) == {(i, m) for i in range(count) for m in METHODS}
    assert len(records) == count * len(METHODS)
    scores = ROUGE if task in SUMMARY_TASKS else QA_SCORES
    for record in records:
        memorized = "fastmem" in record["method"]
        for field, kind in FIELDS.items():
            assert isinstance(record[field], kind) or (field == "curve" and not memorized), field
        assert (record["task"], record["status"]) == (task, "ok")
        assert 1 <= len(record["token_ids"]) <= n
        assert record["references"]
        assert all(record["references"])
        assert set(record["scores"]) - {"original"} == scores
        assert all(0 <= value <= 1 for value in record["scores"].values())
        histogram = record.get("dola_layers", {"none": len(record["token_ids"])})
        assert ("none" not in histogram) == ("dola" in record["method"])
        assert sum(histogram.values()) == len(record["token_ids"])
        assert (record["seconds"]["memorize"] > 0) == (record["curve"] is not None) == memorized
        if memorized:
            assert {len(values) for values in record["curve"].values()} == {2}
            assert record["curve"]["kl"][0] == pytest.approx(0, abs=1e-6)
            assert record["curve"]["cross_entropy"][1] < record["curve"]["cross_entropy"][0]


@pytest.mark.parametrize("task", RECORDS)
def test_every_method_on_every_task(run, task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = run(task, command="fit-predict")
    check_records(records, task, len(RECORDS[task]), 3)
    printed = capsys.readouterr().out
    for method in METHODS:
        assert re.search(rf"^. {re.escape(method)} ", printed, re.MULTILINE), "not in the table"
        found = [r["scores"] for r in records if r["method"] == method]
        for name in found[0]:
            value = metrics_of(tmp_path / "run", method)[name]["value"]
            assert value == pytest.approx(statistics.mean(scores[name] for scores in found))
    for record in records:  # the prompts are those that are shown
        form = "one-shot" if record["method"] == "one-shot" else "prompt"
        assert record["n_context_tokens"] == len(plain_ids(TEXTS[task][record["index"]][0]))
        assert record["n_prompt_tokens"] == len(plain_prompt(task, form, record["index"])), record["method"]


def test_tasks_shows_the_scores_that_come(run) -> None:
    wrong = {}
    for task in ("nqswap", "memotrap", "nq", "hotpotqa", "qa", "xsum"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(["tasks", task])
        told = set(re.search(r"scores: (.*)", out.getvalue())[1].split(", ")) - MODEL_SCORES
        (record,) = run(task, ["zero-shot"], run_dir=task, data__limit=1)
        if told != set(record["scores"]):
            wrong[task] = told ^ set(record["scores"])
    assert wrong == {}


@pytest.mark.parametrize("task", ["nqswap", "nq", "memotrap", "hotpotqa", "xsum", "cnndm", "wikihow"])
def test_every_method_on_the_real_files(run, task: str) -> None:
    stem = "nqswap" if task == "nq" else task
    path = SHARED / "data" / f"{stem}.{'jsonl' if task in SUMMARY_TASKS else 'json'}"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not in the repository")
    records = run(task, data__path=str(path), data__limit=2, max_context_tokens=80, max_new_tokens=2)
    check_records(records, task, 2, 2)
    assert all((r["n_truncated_tokens"] > 0) == (task != "memotrap") for r in records)


PLAIN = [
    ("nqswap", 1, {"dola_layers": [0, 2]}),
    ("xsum", 1, {"dola_layers": [1], "alpha": 1.0, "relative_top": 1e-4}),
    ("nqswap", 2, {"dola_layers": [1, 2], "relative_top": 1e-3, "repetition_penalty": 1.4}),
]


@pytest.mark.parametrize(("task", "layers", "settings"), PLAIN)
def test_every_method_equals_a_plain_loop(run, task: str, layers: int, settings: dict) -> None:
    limits = {"data__limit": 2, "max_new_tokens": 5, "steps": 10}
    records = run(task, num_layers=layers, kl_coeff=0.5, **settings, **limits)
    base = make_model()
    tuned = [plain_memorize(context, 10, layers, kl_coeff=0.5) for context, _ in TEXTS[task][:2]]
    for record in records:
        i, method, histogram, found = record["index"], record["method"], Counter(), []
        model, curve = tuned[i] if "fastmem" in method else (base, {})
        prompt = plain_prompt(task, "one-shot" if method == "one-shot" else "prompt", i)
        bare = plain_prompt(task, "without context (cad)", i)
        while len(found) < 5 and found[-1:] != [END]:
            scores = plain_scores(method, model, base, prompt + found, bare + found, settings, histogram)
            found.append(scores.argmax().item())
        assert record["token_ids"] == found, method
        assert {int(k): v for k, v in record.get("dola_layers", {}).items() if v} == histogram
        for name in curve:
            assert record["curve"][name] == pytest.approx(curve[name], rel=1e-4, abs=1e-6), name


def test_no_contrast_equals_greedy_and_contrast_does_not(run) -> None:
    found = run("nqswap", alpha=0, max_new_tokens=12, steps=6)
    for method, plain in {"cad": "zero-shot", "fastmem+cd": "fastmem", "fastmem+cad": "fastmem"}.items():
        assert texts(found, method) == texts(found, plain), method
    usual = run("nqswap", max_new_tokens=12, steps=6, run_dir="usual")
    assert len({tuple(texts(usual, method)) for method in METHODS}) == len(METHODS)


SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.9}


@pytest.mark.parametrize(("task", "settings"), [("nqswap", {}), ("xsum", SAMPLED | {"num_layers": 2})])
def test_a_batch_equals_one_by_one(run, task: str, settings: dict) -> None:
    settings = settings | {"max_new_tokens": 6, "stop": ["e", "0"]}
    one, together = (run(task, data__batch_size=b, run_dir=f"b{b}", **settings) for b in (1, 5))
    assert ids_of(one) == ids_of(together)
    assert [r.get("dola_layers") for r in one] == [r.get("dola_layers") for r in together]


def test_seeds(run) -> None:
    def draw(seed: int, name: str) -> dict:
        return ids_of(run("qa", data=[QA[0]] * 3, run_dir=name, temperature=2.0, max_new_tokens=4, seed=seed))

    first, again, other = draw(0, "first"), draw(0, "again"), draw(1, "other")
    assert first == again
    for method in METHODS:
        assert any(first[i, method] != other[i, method] for i in range(3)), method
        assert len({tuple(first[i, method]) for i in range(3)}) > 1, "equal samples are drawn alike"


def test_top_k_1_is_greedy(run) -> None:
    greedy = run("nqswap", max_new_tokens=6)
    drawn = run("nqswap", max_new_tokens=6, temperature=3.0, top_k=1, run_dir="drawn")
    assert ids_of(drawn) == ids_of(greedy)


@pytest.mark.parametrize("limits", [{"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}])
def test_draws_follow_the_softmax_of_the_scores(run, limits: dict) -> None:
    count, temperature, settings = 150, 4.0, {"dola_layers": [0, 2], "relative_top": 0.01}
    methods = ["zero-shot", "cad", "dola", "fastmem+cd"]
    draws = {"temperature": temperature, "max_new_tokens": 1, "data__batch_size": 150, **limits, **settings}
    records = run("qa", methods, [QA[0]] * count, **draws)
    base, (tuned, _) = make_model(), plain_memorize(QA[0]["context"])
    prompts = [plain_prompt("qa", form, 0) for form in ("prompt", "without context (cad)")]
    for method in methods:
        model = tuned if "fastmem" in method else base
        scores = plain_scores(method, model, base, *prompts, settings, Counter())
        p, order = (scores / temperature).softmax(-1).sort(descending=True)
        p = p[: limits.get("top_k")] / p[: limits.get("top_k")].sum()
        p = p * (p.cumsum(-1) - p < limits.get("top_p", 1))
        expected = {t: x for t, x in zip(order.tolist(), (p / p.sum()).tolist(), strict=False) if x}
        assert max(expected.values()) < 0.97, "a test that could not fail"
        drawn = Counter(ids[0] for (_, m), ids in ids_of(records).items() if m == method)
        assert set(drawn) <= set(expected), method
        for token, x in expected.items():
            assert abs(drawn[token] / count - x) < 5 * math.sqrt(x * (1 - x) / count) + 1e-9, (method, token)


def test_answers_end_at_stop_strings_and_limits(run) -> None:
    full = run("nqswap", max_new_tokens=16, data__limit=3)
    for record in full:
        assert len(record["token_ids"]) == 16 or record["token_ids"][-1] == END
        assert END not in record["token_ids"][:-1]
    stops = sorted({s[0] for r in full if (s := re.findall(r"(?<=...)[ -~]{2}(?=...)", r["prediction"]))})
    stopped, cut = run("nqswap", max_new_tokens=16, stop=stops, data__limit=3, run_dir="stopped"), 0
    for before, after in zip(full, stopped, strict=True):
        ends = [before["prediction"].find(stop) for stop in stops if stop in before["prediction"]]
        assert after["prediction"] == before["prediction"][: min(ends, default=None)]
        n = len(after["token_ids"])
        assert sum(after.get("dola_layers", {"": n}).values()) == n
        cut += n < len(before["token_ids"])
    assert cut >= len(full) / 2, "a test that could not fail"
    short = run("nqswap", max_new_tokens=2, data__limit=3, run_dir="short")
    assert ids_of(short) == {key: ids[:2] for key, ids in ids_of(full).items()}


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.95, "seed": 3}])
@pytest.mark.parametrize("decoder", ["greedy", "cd", "cad", "dola"])
def test_streamed_pieces_join_to_the_answer(tiny, contexts: list[str], decoder: str, settings: dict) -> None:
    before, memorizer = snapshot(tiny), Memorizer(tiny, steps=2, learning_rate=0.01)
    for context in contexts[1:2] if settings else contexts[:2]:
        memory = memorizer.fit([memorizer.encode(context)])
        common = {
            "context": context,
            "memory": memory,
            "decoder": decoder,
            "answer_prefix": "So:",
            **settings,
        }
        (whole,) = answer(tiny, "Where?", max_new_tokens=30, **common)
        stops = [whole[i : i + 2] for i in range(5, len(whole) - 1) if "\ufffd" not in whole[i : i + 2]]
        for stop in (None, stops[0], stops[-1]):
            common["stop"] = () if stop is None else (stop,)
            (text,) = answer(tiny, "Where?", max_new_tokens=30, **common)
            assert text == whole[: whole.index(stop, 3) if stop else None]
            assert "".join(stream_answer(tiny, "Where?", max_new_tokens=30, **common)) == text
    assert_untouched(tiny, before)


def test_pieces_come_while_the_answer_is_made(make_tiny) -> None:
    backbone, steps = make_tiny(), []
    backbone.model.get_input_embeddings().register_forward_hook(lambda *_: steps.append(1))
    pieces = stream_answer(backbone, "Where?", "Rome.", max_new_tokens=30)
    next(pieces)
    assert len(steps) < 10
    assert len([*pieces]) > 5
    assert len(steps) >= 20


LAYERS = {"auto": {4, 5, 6, 7}, "high": {4, 5, 6, 7}, "low": {0, 1, 2, 3}}
LAYERS |= {"[3, 5]": {3, 5}, "[0.25, 0.5]": {2, 4}, "[7]": {7}}


@pytest.mark.parametrize("layers", LAYERS)
def test_dola_layers(run, tmp_path: Path, layers: str) -> None:
    make_model(num_hidden_layers=8).save_pretrained(tmp_path / "deep")
    TOKENIZER.save_pretrained(tmp_path / "deep")
    settings = {
        "backbone": tmp_path / "deep",
        "dola_layers": yaml.safe_load(layers),
        "num_layers": 2,
        "max_new_tokens": 8,
        "data__limit": 3,
    }
    for record in run("nqswap", ["dola", "fastmem+dola"], **settings):
        histogram = {int(layer): count for layer, count in record["dola_layers"].items()}
        assert set(histogram) <= LAYERS[layers]
        assert layers[0] != "[" or set(histogram) == LAYERS[layers]
        assert sum(histogram.values()) == len(record["token_ids"])


def test_base_weights_stay_under_the_trainer(make_tiny, tmp_path: Path) -> None:
    backbone = make_tiny()
    before, settings = snapshot(backbone), {"temperature": 1.0, "num_layers": 2, "max_new_tokens": 3}
    module = make_module(backbone.name, METHODS, steps=2, learning_rate=0.01, **settings)
    module.load_backbone("32-true", torch.device("cpu"), backbone)
    data = FastMemDataModule("nqswap", str(write(tmp_path / "nq.json", NQ)))
    trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
    trainer.fit_predict(module, data, run_dir=str(tmp_path / "run"))
    check_records(read(tmp_path / "run"), "nqswap", len(NQ), 3)
    assert_untouched(backbone, before)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_decoder_on_every_family(make_tiny, contexts: list[str], family: str) -> None:
    backbone = make_tiny(family)
    before, memorizer = snapshot(backbone), Memorizer(backbone, steps=2, learning_rate=0.01)
    memory = memorizer.fit([memorizer.encode(context) for context in contexts])
    for decoder in ("greedy", "cd", "cad", "dola"):
        for settings in ({}, {"temperature": 1.0, "top_k": 20}):
            common = {"decoder": decoder, "max_new_tokens": 3, **settings}
            together = answer(backbone, ["Who?"] * 4, contexts, memory, **common)
            for i, context in enumerate(contexts[: 1 if settings else 2]):
                assert answer(backbone, "Who?", context, memory.rows([i]), **common) == [together[i]], decoder
        if decoder in ("cd", "cad"):
            plain = answer(backbone, ["Who?"] * 4, contexts, memory, max_new_tokens=3)
            assert answer(backbone, ["Who?"] * 4, contexts, memory, decoder, 3, alpha=0.0) == plain
    assert_untouched(backbone, before)


@pytest.mark.parametrize(("target", "gain"), [(0.02, 0.1), (0.2, 0.5)])
def test_adaptive_kl_follows_its_paper(run, target: float, gain: float) -> None:
    """Ziegler et al. 2019, section 2.2: e = clip((KL - target) / target, -0.2, 0.2); beta *= 1 + K e."""
    for record in run("nqswap", ["fastmem"], kl_target=target, kl_gain=gain, kl_coeff=3, steps=8):
        curve, beta = record["curve"], [3.0]
        errors = [min(max(kl / target - 1, -0.2), 0.2) for kl in curve["kl"]]
        for error in errors[:-1]:
            beta.append(beta[-1] * (1 + gain * error))
        assert min(errors) < 0 < max(errors), "a test that could not fail"
        assert curve["kl_coeff"] == pytest.approx(beta, rel=1e-5)
        _, plain = plain_memorize(TEXTS["nqswap"][record["index"]][0], kl_coeff=beta)
        assert curve["cross_entropy"] == pytest.approx(plain["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize("task", ["nqswap", "xsum", "nqswap_icl"])
def test_long_contexts_are_cut_off_and_counted(run, task: str, tmp_path: Path) -> None:
    lengths = [len(plain_ids(context)) for context, _ in TEXTS[task]]
    for record in run(task, ["zero-shot", "fastmem"], max_context_tokens=30):
        length = lengths[record["index"]]
        assert record["n_context_tokens"] == min(length, 30)
        assert record["n_truncated_tokens"] == max(length - 30, 0)
        whole = len(plain_prompt(task, "prompt", record["index"]))
        assert record["n_prompt_tokens"] == whole - record["n_truncated_tokens"]
    truncated = metrics_of(tmp_path / "run", "fastmem")["truncated"]["value"]
    assert truncated == pytest.approx(statistics.mean(length > 30 for length in lengths))


def test_a_cut_within_a_character_puts_no_other_in_its_place(run) -> None:
    (record,) = run("nqswap", ["fastmem"], [NQ[2]], max_context_tokens=3)  # "Zo" and half of "ë"
    frame = len(plain_prompt("nqswap", "prompt", 2)) - len(plain_ids(NQ[2]["sub_context"]))
    assert record["n_prompt_tokens"] - frame in (2, 3, 4), "the sign for a broken character takes three"


def test_strict_refuses_to_cut_off(run, refused) -> None:
    line = refused(*flags(max_context_tokens=30, strict="true"))
    assert [part for part in ("max_context_tokens", "30") if part not in line] == []
    assert run("nqswap", ["fastmem"], strict=True, max_context_tokens=100)


def test_chat_template_off_and_system_prompt(run) -> None:
    methods, system = ["zero-shot", "one-shot", "fastmem"], "You are terse: naïve."
    usual = run("nqswap", methods)
    plain = run("nqswap", methods, chat_template=False, run_dir="plain")
    told = run("nqswap", methods, system_prompt=system, run_dir="told")
    frame = len([START, *plain_ids("user\n"), END, *plain_ids("\n"), START, *plain_ids("assistant\n")])
    turn = len([START, *plain_ids(f"system\n{system}"), END, *plain_ids("\n")])
    for with_chat, without, with_system in zip(usual, plain, told, strict=True):
        assert frame - 2 <= with_chat["n_prompt_tokens"] - without["n_prompt_tokens"] <= frame
        assert with_system["n_prompt_tokens"] == with_chat["n_prompt_tokens"] + turn
        assert with_system["n_context_tokens"] == with_chat["n_context_tokens"] == without["n_context_tokens"]
        assert with_system["curve"] == with_chat["curve"]
    assert len({tuple(texts(found, "zero-shot")) for found in (usual, plain, told)}) == 3


@pytest.mark.parametrize("quirk", QUIRKS)
def test_published_quirks(run, quirk: str) -> None:
    settings = {"num_layers": 2, "data__limit": 4}
    usual = run("nqswap", ["dola", "fastmem"], **settings)
    found = run("nqswap", ["dola", "fastmem"], published_quirks=[quirk], run_dir="quirk", **settings)
    for before, after in zip(usual, found, strict=True):
        marked = after["index"] == 3 and quirk == "parse-special-tokens"
        assert after["n_prompt_tokens"] == before["n_prompt_tokens"] - 9 * marked, "<|im_end|> is one token"
        longer = quirk == "dola-unlimited" and after["method"] == "dola" and before["token_ids"][-1] != END
        assert (len(after["token_ids"]) > 3) == longer
        if quirk == "norm-every-layer" and after["curve"]:
            ours, other = after["curve"]["cross_entropy"], before["curve"]["cross_entropy"]
            assert ours[0] == pytest.approx(other[0], rel=1e-6)
            assert ours[1] != pytest.approx(other[1], rel=1e-2)


def test_published_dola_says_399_tokens(run, tmp_path: Path) -> None:
    model = make_model()
    model.lm_head.weight.data[END] = 0  # it hardly ends by itself
    model.save_pretrained(tmp_path / "endless")
    TOKENIZER.save_pretrained(tmp_path / "endless")
    settings = {"backbone": tmp_path / "endless", "published_quirks": ["dola-unlimited"]}
    lengths = {key: len(ids) for key, ids in ids_of(run("qa", ["zero-shot", "dola"], **settings)).items()}
    assert lengths == {(i, m): n for i in range(2) for m, n in (("zero-shot", 3), ("dola", 399))}


@pytest.mark.parametrize("task", SUMMARY_TASKS)
def test_rouge_is_that_of_rouge_score(run, task: str) -> None:
    prefix = "A dog barked.\nThe cat slept, as rain fell"
    records = run(task, ["zero-shot", "fastmem"], data__answer_prefix=prefix)
    for record in records:
        assert record["prediction"].startswith(prefix)
        scores = RougeScorer(sorted(ROUGE)).score(record["references"][0], record["prediction"])
        assert record["scores"] == pytest.approx({name: score.fmeasure for name, score in scores.items()})
    assert any(r["scores"]["rougeLsum"] > r["scores"]["rougeL"] > 0 < r["scores"]["rouge2"] for r in records)


def save_roberta(folder: Path, model_class, seed: int = 0) -> Path:
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=180).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": 261, "max_position_embeddings": 182, "type_vocab_size": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    model_class(transformers.RobertaConfig(initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def metric_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, classifier = tmp_path_factory.mktemp("metrics"), transformers.RobertaForSequenceClassification
    save_roberta(folder / "other", classifier, seed=1)
    return {
        "bertscore_model": save_roberta(folder / "encoder", transformers.RobertaForMaskedLM),
        "factkb_model": save_roberta(folder / "classifier", classifier),
    }


def test_metric_models_are_missed_in_one_line_and_added_later(
    run, metric_models: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [*SUMMARIES, {"article": "No summary is known of this."}]
    common = {"task": "xsum", "methods": ["zero-shot", "fastmem", "fastmem+dola"], "data": data}
    start = time.monotonic()
    common["command"] = "fit-predict"
    first = run(**common, bertscore_model="./nowhere", factkb_model="nobody/nothing-here")
    assert time.monotonic() - start < 20
    said = [record.getMessage() for record in caplog.records]
    assert ["bert_precision" in said[0], "./nowhere" in said[0]] == [True, True]
    assert ["factkb" in said[1], "nobody/nothing-here" in said[1]] == [True, True]
    assert len(said) == 2
    assert "\n" not in "".join(said)
    assert all(set(r["scores"]) == (ROUGE if r["index"] < 3 else set()) for r in first)

    caplog.clear()
    later = run(**common, **metric_models)
    for before, after in zip(first, later, strict=True):
        assert set(after["scores"]) == set(before["scores"]) | MODEL_SCORES, "these need the article only"
        assert all(0 < after["scores"][name] < 1 for name in MODEL_SCORES)
        assert set(after.pop("score_models")) == MODEL_SCORES
        assert after | {"scores": before["scores"]} == before, "answered again"
    for name in MODEL_SCORES:
        values = [r["scores"][name] for r in later if r["method"] == "fastmem"]
        assert len(set(values)) == 4, "a test that could not fail"
        found = metrics_of(tmp_path / "run", "fastmem")[name]
        assert found["value"] == pytest.approx(statistics.mean(values))
        assert found["standard_error"] == pytest.approx(statistics.stdev(values) / 2)

    content = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    run(**common, **metric_models)
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == content
    assert not caplog.records
    for ours, other in zip(later, run(**common, **metric_models, run_dir="fresh"), strict=True):
        assert ours["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_scores_of_two_metric_models_are_not_mixed(run, metric_models: dict) -> None:
    first = run("xsum", ["zero-shot"], **metric_models)
    other = metric_models | {"factkb_model": metric_models["factkb_model"].with_name("other")}
    fresh = run("xsum", ["zero-shot"], run_dir="fresh", **other)
    try:
        again = run("xsum", ["zero-shot"], **other)
    except FastMemError:
        return  # refused, which would do as well
    assert [r["scores"] for r in again] != [r["scores"] for r in first]
    assert [r["scores"] for r in again] == [pytest.approx(r["scores"], abs=1e-5) for r in fresh]


def test_a_summary_file_of_the_users_own(run) -> None:
    data = [{"text": r["article"], "gold": r["summary"], "article": "?"} for r in SUMMARIES]
    records = run("summary", ["zero-shot"], data, data__fields={"article": "text", "summary": "gold"})
    for ours, usual in zip(records, run("summary", ["zero-shot"], run_dir="usual"), strict=True):
        assert ours | {"seconds": 0} == usual | {"seconds": 0}


@pytest.mark.parametrize(
    "bad", [{"article": ""}, {"article": 3}, {"articel": "x"}, {"article": "x", "summary": 3}]
)
def test_a_malformed_summary_record_is_refused(refused, tmp_path: Path, bad: dict) -> None:
    write(tmp_path / "mine.jsonl", [SUMMARIES[0], bad])
    line = refused("--data.task", "cnndm", "--data.path", "mine.jsonl")
    field = "summary" if "summary" in bad else "article"
    assert [part for part in ("mine.jsonl", "line 2", f"'{field}'") if part not in line] == []


def test_fit_then_predict_is_fit_predict(run) -> None:
    both = run("nqswap", max_new_tokens=6)
    for command in ("fit", "predict"):
        apart = run("nqswap", max_new_tokens=6, command=command, run_dir="apart")
    assert ids_of(apart) == ids_of(both)


# option, value, and what the line says beside the option
BAD = """
model.decode.temperature | -0.5 | -0.5 | 0 or above
model.decode.temperature | .nan | nan | 0 or above
model.decode.temperature | warm | 'warm' | float
model.decode.top_p | 0 | 0.0 | above 0
model.decode.top_p | 1.1 | 1.1 | at most 1
model.decode.top_k | -3 | -3 | 0 (all) or above
model.decode.top_k | 2.5 | 2.5 | int
model.decode.relative_top | 0 | 0.0 | above 0
model.decode.relative_top | 1.5 | 1.5 | at most 1
model.decode.repetition_penalty | 0 | 0.0 | above 0
model.decode.alpha | -1 | -1 | 0 or above
model.decode.seed | -1 | -1 | 0 or above
model.decode.dola_layers | hihg | 'hihg' | auto | low | did you mean 'high'
model.decode.dola_layers | [1,3] | 3 is no layer | 0 to 2
model.decode.dola_layers | [-1] | -1 | 0 to 2
model.decode.dola_layers | [] | empty | auto
model.decode.stop | [''] | '' | none empty
model.decode.stop | word | 'word' | list
model.methods | [fastmem+dloa] | 'fastmem+dloa' | zero-shot | did you mean 'fastmem+dola'
model.methods | [oneshot] | 'oneshot' | fastmem+cad | did you mean 'one-shot'
model.published_quirks | [round-weight] | 'round-weight' | dola-unlimited | did you mean 'round-weights'
model.memorize.kl_target | 0 | 0.0 | above 0
model.memorize.num_layers | 4 | 4 | 3
data.task | xsumm | 'xsumm' | wikihow | did you mean 'xsum'
config | nqswp | nqswp | all-methods | did you mean 'nqswap'
config | base,lama3-8b,xsum | lama3-8b | did you mean 'llama3-8b'
config | fastmem+CD | fastmem+CD | did you mean 'fastmem+cd'
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_a_bad_option_is_refused_in_one_line(refused, case: str) -> None:
    option, value, *parts = case.split(" | ")
    line = refused(f"--{option}", value)
    assert [part for part in (option, *parts) if part not in line] == []


def test_tasks_lists_all_and_refuses_unknown_names(refused, capsys: pytest.CaptureFixture) -> None:
    line = refused("xsm", command="tasks")
    assert [part for part in ("'xsm'", "wikihow", "did you mean 'xsum'") if part not in line] == []
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    for task in RECORDS:
        assert re.search(rf"^{task}: ", listed, re.MULTILINE)
        assert {"prompt", "one-shot", "without context (cad)"} <= set(shown(task))
        assert "{context}" not in shown(task)["without context (cad)"]


BAD_CALLS = [
    ({"decoder": "cad"}, ("cad", "context")),
    ({"decoder": "cd", "context": "Bob."}, ("cd", "memory")),
    ({"decoder": "dolla"}, ("decoder", "'dolla'", "did you mean 'dola'")),
    ({"temprature": 1.0}, ("temprature",)),
    ({"temperature": -1.0}, ("temperature", "-1")),
    ({"decoder": "dola", "dola_layers": (9,)}, ("dola_layers", "9", "0 to 2")),
]


@pytest.mark.parametrize(("options", "parts"), BAD_CALLS)
@pytest.mark.parametrize("function", [answer, stream_answer])
def test_bad_calls_from_python(tiny, function, options: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(FastMemError) as caught:
        list(function(tiny, "Who?", **options))
    assert "\n" not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "alpha"])
def test_whole_numbers_do_from_python(tiny, name: str) -> None:
    settings = {"temperature": 2.0, "max_new_tokens": 8, "decoder": "cad", "context": "Rome."}
    expected = answer(tiny, "Where?", **settings | {name: 1.0})
    assert answer(tiny, "Where?", **settings | {name: 1}) == expected


# values of --config, and settings that come out
COMPOSED = """
base,llama3-8b,nqswap,fastmem: {learning_rate: 1.0e-5, kl_coeff: 0.1, steps: 10, max_new_tokens: 100}
base,llama3-8b,cnndm,fastmem: {learning_rate: 3.0e-6, kl_coeff: 1, steps: 10, max_new_tokens: 400}
base,llama3-8b,cnndm,cnndm+cd fastmem+cd: {kl_coeff: 0.01, learning_rate: 3.0e-6, methods: [fastmem+cd], alpha: 0.5}
base llama3-8b xsum fastmem: {learning_rate: 1.0e-5, kl_coeff: 1, max_new_tokens: 400, methods: [fastmem]}
base,llama3-8b xsum,xsum+cd fastmem+cd: {learning_rate: 1.0e-5, kl_coeff: 0.3, steps: 10}
base,llama3-8b,wikihow,fastmem: {learning_rate: 1.0e-5, kl_coeff: 0.03, steps: 20, max_new_tokens: 400}
base,qwen1.5-4b memotrap dola: {backbone: Qwen/Qwen1.5-4B-Chat, task: memotrap, methods: [dola]}
xsum,base: {task: xsum, kl_coeff: 0.1, max_new_tokens: 100}
xsum+cd xsum: {kl_coeff: 1}
dola cad: {methods: [cad]}
cad,dola: {methods: [dola]}
base mine.yaml,xsum: {alpha: 0.25, kl_coeff: 1, steps: 7}
mine.yaml base: {alpha: 0.5, steps: 10, system_prompt: Hi}
"""


@pytest.mark.parametrize(("configs", "expected"), yaml.safe_load(COMPOSED).items())
def test_configs_compose_and_later_ones_win(
    configs: str, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {alpha: 0.25, steps: 7, kl_coeff: 5.0, system_prompt: Hi}\n")
    given = [part for config in configs.split() for part in ("--config", config)]
    assert main(["fit-predict", *given, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    found = settings["model"] | settings["data"]
    assert {name: found[name] for name in expected} == expected


def test_composed_configs_run_and_name_the_folder(run, tiny_folder: Path, tmp_path: Path) -> None:
    usual = run("nqswap", ["cad"])
    options = flags(
        backbone=tiny_folder, max_new_tokens=3, trainer__accelerator="cpu", data__answer_prefix=""
    )
    given = ["--config", "base,smollm2", "--config", "nqswap,cad", "--data.path", tmp_path / "nqswap.jsonl"]
    assert main(["fit-predict", *map(str, given + options)]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert {"smollm2", "nqswap", "cad"} <= set(re.split("[-,_]", folder.name))
    assert ids_of(read(folder)) == ids_of(usual)
