"""Black-box checks of speed and memory: how samples are batched changes no answer, and nothing gets lost."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import itertools
import json
import random
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from conftest import assert_untouched, make_module, snapshot
from lightning.pytorch.callbacks import Callback
from method_runs import METHODS, plain_memorize
from test_issue_blackbox import files, read, write

from fastmem_pl import (
    Backbone,
    DecodingSettings,
    FastMemDataModule,
    FastMemError,
    FastMemModule,
    FastMemTrainer,
    MemorizationSettings,
    Memorizer,
    Memory,
    answer,
    stream_answer,
)
from fastmem_pl.cli import main
from fastmem_pl.decoding import Decoding, Generated, Prefill

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
STRONG = {"steps": 3, "learning_rate": 0.01}


def sentence(length: int, seed: int) -> str:
    """Words of just so many bytes."""
    letters = random.Random(seed)
    words = "".join(letters.choice("abcdefghij klmno pqrst uvwxyz ") for _ in range(length - 2))
    return f"A{words}."


# Contexts of 4 to 350 tokens, a byte each, in no order; two of them are of one length.
LENGTHS = (40, 4, 350, 90, 15, 300, 6, 41, 150, 9, 90, 25)
UNEQUAL = [
    {"context": sentence(length, i), "question": f"what is {i}", "answers": [sentence(3, i)]}
    for i, length in enumerate(LENGTHS)
]
EQUAL = [{"context": sentence(30, i), "question": "what is it", "answer": "a"} for i in range(10)]
DRAWN = {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


class Watch(Callback):
    """Notes the batches that Lightning hands over, and what else is told."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.events: list[tuple[str, object]] = []
        self.stop_before = stop_before

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if len(self.batches) == self.stop_before:
            raise Killed
        self.events.append(("batch", [sample.index for sample in batch]))

    @property
    def batches(self) -> list[list[int]]:
        return [content for name, content in self.events if name == "batch"]

    def after_first_batch(self, name: str) -> list[object]:
        """What was told since the second batch began."""
        starts = [i for i, (event, _) in enumerate(self.events) if event == "batch"]
        assert len(starts) > 1, "a test that could not fail"
        return [content for event, content in self.events[starts[1] :] if event == name]


class Killed(BaseException):
    """Stands for a signal."""


class Runs:
    """Runs in one folder, on a model in memory."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        self.backbone, self.folder = backbone, folder

    def module(self, **settings: object) -> FastMemModule:
        given = {**STRONG, "max_new_tokens": 6, **settings}
        module = make_module(self.backbone.name, **given)
        module.load_backbone("32-true", CPU, self.backbone)
        return module

    def __call__(
        self,
        data: Sequence[dict] = UNEQUAL,
        name: str = "run",
        command: str = "fit_predict",
        watch: Watch | None = None,
        **settings: object,
    ) -> list[dict]:
        """Records of a run; ``data__`` opens the names of the data's settings."""
        path = write(self.folder / "data.jsonl", list(data))
        source = {key[6:]: value for key, value in settings.items() if key.startswith("data__")}
        model = {key: value for key, value in settings.items() if not key.startswith("data__")}
        callbacks = [watch] if watch else []
        trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False, callbacks=callbacks)
        module, datamodule = self.module(**model), FastMemDataModule("qa", str(path), **source)
        self.result = getattr(trainer, command)(module, datamodule, run_dir=str(self.folder / name))
        return [] if command == "fit" else read(self.folder / name)


