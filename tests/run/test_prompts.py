"""Prompts of a run: contexts that are cut off, chat templates, system prompts and published quirks."""

import statistics

import pytest
from decodes import END, START, TEXTS, plain_ids, plain_prompt
from runs import NQ, metrics_of

from fastmem_pl.run.published import QUIRKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task", ["nqswap", "xsum", "nqswap_icl"])
def test_long_contexts_are_cut_off_and_counted(run_methods, task, tmp_path, capsys):
    lengths = [len(plain_ids(context)) for context, _ in TEXTS[task]]
    for record in run_methods(task, ["zero-shot", "fastmem"], max_context_tokens=30):
        length = lengths[record["index"]]
        assert record["n_context_tokens"] == min(length, 30)
        assert record["n_truncated_tokens"] == max(length - 30, 0)
        whole = len(plain_prompt(task, "prompt", record["index"]))
        assert record["n_prompt_tokens"] == whole - record["n_truncated_tokens"]
    truncated = metrics_of(tmp_path / "run", "fastmem")["truncated"]["value"]
    long = [length > 30 for length in lengths]
    assert truncated == pytest.approx(statistics.mean(long))
    shown = "1 sample" if sum(long) == 1 else f"{sum(long)} samples"
    assert f"{shown} had a context over the limit, which was cut off" in capsys.readouterr().out


def test_a_cut_within_a_character_puts_no_other_in_its_place(run_methods):
    (record,) = run_methods("nqswap", ["fastmem"], [NQ[2]], max_context_tokens=3)  # "Zo" and half of "ë"
    frame = len(plain_prompt("nqswap", "prompt", 2)) - len(plain_ids(NQ[2]["sub_context"]))
    assert record["n_prompt_tokens"] - frame in (2, 3, 4), "the sign for a broken character takes three"


def test_chat_template_off_and_system_prompt(run_methods):
    methods, system = ["zero-shot", "one-shot", "fastmem"], "You are terse: naïve."
    usual = run_methods("nqswap", methods)
    plain = run_methods("nqswap", methods, template=False, run_dir="plain")
    told = run_methods("nqswap", methods, system_prompt=system, run_dir="told")
    frame = len([START, *plain_ids("user\n"), END, *plain_ids("\n"), START, *plain_ids("assistant\n")])
    turn = len([START, *plain_ids(f"system\n{system}"), END, *plain_ids("\n")])
    for with_chat, without, with_system in zip(usual, plain, told, strict=True):
        assert frame - 2 <= with_chat["n_prompt_tokens"] - without["n_prompt_tokens"] <= frame
        assert with_system["n_prompt_tokens"] == with_chat["n_prompt_tokens"] + turn
        assert with_system["n_context_tokens"] == with_chat["n_context_tokens"] == without["n_context_tokens"]
        assert with_system["curve"] == with_chat["curve"]
    answers = [
        [r["prediction"] for r in found if r["method"] == "zero-shot"] for found in (usual, plain, told)
    ]
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_published_quirks(run_methods):
    settings = {"num_layers": 2, "methods": ["dola", "fastmem"]}
    usual = run_methods("nqswap", **settings)
    for quirk in QUIRKS:
        found = run_methods("nqswap", published_quirks=[quirk], run_dir=quirk, **settings)
        for before, after in zip(usual, found, strict=True):
            # <|im_end|> is one token then.
            shorter = 9 if after["index"] == 3 and quirk == "parse-special-tokens" else 0
            assert after["n_prompt_tokens"] == before["n_prompt_tokens"] - shorter
            unlimited = quirk == "dola-unlimited" and after["method"] == "dola"
            assert (len(after["token_ids"]) > 3) == (unlimited and before["token_ids"][-1] != END)
            if quirk == "norm-every-layer" and after["curve"]:
                ours, other = after["curve"]["cross_entropy"], before["curve"]["cross_entropy"]
                assert ours[0] == pytest.approx(other[0], rel=1e-6)
                assert ours[1] != pytest.approx(other[1], rel=1e-2)
