"""Every method on every task, as a run gives them: records, scores, the plain loop and draws."""

import math
import re
import statistics
from collections import Counter

import pytest
from conftest import SHARED, make_model
from decodes import ADAPTIVE, END, TEXTS, plain_ids, plain_memorize, plain_prompt, plain_scores
from rouge_score.rouge_scorer import RougeScorer
from runs import ALL_METHODS, QA, RECORDS, ROUGE, SUMMARY_TASKS, TASKS, ids_of, metrics_of, shown

pytestmark = pytest.mark.usefixtures("one_thread")
QA_SCORES = {"accuracy", "contained", "exact_match", "f1", "format_failure"}
FIELDS = dict.fromkeys(("id", "task", "method", "question", "prediction", "status"), str)
FIELDS |= dict.fromkeys(("index", "output_words", "n_context_tokens", "n_prompt_tokens"), int)
FIELDS |= dict.fromkeys(("scores", "curve", "seconds"), dict)
FIELDS |= dict.fromkeys(("token_ids", "references", "originals"), list)
CURVE = {"cross_entropy": 2, "kl": 2, "grad_norm": 2}
SUMMARY_PREFIX = "A dog barked.\nThe cat slept, as rain fell"


def check_records(records, task, count, n):
    assert Counter((r["index"], r["method"]) for r in records) == Counter(
        (i, m) for i in range(count) for m in ALL_METHODS
    )
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
        adaptive = record["method"].split("+")[-1] in ADAPTIVE
        assert len(record.get("strengths", ())) == adaptive * len(record["token_ids"])
        histogram = record.get("dola_layers", {"none": len(record["token_ids"])})
        assert ("none" not in histogram) == ("dola" in record["method"])
        assert sum(histogram.values()) == len(record["token_ids"])
        assert set(record["seconds"]) == {"memorize", "decode"}
        assert (record["seconds"]["memorize"] > 0) == (record["curve"] is not None) == memorized
        if memorized:
            assert {name: len(values) for name, values in record["curve"].items()} == CURVE
            assert record["curve"]["kl"][0] == pytest.approx(0, abs=1e-6)
            assert record["curve"]["cross_entropy"][1] < record["curve"]["cross_entropy"][0]


@pytest.mark.parametrize("task", RECORDS)
def test_every_method_on_every_task(run_methods, task, tmp_path, capsys):
    prefix = SUMMARY_PREFIX if task in SUMMARY_TASKS else ""
    records = run_methods(task, data__answer_prefix=prefix)
    check_records(records, task, len(RECORDS[task]), 3)
    assert set(shown(task)["scores"].split(", ")) - {"bert_precision", "factkb"} == set(records[0]["scores"])
    printed = capsys.readouterr().out
    for method in ALL_METHODS:
        assert re.search(rf"^. {re.escape(method)} ", printed, re.MULTILINE), "not in the table"
        found = [r["scores"] for r in records if r["method"] == method]
        for name in found[0]:
            value = metrics_of(tmp_path / "run", method)[name]["value"]
            assert value == pytest.approx(statistics.mean(scores[name] for scores in found))
    for record in records:
        form, index = "one-shot" if record["method"] == "one-shot" else "prompt", record["index"]
        assert task not in TASKS or record["references"] == TASKS[task][1][index]
        # a token is a byte here, also in text that looks like a control token
        assert record["n_context_tokens"] == len(plain_ids(TEXTS[task][index][0]))
        asked = plain_prompt(task, form, index) + plain_ids(prefix)
        assert record["n_prompt_tokens"] == len(asked), "not the prompt that is shown"
        if prefix:
            assert record["prediction"].startswith(prefix)
            scores = RougeScorer(sorted(ROUGE)).score(record["references"][0], record["prediction"])
            assert record["scores"] == pytest.approx({name: score.fmeasure for name, score in scores.items()})
    assert not prefix or any(
        r["scores"]["rougeLsum"] > r["scores"]["rougeL"] > 0 < r["scores"]["rouge2"] for r in records
    )


@pytest.mark.parametrize("task", ["nqswap", "nq", "memotrap", "hotpotqa", "xsum", "cnndm", "wikihow"])
def test_every_method_on_the_real_files(run_methods, task):
    stem = "nqswap" if task == "nq" else task
    path = SHARED / "data" / f"{stem}.{'jsonl' if task in SUMMARY_TASKS else 'json'}"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not in the repository")
    records = run_methods(task, data__path=str(path), data__limit=2, max_context_tokens=80, max_new_tokens=2)
    check_records(records, task, 2, 2)
    assert all((r["n_truncated_tokens"] > 0) == (task != "memotrap") for r in records)


PLAIN = [
    ("nqswap", 1, {"dola_layers": [0, 2]}),
    ("xsum", 1, {"dola_layers": [1], "alpha": 1.0, "relative_top": 1e-4}),
    ("nqswap", 2, {"dola_layers": [1, 2], "relative_top": 1e-3, "repetition_penalty": 1.4}),
]


@pytest.mark.parametrize(("task", "layers", "settings"), PLAIN)
def test_every_method_equals_a_plain_loop(run_methods, task, layers, settings):
    limits = {"data__limit": 2, "max_new_tokens": 5, "steps": 10}
    records = run_methods(task, num_layers=layers, kl_coeff=0.5, **settings, **limits)
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


@pytest.mark.parametrize("limits", [{"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}])
def test_draws_follow_the_softmax_of_the_scores(run_methods, limits):
    count, temperature, settings = 150, 4.0, {"dola_layers": [0, 2], "relative_top": 0.01}
    methods = ["zero-shot", "cad", "dola", "fastmem+cd"]
    draws = {"temperature": temperature, "max_new_tokens": 1, "data__batch_size": 150, **limits, **settings}
    records = run_methods("qa", methods, [QA[0]] * count, **draws)
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