@pytest.fixture
def run(tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.chdir(tmp_path)
    return Runs(tiny, tmp_path)


@pytest.fixture(scope="module")
def alone(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict]]:
    """Records of a run that takes one sample at a time; made once."""
    made: dict[str, list[dict]] = {}
    runs = Runs(tiny, tmp_path_factory.mktemp("alone"))

    def records(data: Sequence[dict] = UNEQUAL, **settings: object) -> list[dict]:
        key = json.dumps([data, settings], sort_keys=True)
        if key not in made:
            made[key] = runs(data, str(len(made)), data__batch_size=1, **settings)
        return made[key]

    return records


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """The same records in the same order, curves up to rounding."""
    places = [[(r["index"], r["method"]) for r in records] for records in (found, expected)]
    assert places[0] == places[1]
    for ours, other in zip(found, expected, strict=True):
        for field in ours.keys() | other.keys():
            if field == "curve" and other["curve"]:
                assert ours["curve"].keys() == other["curve"].keys()
                for name, values in other["curve"].items():
                    assert ours["curve"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
            elif field != "seconds":
                assert ours[field] == other[field], (field, ours["index"], ours["method"])


def test_the_samples_are_answered_differently_so_that_other_tests_can_fail(alone) -> None:
    records = alone(methods=METHODS, num_layers=1)
    for method in ("zero-shot", "fastmem", "fastmem+cd"):
        assert len({tuple(r["token_ids"]) for r in records if r["method"] == method}) > len(UNEQUAL) / 2
    assert len({tuple(r["curve"]["cross_entropy"]) for r in records if r["curve"]}) == len(UNEQUAL)


BATCHING = [
    {"data__batch_size": 12},
    {"data__batch_size": 5},
    {"data__max_batch_tokens": 330},
    {},
]


@pytest.mark.parametrize("batching", BATCHING, ids=str)
def test_batching_changes_neither_answers_nor_curves_nor_order(run, alone, batching: dict) -> None:
    settings = {"methods": METHODS, "num_layers": 1}
    assert_same(run(**settings, **batching), alone(**settings))


@pytest.mark.parametrize("batching", [BATCHING[0]], ids=str)
def test_batching_changes_no_drawn_answer_of_two_layers(run, alone, batching: dict) -> None:
    methods = ["zero-shot", "dola", "fastmem", "fastmem+cad"]
    settings = {"methods": methods, "num_layers": 2, "stop": ["e", "0"], **DRAWN}
    assert_same(run(**settings, **batching), alone(**settings))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_short_context_beside_a_very_long_one_is_memorized_as_alone(tiny, num_layers: int) -> None:
    texts = [sentence(length, length) for length in (25, 900, 3, 120)]
    memorizer = Memorizer(tiny, num_layers=num_layers, kl_coeff=0.5, **STRONG)
    together = memorizer(texts)
    for row, text in enumerate(texts):
        single = memorizer(text)
        for name, values in single.curves[0].as_dict().items():
            assert together.curves[row].as_dict()[name] == pytest.approx(values, rel=1e-4, abs=1e-6)
        for layer, expected in zip(together.deltas, single.deltas, strict=True):
            for name, delta in expected.items():
                assert (layer[name][row] - delta[0]).norm() < 2e-3 * delta[0].norm(), (row, name)


def test_fit_and_predict_may_be_batched_differently(run, alone) -> None:
    settings = {"methods": METHODS, "num_layers": 1}
    run(command="fit", data__batch_size=7, num_layers=1)
    found = run(command="predict", data__max_batch_tokens=200, **settings)
    for ours, other in zip(found, alone(**settings), strict=True):
        assert (ours["index"], ours["method"]) == (other["index"], other["method"])
        assert ours["token_ids"] == other["token_ids"]


@pytest.mark.parametrize(("limit", "cut"), [(1, 7500), (60, 7500), (330, 7500), (330, 50)])
def test_max_batch_tokens_bounds_every_batch(run, limit: int, cut: int) -> None:
    watch = Watch()
    common = {"methods": ["zero-shot"], "max_context_tokens": cut}
    records = run(watch=watch, data__max_batch_tokens=limit, data__batch_size=12, **common)
    tokens = {r["index"]: r["n_context_tokens"] for r in records}
    assert tokens == {i: min(length, cut) for i, length in enumerate(LENGTHS)}
    assert sorted(itertools.chain(*watch.batches)) == list(range(len(UNEQUAL)))
    for batch in watch.batches:
        assert len(batch) == 1 or len(batch) * max(tokens[i] for i in batch) <= limit
    assert max(map(len, watch.batches)) > 1 or limit == 1, "no batch is used"


def test_max_batch_tokens_counts_samples_times_the_longest(run) -> None:
    """At just the size of all samples they are one batch, a token below they are not."""
    size = len(LENGTHS) * max(LENGTHS)
    for limit, single in ((size, True), (size - 1, False)):
        watch = Watch()
        run(
            name=str(limit),
            watch=watch,
            methods=["zero-shot"],
            data__max_batch_tokens=limit,
            data__batch_size=12,
        )
        assert (len(watch.batches) == 1) == single


def test_batch_size_bounds_too(run) -> None:
    watch = Watch()
    run(watch=watch, methods=["zero-shot"], data__max_batch_tokens=10**6, data__batch_size=5)
    assert sorted(map(len, watch.batches)) == [2, 5, 5]


def test_batches_are_of_like_length(run) -> None:
    watch = Watch()
    run(watch=watch, methods=["zero-shot"], data__batch_size=3)
    spans = sorted((min(LENGTHS[i] for i in b), max(LENGTHS[i] for i in b)) for b in watch.batches)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans


def free_memory(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    """Let the system say that so many bytes are free."""
    now = psutil.virtual_memory()
    told = now._replace(available=amount, free=amount)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: told)


def test_automatic_batches_follow_free_memory(run, monkeypatch: pytest.MonkeyPatch) -> None:
    module, most = run.module(), []
    for exponent in range(16, 44):
        free_memory(monkeypatch, 2**exponent)
        limits = module.room.limits(module.longest_answer)
        most.append((limits.most(2000), limits.most(10)))
        assert module.room.limits(module.longest_answer, 5).most(2000) == 5, "a given size holds"
    assert most[0] == (1, 1)
    assert most[-1] == (16, 16), "as the help of data.batch_size says"
    assert most == sorted(most)
    assert all(long <= short for long, short in most)
    assert any(long < short for long, short in most), "the length of contexts does not count"


def test_a_full_machine_takes_samples_one_by_one(run, alone, monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 0)
    watch = Watch()
    settings = {"methods": ["zero-shot", "fastmem+cd"]}
    assert_same(run(watch=watch, **settings), alone(**settings))
    assert set(map(len, watch.batches)) == {1}


# --- out of memory


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 137438953472 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    MemoryError(),
]


def limit_fit(
    monkeypatch: pytest.MonkeyPatch,
    fits: Callable[[list[int]], bool],
    watch: Watch | None = None,
    error: BaseException = OUT_OF_MEMORY[0],
) -> None:
    """Let memorizing hold only what ``fits``, given the tokens of its sequences."""
    fit = Memorizer.fit

    def limited(self, encoded):
        lengths = [len(context.input_ids) for context in encoded]
        good = fits(lengths)
        if watch:
            watch.events.append(("fitted" if good else "failed", len(lengths)))
        if not good:
            raise error
        return fit(self, encoded)

    monkeypatch.setattr(Memorizer, "fit", limited)


