"""Against traces of a reference run of the published code (SmolLM2-135M-Instruct, float32, CPU).

All traces are in ../shared/golden, which a user's clone lacks; those of two hand-written records are in
tests/golden_nqswap.json. What is compared, and how closely, is in golden.py.
"""

import json
from pathlib import Path

import pytest
from conftest import SHARED
from golden import check_bfloat16_run, check_run

from fastmem_pl.data import TASKS, FieldError, RawRecord
from fastmem_pl.metrics import SCORES, contains_answer, extract_answer, normalize_answer

GOLDEN = SHARED / "golden"
SUBSET = json.loads(Path(__file__).with_name("golden_nqswap.json").read_text())
RUNS = [row["run"] for row in json.loads((GOLDEN / "index.json").read_text())] if GOLDEN.is_dir() else []


IN_SHARED = pytest.mark.skipif(not RUNS, reason="needs ../shared/golden, which is not in the repository")
# One run of every kind, for a second pass on the default path.
DEFAULT_PATH = [
    "edge__fastmem",
    "memotrap__fastmem_cd",
    "nqswap2__bos_fastmem",
    "nqswap2__layer2_fixed_fastmem_cd",
    "realnqswap__fastmem",
    "xsum__fastmem_cd",
]


# Those that `make test` runs, where the traces are.
QUICK = ["edge__fastmem", "memotrap__fastmem_cd", "nqswap2__layer2_fastmem", "nqswap_icl2__fastmem"]


def read_run(name):
    return json.loads((GOLDEN / "runs" / f"{name}.json").read_text())


@pytest.mark.demo
@pytest.mark.parametrize("name", sorted(SUBSET))
@pytest.mark.parametrize("round_weights", [True, False], ids=["rounded", "default"])
def test_subset(demo, name, round_weights):
    assert check_run(name, SUBSET[name], demo, round_weights) == len(SUBSET[name]["samples"])


@pytest.mark.demo
@IN_SHARED
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS or ["none"]]
)
def test_run(demo, record_property, name):
    run = read_run(name)
    if run["settings"]["mixed_precision"] == "bf16":
        count = check_bfloat16_run(name, run, read_run("nqswap__fastmem"), demo)
        record_property("golden records, bfloat16", count)
    else:
        record_property("golden records", check_run(name, run, demo))


@pytest.mark.demo
@pytest.mark.slow
@IN_SHARED
@pytest.mark.parametrize("name", DEFAULT_PATH)
def test_run_without_rounded_weights(demo, name):
    """The default keeps exact deltas; answers and curves must be the recorded ones all the same."""
    assert check_run(name, read_run(name), demo, round_weights=False)


@pytest.mark.demo
def test_tokenization(demo, shared):
    for probe in json.loads((shared / "golden" / "tokenization.json").read_text())["probes"]:
        assert demo.tokenizer(probe["text"]).input_ids == probe["ids"]
        assert demo.tokenizer.decode(probe["ids"]) == probe["decode"]


def test_text_functions(shared):
    functions = json.loads((shared / "golden" / "text_functions.json").read_text())
    assert len(functions["pairs"]) == 74
    for pair in functions["pairs"]:
        assert normalize_answer(pair["input"]) == pair["normalize_text"]
        assert extract_answer(pair["input"]) == pair["postprocess_text"]
        assert normalize_answer(extract_answer(pair["input"])) == pair["normalize_of_postprocess"]
    for case in functions["scoring"]:
        answer = extract_answer(case["output_text"])
        assert answer == case["output_answer"]
        assert contains_answer(answer, case["answers"], published=True) == case["matched"]
        if all(case["normalized_answers"]):
            assert bool(SCORES["accuracy"].function(case["output_text"], case["answers"])) == case["matched"]


NAMES = {"NQSwap": "nqswap", "hotpot": "hotpotqa"}


def test_data_format(shared):
    formats = json.loads((shared / "golden" / "prompts_and_data_format.json").read_text())
    for case in formats["data_format"]:
        record = dict(case["record"])
        if case["task_type"] == "summary":
            # The published script renames these fields of the file before it formats them.
            record = {"article": record["article"], "summary": record["gold_answers"]}
        fields = TASKS[NAMES.get(case["dataset_name"], case["dataset_name"])].read(RawRecord(record))
        answers = case["metric_reference"]["answers"]
        assert fields.context == case["input_dict"]["instruction"]
        if case["task_type"] == "qa":
            assert fields.question == case["input_dict"]["question"]
        assert list(fields.references) == ([answers] if isinstance(answers, str) else answers)
    for case in formats["data_format_edge"]:
        if case["dataset_name"] not in TASKS:
            continue
        if "error" in case:
            with pytest.raises(FieldError, match="no ':' between"):
                TASKS[case["dataset_name"]].read(RawRecord(case["record"]))
            continue
        fields = TASKS[case["dataset_name"]].read(RawRecord(case["record"]))
        assert (fields.context, fields.question) == (
            case["input_dict"]["instruction"],
            case["input_dict"]["question"],
        )
        assert fields.references == (case["metric_reference"]["answers"],)


def test_prompts(shared):
    formats = json.loads((shared / "golden" / "prompts_and_data_format.json").read_text())
    prompts = formats["prompts_filled_official"] | formats["prompts_filled_added_for_this_run"]
    checked = 0
    for name, text in prompts.items():
        kind, _, dataset = name.removeprefix("inference_prompt_").partition("_")
        task = NAMES.get(dataset, dataset)
        if not name.startswith("inference_prompt") or task not in TASKS:
            continue
        user = text.split("<|end_header_id|>\n\n" if kind == "llama3" else "<|im_start|>user\n", 1)[1]
        user = user.split("<|eot_id|>" if kind == "llama3" else "<|im_end|>", 1)[0]
        assert TASKS[task].prompt_text("INSTRUCTION TEXT", "QUESTION TEXT?") == user
        checked += 1
    assert checked == 14
