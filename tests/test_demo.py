"""The main job on the real 135M model: the command, its files, and what must be equal in it."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_untouched, snapshot
from runs import read

from fastmem_pl import FastMemDataModule, Memorizer
from fastmem_pl.cli import main
from fastmem_pl.data import TASKS
from fastmem_pl.decoding import Decoding, DecodingSettings, Prefill

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def samples():
    data = FastMemDataModule(answer_prefix="The answer is:", limit=8)
    data.setup()
    return data.samples


@pytest.fixture
def prompts(demo, samples):
    return [
        demo.chat.prompt(TASKS[s.task].prompt_text(s.context, s.question), s.answer_prefix) for s in samples
    ]


def decode(prefill, decoder, deltas, tokens):
    decoding = Decoding(prefill, decoder, DecodingSettings(max_new_tokens=tokens), deltas)
    return [generated.token_ids for generated in decoding.run()]


def test_command(tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = ["fit-predict", "--config", "demo", "--data.limit", "6", "--run_dir", str(run_dir)]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "6 samples, mean ± standard error" in output
    assert "fastmem+cd against zero-shot, accuracy:" in output
    assert f"run folder: {run_dir}" in output
    records = read(run_dir)
    assert len(records) == 18
    assert all(r["prediction"].startswith("The answer is:") for r in records)
    curves = [r["curve"]["cross_entropy"] for r in records if r["method"] == "fastmem"]
    assert all(len(curve) == 10 and curve[-1] < 0.8 * curve[0] for curve in curves)
    # Again: nothing to do, the same table.
    before = (run_dir / "predictions.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    assert capsys.readouterr().out == "this run was complete already; nothing was left to do\n" + output
    assert (run_dir / "predictions.jsonl").stat().st_mtime_ns == before


def test_readme_example(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.strip().splitlines()) < 12
    exec(compile(example, "README.md", "exec"), {})
    output = capsys.readouterr().out.splitlines()
    curve = json.loads(output[-1])
    assert len(curve) == 10
    assert curve[-1] < curve[0]
    # Each question is followed by the plain and the memorized answer.
    assert len(output) >= 7


def test_examples_of_the_guide_to_memories(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[1] / "docs" / "memories.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(compile(example, "memories.md", "exec"), names)
    assert [path.name for path in tmp_path.iterdir()] == ["velm.fastmem"]
    assert names["memory"].curve.cross_entropy[-1] < names["memory"].curve.cross_entropy[0]
    texts = [names["backbone"].tokenizer.decode(names[name][0]) for name in ("beams", "contrasted")]
    assert texts[1].startswith("The tower of Velm is red")
    assert texts[0] != texts[1]


def test_zero_shot_is_generate(demo, prompts):
    found = decode(Prefill(demo, prompts), "greedy", None, 20)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        expected = demo.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert answer == expected[0, len(prompt) :].tolist()


def test_batch_of_eight_is_eight_single_runs(demo, samples, prompts):
    before = snapshot(demo)
    memorizer = Memorizer(demo, steps=10, learning_rate=3e-4)
    batch = memorizer([s.context for s in samples])
    prefill = Prefill(demo, prompts)
    together = {d: decode(prefill, d, batch.deltas, 16) for d in ("greedy", "cd")}
    for row, sample in enumerate(samples):
        single = memorizer([sample.context])
        for name in ("cross_entropy", "grad_norm"):
            expected = pytest.approx(getattr(single.curves[0], name), rel=1e-4)
            assert getattr(batch.curves[row], name) == expected
        alone = Prefill(demo, [prompts[row]])
        for decoder, answers in together.items():
            assert decode(alone, decoder, single.deltas, 16) == [answers[row]]
    assert_untouched(demo, before)