@pytest.mark.parametrize(("room", "size"), [(1, 4), (2, 4), (3, 7)])
def test_out_of_memory_halves_batches_and_is_learnt_from(
    run, alone, monkeypatch: pytest.MonkeyPatch, room: int, size: int
) -> None:
    watch, settings = Watch(), {"methods": ["zero-shot", "fastmem"]}
    expected = alone(EQUAL, **settings)
    limit_fit(monkeypatch, lambda lengths: len(lengths) <= room, watch)
    assert_same(run(EQUAL, watch=watch, data__batch_size=size, **settings), expected)
    assert sum(n for name, n in watch.events if name == "fitted") == len(EQUAL), "memorized twice"
    assert [name for name, _ in watch.events].count("failed") > 0, "a test that could not fail"
    assert watch.after_first_batch("failed") == []


def test_out_of_memory_with_unequal_lengths(run, alone, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, settings = Watch(), {"methods": ["zero-shot", "fastmem"]}
    expected = alone(**settings)
    limit_fit(monkeypatch, lambda lengths: len(lengths) * max(lengths) <= 1000, watch)
    assert_same(run(watch=watch, data__batch_size=4, **settings), expected)
    assert sum(n for name, n in watch.events if name == "fitted") == len(UNEQUAL)
    assert watch.after_first_batch("failed") == []
    assert max(n for name, n in watch.events if name == "fitted") > 1, "short ones go alone too"


def test_running_out_in_a_later_batch(run, alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program takes memory while the run goes on."""
    watch, settings = Watch(), {"methods": ["zero-shot", "fastmem"]}
    expected = alone(**settings)
    limit_fit(monkeypatch, lambda lengths: len(lengths) == 1 or len(watch.batches) < 2, watch)
    assert_same(run(watch=watch, data__batch_size=4, **settings), expected)
    assert len(watch.after_first_batch("failed")) > 0, "a test that could not fail"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:12])
def test_every_kind_of_out_of_memory_is_one(run, alone, monkeypatch, error: BaseException) -> None:
    settings = {"methods": ["zero-shot", "fastmem"]}
    expected = alone(EQUAL, **settings)
    limit_fit(monkeypatch, lambda lengths: len(lengths) <= 3, error=error)
    assert_same(run(EQUAL, data__batch_size=6, **settings), expected)


@pytest.mark.parametrize(
    ("where", "command"), [("prompt", "fit_predict"), ("decoding", "fit_predict"), ("prompt", "predict")]
)
def test_out_of_memory_while_answering(run, alone, where: str, command: str) -> None:
    """After memorizing, in the pass over the prompts or in the middle of answers."""
    settings, steps = {"methods": ["zero-shot", "fastmem", "cad"]}, []
    expected = alone(EQUAL, **settings)
    if command == "predict":
        run(EQUAL, command="fit", data__batch_size=6)

    def cramped(_module, arguments: tuple) -> None:
        rows, tokens = arguments[0].shape
        memorizing = tokens < 60  # prompts are longer than contexts here
        if rows > 2 and (tokens == 1 if where == "decoding" else tokens > 1 and not memorizing):
            steps.append(rows)
            if len(steps) > 2 or where == "prompt":
                raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = run.backbone.model.get_input_embeddings().register_forward_pre_hook(cramped)
    try:
        found = run(EQUAL, command=command, data__batch_size=6, **settings)
    finally:
        hook.remove()
    assert len(steps) > 0, "a test that could not fail"
    for ours, other in zip(found, expected, strict=True):
        assert (ours["index"], ours["method"]) == (other["index"], other["method"])
        assert ours["token_ids"] == other["token_ids"]


def test_fit_runs_out_of_memory_and_saves_every_memory_once(run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(EQUAL, name="roomy", command="fit", data__batch_size=1)
    watch = Watch()
    limit_fit(monkeypatch, lambda lengths: len(lengths) <= 2, watch)
    run(EQUAL, name="cramped", command="fit", data__batch_size=4, watch=watch)
    assert sum(n for name, n in watch.events if name == "fitted") == len(EQUAL)
    roomy, cramped = (
        sorted((run.folder / n / "memories").rglob("*.safetensors")) for n in ("roomy", "cramped")
    )
    assert [path.name for path in roomy] == [path.name for path in cramped]
    assert len(roomy) == len(EQUAL)
    for one, other in zip(roomy, cramped, strict=True):
        first, second = Memory.load(one), Memory.load(other)
        values = first.curves[0].cross_entropy
        assert second.curves[0].cross_entropy == pytest.approx(values, rel=1e-4)
        assert first.context_hash == second.context_hash


@pytest.fixture
def command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line in `tmp_path` on the unequal samples; gives the exit status."""
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "data.jsonl", UNEQUAL)

    def call(*options: object, name: str = "fit-predict", run_dir: str = "run") -> int:
        given = {
            "run_dir": run_dir,
            "model.backbone": tiny_folder,
            "model.methods": "[zero-shot, fastmem]",
            "model.memorize.steps": STRONG["steps"],
            "model.memorize.learning_rate": STRONG["learning_rate"],
            "model.decode.max_new_tokens": 6,
            "data.task": "qa",
            "data.path": data,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
        }
        common = [part for key, value in given.items() for part in (f"--{key}", value)]
        return main([name, *map(str, common), *map(str, options)])

    return call


def test_a_sample_that_never_fits_ends_the_run_and_keeps_the_rest(
    command, alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        # The sample of 90 tokens: neither among the first, which are the longest, nor the last.
        limit_fit(patch, lambda lengths: not any(95 < length < 110 for length in lengths))
        assert command("--data.batch_size", 2) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert "Traceback" not in err
    assert re.match("fastmem: error: ", last)
    assert re.search(r"data\.batch_size|max_context_tokens|max_batch_tokens", last), "not what to lower"
    kept = (tmp_path / "run" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert 2 <= len(kept) < 2 * len(UNEQUAL)
    assert command("--data.batch_size", 3) == 0
    assert set(kept) <= set((tmp_path / "run" / "predictions.jsonl").read_text("utf-8").splitlines())
    assert_same(read(tmp_path / "run"), alone(methods=["zero-shot", "fastmem"]))


def test_without_auto_batch_nothing_is_tried_again(
    command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    watch = Watch()
    limit_fit(monkeypatch, lambda lengths: len(lengths) == 1, watch)
    assert command("--data.batch_size", 4, "--model.auto_batch", "false") == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"fastmem: error: .*data\.batch_size.*\n", err)
    assert out == ""
    assert [name for name, _ in watch.events] == ["failed"]


# --- run folders


REST = [
    {"data__batch_size": 5},
    {"data__max_batch_tokens": 200},
    {"auto_batch": False},
]


@pytest.mark.parametrize("rest", REST, ids=str)
def test_a_killed_run_goes_on_with_other_batches(run, alone, rest: dict) -> None:
    settings = {"methods": ["zero-shot", "fastmem"]}
    with pytest.raises(Killed):
        run(watch=Watch(stop_before=2), data__batch_size=3, **settings)
    predictions = run.folder / "run" / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * 3 * 2
    predictions.write_bytes(b"".join(lines)[:-20])  # the last record is half written
    watch = Watch()
    found = run(watch=watch, **rest, **settings)
    assert_same(found, alone(**settings))
    kept = {json.loads(line)["index"] for line in lines[:-2]}
    again = list(itertools.chain(*watch.batches))
    assert sorted(again) == sorted(set(range(len(UNEQUAL))) - kept)
    assert set(lines[:-2]) <= set(predictions.read_bytes().splitlines(keepends=True)), "answered again"


@pytest.mark.parametrize("rest", REST, ids=str)
def test_other_batches_are_no_other_settings(run, rest: dict) -> None:
    settings = {"methods": ["zero-shot", "fastmem"]}
    run(data__batch_size=3, **settings)
    before = (run.folder / "run" / "predictions.jsonl").read_bytes()
    watch = Watch()
    run(watch=watch, **rest, **settings)
    assert (run.result.num_new, watch.batches) == (0, [])
    assert (run.folder / "run" / "predictions.jsonl").read_bytes() == before


def test_a_raised_limit_goes_on_with_other_batches(run, alone) -> None:
    settings = {"methods": ["zero-shot", "fastmem"]}
    run(data__limit=5, data__batch_size=2, **settings)
    found = run(data__limit=len(UNEQUAL), data__max_batch_tokens=700, **settings)
    assert run.result.num_new == len(UNEQUAL) - 5
    assert_same(found, alone(**settings))


def test_the_optimizers_state_is_another_setting(run) -> None:
    settings = {"methods": ["zero-shot", "fastmem"], "data__limit": 3}
    run(**settings)
    before = files(run.folder)
    with pytest.raises(FastMemError, match=r"model\.optimizer_state") as caught:
        run(optimizer_state="float32", **settings)
    assert "\n" not in str(caught.value)
    assert files(run.folder) == before


# Option, value, and what the line says beside the option.
BAD = [
    ("data.max_batch_tokens", "0", ("0", "at least 1")),
    ("data.max_batch_tokens", "-7", ("-7", "at least 1")),
    ("data.max_batch_tokens", "2.5", ("2.5", "int")),
    ("data.max_batch_tokens", "many", ("'many'", "int")),
    ("data.batch_size", "-1", ("-1", "at least 1")),
    ("data.batch_size", "auto", ("'auto'", "int")),
    ("model.memorize.optimizer_state", "flaot32", ("'flaot32'", "auto", "float32", "did you mean 'float32'")),
    ("model.memorize.optimizer_state", "bfloat16", ("'bfloat16'", "auto", "float32")),
    ("model.memorize.optimizer_state", "32", ("32", "auto", "float32")),
    ("model.auto_batch", "maybe", ("'maybe'", "bool")),
    ("data.max_batch_tokns", "5", ("data.max_batch_tokens",)),
    ("model.optimiser_state", "auto", ("model.memorize.optimizer_state",)),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "parts"),
    [*(("fit-predict", *bad) for bad in BAD), ("fit", *BAD[0]), ("fit", *BAD[6]), ("predict", *BAD[1])],
)
def test_a_bad_value_is_refused_in_one_line(
    command, tmp_path: Path, capsys, name: str, option: str, value: str, parts: tuple[str, ...]
) -> None:
    before = files(tmp_path)
    assert command(f"--{option}", value, name=name) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastmem: error: .*\n", err), f"not one line: {err!r}"
    assert [part for part in (option, *parts) if part not in err] == []
    assert files(tmp_path) == before, "something was written"


def test_the_command_refuses_and_allows_what_the_trainer_does(
    command, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command("--data.batch_size", 3) == 0
    before = files(tmp_path / "run")["predictions.jsonl"]
    assert command("--data.max_batch_tokens", 100) == 0
    assert files(tmp_path / "run")["predictions.jsonl"] == before
    capsys.readouterr()
    whole = files(tmp_path)
    assert command("--model.memorize.optimizer_state", "float32") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"fastmem: error: .*model\.optimizer_state.*\n", err)
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FastMemDataModule("qa", "x.jsonl", max_batch_tokens=0), "data.max_batch_tokens"),
        (lambda: make_module(optimizer_state="float16"), "optimizer_state"),
        (lambda: MemorizationSettings(optimizer_state="float16"), "optimizer_state"),
    ],
)
def test_bad_values_from_python(make: Callable[[], object], name: str) -> None:
    with pytest.raises(FastMemError) as caught:
        make()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


# --- rows that end early


def spread_stops(texts: Sequence[str]) -> tuple[str, ...]:
    """A few stop texts that end these texts in as many different places as can be."""
    pairs = sorted(
        {t[i : i + 2] for t in texts for i in range(len(t) - 1) if re.fullmatch("[!-~]{2}", t[i : i + 2])}
    )
    chosen, best = (), 0.0
    for seed in range(400):
        stops = tuple(random.Random(seed).sample(pairs, min(len(pairs), 1 + seed % 6)))
        ends = [len(cut(text, stops)) for text in texts]
        score = (
            len(set(ends))
            + (max(ends) - min(ends)) / 20
            + any(end == len(t) for end, t in zip(ends, texts, strict=True))
        )
        if score > best:
            chosen, best = stops, score
    return chosen


def cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=None)]


def assert_spread(lengths: Sequence[int], longest: int) -> None:
    assert min(lengths) <= longest / 4, "a test that could not fail"
    assert max(lengths) == longest, "a test that could not fail"
    assert len(set(lengths)) > len(lengths) / 4, "a test that could not fail"


@pytest.mark.parametrize(("num_layers", "draws"), [(1, {}), (1, DRAWN), (2, DRAWN)], ids=str)
def test_rows_that_end_early_change_no_other_row(run, num_layers: int, draws: dict) -> None:
    data = [UNEQUAL[i] for i in (0, 1, 4, 11)]
    methods = ["cad", "dola", "fastmem", "fastmem+cd"] if num_layers == 1 else ["fastmem+cd", "fastmem+cad"]
    settings = {"methods": methods, "num_layers": num_layers, "max_new_tokens": 48, **draws}
    full = run(data, name="full", data__batch_size=4, **settings)
    stops = spread_stops([r["prediction"] for r in full])
    together = run(data, name="together", data__batch_size=4, stop=[*stops], **settings)
    single = run(data, name="single", data__batch_size=1, stop=[*stops], **settings)
    assert_same(together, single)
    assert_spread([len(r["token_ids"]) for r in together], 48)
    for whole, stopped in zip(full, together, strict=True):
        assert stopped["prediction"] == cut(whole["prediction"], stops)
        n = len(stopped["token_ids"])
        assert stopped["token_ids"] == whole["token_ids"][:n]
        if "dola" in stopped["method"]:
            assert sum(stopped["dola_layers"].values()) == n


def generate(backbone: Backbone, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy decoding of transformers itself."""
    ids = torch.tensor([prompt])
    ends = backbone.model.generation_config.eos_token_id
    found = backbone.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=ends,
    )
    return found[0, len(prompt) :].tolist()


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    numbers = random.Random(1)
    return [[numbers.randrange(256) for _ in range(length)] for length in lengths]


def decode(
    backbone: Backbone, prompts, decoder="greedy", memory=None, num_layers=1, **settings
) -> list[Generated]:
    prefill = Prefill(backbone, prompts, num_layers)
    deltas = memory.deltas if memory else None
    return Decoding(prefill, decoder, DecodingSettings(**settings), deltas).run()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_many_end_tokens_end_rows_as_generate_does(make_tiny, family: str) -> None:
    backbone = make_tiny(family)
    prompts = random_prompts((3, 30, 12, 7, 50, 4, 21, 5, 16, 9))
    full = [g.token_ids for g in decode(backbone, prompts, max_new_tokens=40)]
    best, ends = 0, []
    for seed in range(300):  # ids that end these rows in as many different places as can be
        candidate = random.Random(seed).sample(sorted(set(itertools.chain(*full))), 1 + seed % 4)
        lengths = [next((i for i, t in enumerate(ids) if t in candidate), 39) + 1 for ids in full]
        score = len(set(lengths)) + (max(lengths) == 40)
        best, ends = max((best, ends), (score, candidate))
    backbone.model.generation_config.eos_token_id = [*ends, backbone.tokenizer.eos_token_id]
    found = [g.token_ids for g in decode(backbone, prompts, max_new_tokens=40)]
    assert len({len(ids) for ids in found}) >= 4, "a test that could not fail"
    assert found == [generate(backbone, prompt, 40) for prompt in prompts]


@pytest.mark.parametrize("decoder", ["greedy", "cd"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_long_row_among_many_short_ones(tiny, decoder: str, num_layers: int) -> None:
    """Rows that leave one after another, down to the last, take neither memory nor cache with them."""
    texts = [sentence(8 + 3 * i, i) for i in range(16)]
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(texts)
    prompts = [tiny.chat.prompt(text) for text in texts]
    common = {"num_layers": num_layers, "max_new_tokens": 60}
    full = decode(tiny, prompts, decoder, memory, **common)
    stops = spread_stops([g.text for g in full])
    found = decode(tiny, prompts, decoder, memory, stop=stops, **common)
    for row, (whole, stopped) in enumerate(zip(full, found, strict=True)):
        assert stopped.text == cut(whole.text, stops)
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
        if row % 4 == 0:
            (single,) = decode(tiny, [prompts[row]], decoder, memory.rows([row]), stop=stops, **common)
            assert single == stopped
    lengths = [len(g.token_ids) for g in found]
    assert len(set(lengths)) >= 5, "a test that could not fail"
    assert max(lengths) - min(lengths) >= 30, "a test that could not fail"


def test_all_rows_end_at_once(tiny, contexts: list[str]) -> None:
    backbone = tiny
    prompts = [backbone.chat.prompt(text) for text in contexts]
    full = decode(backbone, prompts, max_new_tokens=20)
    everything = (*map(chr, range(1, 128)), "\ufffd")
    for found, whole in zip(decode(backbone, prompts, max_new_tokens=20, stop=everything), full, strict=True):
        assert found.text == ""
        assert found.token_ids == whole.token_ids[: len(found.token_ids)]
        assert len(found.token_ids) < 20
    one = decode(backbone, prompts, max_new_tokens=1)
    assert [g.token_ids for g in one] == [g.token_ids[:1] for g in full]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_answers_up_to_the_models_last_position(make_tiny, family: str) -> None:
    """Caches of a fixed size: at, below and above multiples of 64, and up to the limit of the model."""
    backbone = make_tiny(family, max_position_embeddings=160)
    for length in (1, 24, 25, 88, 89, 120):
        prompts = random_prompts((length, 1 + length // 3))
        found = [g.token_ids for g in decode(backbone, prompts, max_new_tokens=40)]
        assert found == [generate(backbone, prompt, 40) for prompt in prompts], length


# --- streaming, and several decodes from one pass over the prompts


@pytest.mark.parametrize("decoder", ["greedy", "cd", "cad", "dola"])
@pytest.mark.parametrize("draws", [{}, DRAWN], ids=["greedy", "drawn"])
def test_streams_give_what_a_batch_gives(tiny, contexts: list[str], decoder: str, draws: dict) -> None:
    memory = Memorizer(tiny, **STRONG)(contexts)
    questions = ["Where?", "Who is it, and why?", "x", "What do people do every day by the river?"]
    common = {"decoder": decoder, "max_new_tokens": 30, "answer_prefix": "So:", **draws}
    whole = answer(tiny, questions, contexts, memory, **common)
    stops = spread_stops([text[3:] for text in whole])
    together = answer(tiny, questions, contexts, memory, stop=stops, **common)
    assert together != whole, "a test that could not fail"
    streams = [
        stream_answer(tiny, question, context, memory.rows([i]), stop=stops, **common)
        for i, (question, context) in enumerate(zip(questions, contexts, strict=True))
    ]
    pieces = list(itertools.zip_longest(*streams, fillvalue=""))  # all at once, piece by piece
    assert ["".join(stream) for stream in zip(*pieces, strict=True)] == together


def one_after_another(decodings: dict[str, Decoding]) -> None:
    """Step in a mixed order to the end; what is there on the way is the beginning of what comes."""
    order, so_far = random.Random(2), {}
    while open_ones := [name for name, decoding in decodings.items() if not decoding.finished]:
        name = order.choice(open_ones)
        decodings[name].step()
        now = [generated.token_ids for generated in decodings[name].results()]
        for before, after in zip(so_far.get(name, now), now, strict=True):
            assert after[: len(before)] == before
        so_far[name] = now


@pytest.mark.parametrize("num_layers", [1, 2])
def test_decodings_of_one_prefill_do_not_disturb_each_other(tiny, contexts, num_layers: int) -> None:
    memory = Memorizer(tiny, num_layers=num_layers, **STRONG)(contexts)
    ways = {  # decoder, with memory, settings
        "plain": ("greedy", False, {"max_new_tokens": 30}),
        "memorized": ("greedy", True, {"max_new_tokens": 75}),
        "contrast": ("cd", True, {"max_new_tokens": 30}),
        "cad": ("cad", True, {"max_new_tokens": 20, "alpha": 1.0}),
        "drawn": ("greedy", True, {"max_new_tokens": 30, **DRAWN}),
        "again": ("greedy", False, {"max_new_tokens": 30}),
    }

    def prefills() -> tuple[Prefill, Prefill]:
        prompts = [tiny.chat.prompt(f"{text} Who?") for text in contexts]
        return Prefill(tiny, prompts, num_layers), Prefill(tiny, [tiny.chat.prompt("Who?")] * 4, num_layers)

    def make(name: str, prefill: Prefill, bare: Prefill, stop: tuple[str, ...]) -> Decoding:
        decoder, with_memory, settings = ways[name]
        made = DecodingSettings(stop=stop, **settings)
        return Decoding(prefill, decoder, made, memory.deltas if with_memory else None, bare)

    stop = spread_stops([g.text for name in ways for g in make(name, *prefills(), ()).run()])
    alone = {name: make(name, *prefills(), stop).run() for name in ways}
    shared = prefills()
    started = {name: make(name, *shared, stop) for name in ways if name != "again"}
    for decoding in started.values():
        for _ in range(4):
            if not decoding.finished:
                decoding.step()
    make("memorized", *shared, stop).step()  # and is given up
    started["again"] = make("again", *shared, stop)
    one_after_another(started)
    for name, decoding in started.items():
        assert decoding.results() == alone[name], name
    assert make("memorized", *shared, stop).run() == alone["memorized"], "the prompts' pass was changed"
    texts = {tuple(g.text for g in alone[name]) for name in ways}
    assert len(texts) == len(ways) - 1, "a test that could not fail"


# --- types of memories, and the state of the optimizer


@pytest.mark.parametrize(
    ("precision", "num_layers"), [("32-true", 1), ("32-true", 2), ("bf16-true", 1), ("bf16-mixed", 2)]
)
def test_memories_of_either_type(
    make_tiny, contexts, tmp_path: Path, precision: str, num_layers: int
) -> None:
    backbone = make_tiny(precision=precision)
    before = snapshot(backbone)
    memory = Memorizer(backbone, num_layers=num_layers, **STRONG)(contexts)
    short = memory.to(torch.bfloat16)
    assert {d.dtype for layer in short.deltas for d in layer.values()} == {torch.bfloat16}
    assert {d.dtype for layer in memory.deltas for d in layer.values()} == {torch.float32}
    rounded = short.to(torch.float32)
    for row in range(4):
        short.save(tmp_path / f"{row}", row, torch.bfloat16)
    loaded = Memory.stack([Memory.load(tmp_path / f"{row}") for row in range(4)])
    mixed = Memory.stack([rounded.rows([0]), *(short.rows([i]) for i in (1, 2)), rounded.rows([3])])
    questions, plain = ["Who?", "Where is it?", "x", "Why, and since when?"], []
    for decoder in ("greedy", "cd", "cad"):
        common = {"decoder": decoder, "max_new_tokens": 10}
        expected = answer(backbone, questions, contexts, rounded, **common)
        assert expected not in plain, "a test that could not fail"
        plain.append(expected)
        assert answer(backbone, questions, contexts, short, **common) == expected
        assert answer(backbone, questions, contexts, loaded, **common) == expected
        assert answer(backbone, questions, contexts, mixed, **common) == expected
        if precision != "32-true":  # products run in bfloat16, so storing it loses nothing
            assert answer(backbone, questions, contexts, memory, **common) == expected
        else:
            for i in range(4):
                alone = answer(backbone, questions[i], contexts[i], short.rows([i]), **common)
                assert alone == expected[i : i + 1]
    assert_untouched(backbone, before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_optimizers_state_changes_nothing_on_a_cpu(make_tiny, contexts, precision: str) -> None:
    """Auto takes bfloat16 only where the kernel runs."""
    backbone = make_tiny(precision=precision)
    auto = Memorizer(backbone, **STRONG)(contexts)
    full = Memorizer(backbone, optimizer_state="float32", **STRONG)(contexts)
    assert [c.as_dict() for c in auto.curves] == [c.as_dict() for c in full.curves]
    for ours, other in zip(auto.deltas, full.deltas, strict=True):
        for name in ours:
            assert ours[name].dtype == other[name].dtype == torch.float32
            assert torch.equal(ours[name], other[name])


# --- benchmarks/


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("published")


@pytest.mark.parametrize("alpha", [None, 0.8])
def test_the_published_loop_has_the_losses_and_tokens_of_the_package(
    tiny, contexts, published, alpha
) -> None:
    settings = {"steps": 10, "learning_rate": 0.01, "kl_coeff": 0.5}
    before, memorizer = snapshot(tiny), Memorizer(tiny, **settings)
    memory = memorizer(contexts)
    for row, context in enumerate(contexts):
        encoded, prompt = memorizer.encode(context), tiny.chat.prompt(f"{context} Who?")
        tokens, curve = published.memorize_and_answer(
            tiny.model,
            encoded.input_ids,
            encoded.header_length,
            prompt,
            tiny.stop_ids,
            MemorizationSettings(**settings),
            20,
            alpha,
        )
        assert_untouched(tiny, before)
        _, plain = plain_memorize(context, 10, kl_coeff=0.5)
        for name, values in plain.items():
            assert getattr(curve, name) == pytest.approx(values, rel=1e-4, abs=1e-6), name
            assert getattr(memory.curves[row], name) == pytest.approx(values, rel=1e-4, abs=1e-6), name
        decoder = "greedy" if alpha is None else "cd"
        contrast = {} if alpha is None else {"alpha": alpha}
        (found,) = decode(tiny, [prompt], decoder, memory.rows([row]), max_new_tokens=20, **contrast)
        assert tokens == found.token_ids


def test_the_published_loop_puts_the_weights_back_after_an_error(tiny, contexts, published) -> None:
    before, encoded = snapshot(tiny), Memorizer(tiny).encode(contexts[0])
    with pytest.raises(IndexError):  # no token has this number
        published.memorize_and_answer(
            tiny.model, encoded.input_ids, encoded.header_length, [10**6], tiny.stop_ids
        )
    assert_untouched(tiny, before)


@pytest.mark.parametrize("fault", [None, "curve", "nan", "memory"])
def test_the_published_loops_check_finds_differences(tiny, published, monkeypatch, fault: str | None) -> None:
    fit = Memorizer.fit

    def other(self, encoded):
        memory = fit(self, encoded)
        if fault == "memory":
            for layer in memory.deltas:
                for delta in layer.values():
                    delta.zero_()
        elif fault:
            memory.curves[0].kl[2] = memory.curves[0].kl[2] * 1.01 if fault == "curve" else float("nan")
        return memory

    monkeypatch.setattr(Memorizer, "fit", other)
    settings = MemorizationSettings(steps=5, learning_rate=0.01)
    if fault is None:
        assert published.check(tiny, settings=settings) < 1e-4
    else:
        with pytest.raises(published.Mismatch, match="tokens" if fault == "memory" else "kl of step 2"):
            published.check(tiny, settings=settings)


PROVENANCE = ("device", "threads", "torch", "transformers", "lightning", "commit", "date")


def run_speed(*options: object) -> tuple[int, str, str]:
    """Run `speed.py` as a command in the working folder; gives its exit status and what it says."""
    out, err, verbosity = io.StringIO(), io.StringIO(), transformers.utils.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(sys, "argv", ["speed.py", *map(str, options)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "benchmarks" / "speed.py"), run_name="__main__")
    transformers.utils.logging.set_verbosity(verbosity)
    return ended.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[int, str, str], list[dict], Path]:
    """What `speed.py` says and writes of one row."""
    folder = tmp_path_factory.mktemp("speed")
    with contextlib.chdir(folder):
        done = run_speed(
            *[
                "--shape",
                "tiny",
                "--device",
                "cpu",
                "--rows",
                "memorize",
                "--repeats",
                "1",
                "--out",
                "speed.csv",
            ]
        )
    path = folder / "speed.csv"
    with path.open(newline="") as file:
        return done, list(csv.DictReader(file)), path


def test_speed_measures_a_row_and_says_where(measured) -> None:
    (status, out, err), lines, path = measured
    assert status == 0, err
    assert [p.name for p in path.parent.iterdir()] == ["speed.csv"]
    assert {line["row"] for line in lines} - {"fit-predict"} == {"ceiling", "memorize"}
    for line in lines:  # the published loop memorizes and answers in one
        assert line["row"] != "fit-predict" or "published loop" in line["what"]
    assert {(line["shape"], line["precision"]) for line in lines} == {("tiny", "32-true")}
    for line in lines:
        assert all(line[name] for name in PROVENANCE), line
        assert (line["torch"], line["threads"]) == (torch.__version__, "1")
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", line["commit"])
        age = datetime.now(UTC) - datetime.strptime(line["date"], "%Y-%m-%d %H:%M %Z").replace(tzinfo=UTC)
        assert timedelta() <= age < timedelta(minutes=10)
    keys = [tuple(line[name] for name in ("shape", "precision", "row", "batch", "what")) for line in lines]
    assert len(set(keys)) == len(keys), "not tidy"
    for word in ("memorize", "roofline"):
        assert word in out
    assert "agree" in err, "the published loop was not compared"


def test_speed_gives_ratios_to_the_published_loop_and_the_roofline(measured) -> None:
    _, lines, _ = measured
    times = [line for line in lines if line["row"] == "memorize" and line["unit"] == "ms"]
    assert {1, 8} <= {int(line["batch"]) for line in times}
    ours = [line for line in times if line["what"] == "fastmem"]
    assert len(ours) == len({line["batch"] for line in ours}) > 1
    for line in ours:
        median = float(line["median"])
        assert 0 < float(line["low"]) <= median <= float(line["high"])
        assert line["repeats"] == "1"
        assert "published" in line["baseline"]
        assert float(line["ratio"]) == pytest.approx(median / float(line["baseline_value"]), rel=0.02)
        assert float(line["ratio_to_roofline"]) == pytest.approx(median / float(line["roofline"]), rel=0.02)
        assert 0 < float(line["overlapped"]) <= float(line["roofline"])


def test_speed_renders_markdown(measured) -> None:
    _, lines, path = measured
    content = path.read_bytes()
    status, out, _ = run_speed("render", path)
    assert status == 0
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"\|( ?:?-+:? ?\|)+", rows[1])
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + sum(line["row"] != "ceiling" for line in lines)
    for word in (lines[0]["device"], lines[0]["commit"], lines[0]["torch"]):
        assert word in out
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--rows", "memorise"), ("'memorise'", "memorize", "decode", "fit-predict")),
        (("--rows", "memorize,nothing"), ("'nothing'",)),
        (("--rows", ""), ("''",)),
        (("--precisions", "16-true"), ("'16-true'", "32-true")),
        (("--shape", "9b"), ("'9b'", "8b", "tiny")),
        (("--repeats", "few"), ("'few'",)),
    ],
)
def test_speed_refuses_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_speed("--shape", "tiny", "--device", "cpu", "--out", "speed.csv", *options)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert err.endswith(f"{line}\n")
    assert [part for part in (options[0], *parts) if part not in line] == []
    assert list(tmp_path.iterdir()) == []


def test_the_roofline_is_that_of_the_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B on an H100: memorizing near 12 ms a sample, a step at least as long as reading the weights."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    speed = importlib.import_module("speed")
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    counts = speed.Counts(config, torch.bfloat16)
    h100 = speed.Ceilings(2.9e12, 7e14)
    assert 10 < h100.overlapped(counts.memorize(8, 165, 160, 10)) / 8 < 14
    weights = 8.03e9 - 128256 * 4096  # a row of the embedding is read, not all
    one = h100.milliseconds(counts.decode_step(1, 200))
    read = (weights + 3 * 4096 * 14336) * 2 / 2.9e12 * 1000
    assert read <= one < 1.1 * read
    assert (
        h100.milliseconds(counts.decode_step(16, 200)) > one + 15 * 3 * 4096 * 14336 * 2 / 2.9e12 * 1000 * 0.9
    )
    assert h100.milliseconds(counts.decode_step(1, 200, memory=False)) < one
