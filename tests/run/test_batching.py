"""How samples are batched changes no answer, and running out of memory loses none."""

import itertools
import json

import psutil
import pytest
import torch
from conftest import make_module
from lightning.pytorch.callbacks import Callback
from runs import ALL_METHODS, read, write
from search_runs import assert_same_curve, words

from fastmem_pl import FastMemDataModule, FastMemTrainer, Memorizer, Memory
from fastmem_pl.base.errors import OutOfMemoryError
from fastmem_pl.run.batching import MemoryBudget

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = {"steps": 3, "learning_rate": 0.01}
DRAWN = {"temperature": 1.3, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 5}
TWO = {"methods": ["zero-shot", "fastmem"]}
# Contexts of 4 to 350 tokens, a byte each, in no order; two of them are of one length.
LENGTHS = (40, 4, 350, 90, 15, 300, 6, 41, 150, 9, 90, 25)
UNEQUAL = [
    {"context": words(length, i), "question": f"what is {i}", "answers": [words(3, i)]}
    for i, length in enumerate(LENGTHS)
]
EQUAL = [{"context": words(30, i), "question": "what is it", "answer": "a"} for i in range(10)]


class Killed(BaseException):
    """Stands for a signal."""


class Watch(Callback):
    """Notes the batches that Lightning hands over, and what tests add between."""

    def __init__(self, stop_before=None):
        self.events, self.stop_before = [], stop_before

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.stop_before:
            raise Killed
        self.events.append(("batch", [sample.index for sample in batch]))

    def all(self, name):
        return [content for event, content in self.events if event == name]

    def after_first_batch(self, name):
        starts = [i for i, (event, _) in enumerate(self.events) if event == "batch"]
        return [content for event, content in self.events[starts[1] :] if event == name]


class Runs:
    """Runs in one folder, on a model in memory."""

    def __init__(self, backbone, folder):
        self.backbone, self.folder = backbone, folder

    def module(self, **settings):
        module = make_module(self.backbone.name, **{**STRONG, "max_new_tokens": 6, **settings})
        module.load_backbone("32-true", torch.device("cpu"), self.backbone)
        return module

    def __call__(self, data=UNEQUAL, name="run", command="fit_predict", watch=None, source=(), **settings):
        """Records of a run; ``source``: settings of the data."""
        path, folder = write(self.folder / "data.jsonl", data), self.folder / name
        usual = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
        trainer = FastMemTrainer(callbacks=[watch] if watch else [], **usual)
        datamodule = FastMemDataModule("qa", str(path), **dict(source))
        self.result = getattr(trainer, command)(self.module(**settings), datamodule, run_dir=str(folder))
        return [] if command == "fit" else read(folder)


@pytest.fixture
def run(tiny, tmp_path):
    return Runs(tiny, tmp_path)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Records of a run that takes one sample at a time; made once."""
    made, runs = {}, Runs(tiny, tmp_path_factory.mktemp("alone"))

    def records(data=UNEQUAL, **settings):
        key = json.dumps([data, settings], sort_keys=True)
        if key not in made:
            made[key] = runs(data, str(len(made)), source={"batch_size": 1}, **settings)
        return made[key]

    return records


def assert_same(found, expected, but=("seconds",)):
    """The same records in the same order, curves and strengths up to rounding."""
    places = [[(r["index"], r["method"]) for r in records] for records in (found, expected)]
    assert places[0] == places[1]
    for ours, other in zip(found, expected, strict=True):
        assert ours.keys() == other.keys()
        strengths = [[v or 0.0 for v in r.get("strengths") or []] for r in (ours, other)]
        assert strengths[0] == pytest.approx(strengths[1], rel=2e-5, abs=2e-6)
        for field in ours.keys() - {"curve", "strengths", *but}:
            assert ours[field] == other[field], (field, ours["index"], ours["method"])
        if "curve" not in but:
            assert_same_curve(ours["curve"], other["curve"])


@pytest.mark.parametrize("source", [{"batch_size": 12}, {"max_batch_tokens": 330}, {}], ids=str)
def test_batching_changes_neither_answers_nor_curves_nor_order(run, alone, source):
    expected = alone(methods=ALL_METHODS)
    for method in ("zero-shot", "fastmem", "fastmem+cd"):
        answers = {tuple(r["token_ids"]) for r in expected if r["method"] == method}
        assert len(answers) > len(UNEQUAL) / 2, "a test that could not fail"
    assert_same(run(methods=ALL_METHODS, source=source), expected)


def test_batching_changes_no_drawn_answer_of_two_layers(run, alone):
    settings = {"methods": ALL_METHODS, "num_layers": 2, "stop": ["e", "0"], **DRAWN}
    assert_same(run(source={"batch_size": 12}, **settings), alone(**settings))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_short_context_beside_a_very_long_one_is_memorized_as_alone(tiny, num_layers):
    texts = [words(length, length) for length in (25, 900, 3, 120)]
    memorizer = Memorizer(tiny, num_layers=num_layers, kl_coeff=0.5, **STRONG)
    together = memorizer(texts)
    for row, text in enumerate(texts):
        single = memorizer(text)
        assert_same_curve(together.curves[row].as_dict(), single.curves[0].as_dict())
        for layer, expected in zip(together.deltas, single.deltas, strict=True):
            for name, delta in expected.items():
                assert (layer[name][row] - delta[0]).norm() < 2e-3 * delta[0].norm(), (row, name)


def test_fit_and_predict_may_be_batched_differently(run, alone):
    run(command="fit", source={"batch_size": 7})
    found = run(command="predict", source={"max_batch_tokens": 200}, methods=ALL_METHODS)
    assert_same(found, alone(methods=ALL_METHODS), but=("seconds", "curve"))


@pytest.mark.parametrize(
    ("limit", "cut"), [(1, 7500), (60, 7500), (330, 50), (12 * 350, 7500), (12 * 350 - 1, 7500)]
)
def test_max_batch_tokens_counts_samples_times_the_longest(run, limit, cut):
    watch, source = Watch(), {"max_batch_tokens": limit, "batch_size": 12}
    records = run(watch=watch, source=source, methods=["zero-shot"], max_context_tokens=cut)
    tokens = {r["index"]: r["n_context_tokens"] for r in records}
    assert tokens == {i: min(length, cut) for i, length in enumerate(LENGTHS)}
    batches = watch.all("batch")
    assert sorted(itertools.chain(*batches)) == list(range(len(UNEQUAL)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(tokens[i] for i in batch) <= limit
    assert (max(map(len, batches)) > 1) == (limit > 1)
    assert (len(batches) == 1) == (limit == 12 * 350)


def test_batch_size_bounds_too_and_batches_are_of_like_length(run):
    watch = Watch()
    run(watch=watch, methods=["zero-shot"], source={"max_batch_tokens": 10**6, "batch_size": 5})
    batches = watch.all("batch")
    assert sorted(map(len, batches)) == [2, 5, 5]
    spans = [(min(LENGTHS[i] for i in b), max(LENGTHS[i] for i in b)) for b in batches]
    assert all(first[0] >= later[1] for first, later in itertools.pairwise(spans)), "the longest come first"


def free_memory(monkeypatch, amount):
    """Let the system say that so many bytes are free."""
    told = psutil.virtual_memory()._replace(available=amount, free=amount)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: told)


def test_automatic_batches_follow_free_memory(run, alone, monkeypatch):
    module, most = run.module(), []
    for exponent in range(16, 44):
        free_memory(monkeypatch, 2**exponent)
        limits = module.budget.limits(module.longest_answer)
        most.append((limits.most(2000), limits.most(10)))
        assert module.budget.limits(module.longest_answer, 5).most(2000) == 5, "a given size holds"
    assert (most[0], most[-1]) == ((1, 1), (16, 16)), "as the help of data.batch_size says"
    assert most == sorted(most)
    assert all(long <= short for long, short in most)
    assert any(long < short for long, short in most), "the length of contexts does not count"
    free_memory(monkeypatch, 0)
    watch = Watch()
    assert_same(run(watch=watch, **TWO), alone(**TWO))
    assert set(map(len, watch.all("batch"))) == {1}


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 137438953472 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    MemoryError(),
]


def in_halves(budget, work, items, tokens):
    """The work on all items, whose longest row has as many tokens."""
    results = []
    for attempt in budget.attempts(items, lambda part: tokens):
        with attempt as part:
            results += work(part)
    return results


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:12])
def test_every_kind_of_out_of_memory_is_one(run, error):
    def work(items):
        if len(items) > 2:
            raise error
        return [item * 10 for item in items]

    budget = run.module().budget
    assert in_halves(budget, work, range(4), 50) == [0, 10, 20, 30]
    with pytest.raises(ZeroDivisionError):
        in_halves(budget, lambda items: 1 / 0, range(4), 50)


def test_what_was_too_much_is_not_tried_again_and_one_sample_is_the_end(run):
    module, sizes = run.module(), []
    fixed = MemoryBudget(run.backbone, module.memorization, module.graphs, auto=False)

    def work(items):
        sizes.append(len(items))
        if len(items) > 3 or "large" in items:
            raise MemoryError
        return list(items)

    # Longer rows cost more, shorter ones less.
    for tokens, expected in ((50, [4, 2, 2]), (50, [2, 2]), (500, [1, 1, 1, 1]), (5, [4, 2, 2])):
        sizes.clear()
        in_halves(module.budget, work, range(4), tokens)
        assert sizes == expected
    with pytest.raises(OutOfMemoryError, match=r"out of memory with 1 sample\(s\).*--data\.batch_size"):
        in_halves(module.budget, work, ["large", "small"], 50)
    with pytest.raises(OutOfMemoryError, match=r"out of memory with 5 sample\(s\)"):
        in_halves(fixed, work, range(5), 50)


def limit_fit(monkeypatch, fits, watch):
    """Let memorizing hold only what ``fits``, given the tokens of its sequences."""
    fit = Memorizer.fit

    def limited(self, encoded):
        lengths = [len(context.input_ids) for context in encoded]
        good = fits(lengths)
        watch.events.append(("fitted" if good else "failed", len(lengths)))
        if not good:
            raise OUT_OF_MEMORY[0]
        return fit(self, encoded)

    monkeypatch.setattr(Memorizer, "fit", limited)


@pytest.mark.parametrize(
    ("data", "size", "fits"),
    [
        (EQUAL, 4, lambda lengths: len(lengths) == 1),
        (EQUAL, 7, lambda lengths: len(lengths) <= 3),
        (UNEQUAL, 4, lambda lengths: len(lengths) * max(lengths) <= 1000),
    ],
)
def test_out_of_memory_halves_batches_and_is_learnt_from(run, alone, monkeypatch, caplog, data, size, fits):
    watch, expected = Watch(), alone(data, **TWO)
    limit_fit(monkeypatch, fits, watch)
    assert_same(run(data, watch=watch, source={"batch_size": size}, **TWO), expected)
    assert sum(watch.all("fitted")) == len(data), "memorized twice"
    assert len(watch.all("failed")) > 0, "a test that could not fail"
    assert watch.after_first_batch("failed") == []
    assert f"out of memory with {size} samples at once; trying {size // 2}" in caplog.text
    assert data is EQUAL or max(watch.all("fitted")) > 1, "short ones go alone too"


def test_running_out_in_a_later_batch(run, alone, monkeypatch):
    """Another program takes memory while the run goes on."""
    watch, expected = Watch(), alone(**TWO)
    limit_fit(monkeypatch, lambda lengths: len(lengths) == 1 or len(watch.all("batch")) < 2, watch)
    assert_same(run(watch=watch, source={"batch_size": 4}, **TWO), expected)
    assert len(watch.after_first_batch("failed")) > 0, "a test that could not fail"


@pytest.mark.parametrize(
    ("where", "command"), [("prompt", "fit_predict"), ("decoding", "fit_predict"), ("prompt", "predict")]
)
def test_out_of_memory_while_answering(run, alone, where, command):
    """After memorizing, in the pass over the prompts or in the middle of answers."""
    settings, steps = {"methods": ["zero-shot", "fastmem", "cad"]}, []
    expected = alone(EQUAL, **settings)
    if command == "predict":
        run(EQUAL, command="fit", source={"batch_size": 6})

    def cramped(_module, arguments):
        rows, tokens = arguments[0].shape
        memorizing = tokens < 60  # prompts are longer than contexts here
        if rows > 2 and (tokens == 1 if where == "decoding" else tokens > 1 and not memorizing):
            steps.append(rows)
            if len(steps) > 2 or where == "prompt":
                raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = run.backbone.model.get_input_embeddings().register_forward_pre_hook(cramped)
    try:
        found = run(EQUAL, command=command, source={"batch_size": 6}, **settings)
    finally:
        hook.remove()
    assert len(steps) > 0, "a test that could not fail"
    assert_same(found, expected, but=("seconds", "curve"))


def test_fit_runs_out_of_memory_and_saves_every_memory_once(run, monkeypatch):
    run(EQUAL, name="roomy", command="fit", source={"batch_size": 1})
    watch = Watch()
    limit_fit(monkeypatch, lambda lengths: len(lengths) <= 2, watch)
    run(EQUAL, name="cramped", command="fit", source={"batch_size": 4}, watch=watch)
    assert sum(watch.all("fitted")) == len(EQUAL)
    roomy, cramped = (sorted((run.folder / n / "memories").glob("*")) for n in ("roomy", "cramped"))
    assert [path.name for path in roomy] == [path.name for path in cramped]
    for one, other in zip(map(Memory.load, roomy), map(Memory.load, cramped), strict=True):
        assert other.curves[0].cross_entropy == pytest.approx(one.curves[0].cross_entropy, rel=1e-4)
        assert one.context_hashes == other.context_hashes


def test_a_sample_that_never_fits_ends_the_run_and_keeps_the_rest(run, alone, monkeypatch):
    predictions = run.folder / "run" / "predictions.jsonl"
    with monkeypatch.context() as patch:
        # The sample of 90 tokens: neither among the first, which are the longest, nor the last.
        limit_fit(patch, lambda lengths: not any(95 < length < 110 for length in lengths), Watch())
        with pytest.raises(OutOfMemoryError):
            run(source={"batch_size": 2}, **TWO)
    kept = predictions.read_bytes().splitlines()
    assert 2 <= len(kept) < 2 * len(UNEQUAL)
    assert_same(run(source={"batch_size": 3}, **TWO), alone(**TWO))
    assert set(kept) <= set(predictions.read_bytes().splitlines()), "answered again"


@pytest.mark.parametrize("rest", [{"batch_size": 5}, {"max_batch_tokens": 200}, {}], ids=str)
def test_a_killed_run_goes_on_with_other_batches(run, alone, rest):
    auto = {} if rest else {"auto_batch": False}
    with pytest.raises(Killed):
        run(watch=Watch(stop_before=2), source={"batch_size": 3}, **TWO)
    predictions = run.folder / "run" / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 * 3 * 2
    predictions.write_bytes(b"".join(lines)[:-20])  # the last record is half written
    watch, again = Watch(), Watch()
    assert_same(run(watch=watch, source=rest, **auto, **TWO), alone(**TWO))
    kept = {json.loads(line)["index"] for line in lines[:-2]}
    assert set(itertools.chain(*watch.all("batch"))) == set(range(len(UNEQUAL))) - kept
    whole = predictions.read_bytes()
    assert set(lines[:-2]) <= set(whole.splitlines(keepends=True)), "answered again"
    # Nothing is left to do, whatever the batches.
    run(watch=again, source={"batch_size": 2}, **TWO)
    assert (run.result.num_new, again.events, predictions.read_bytes()) == (0, [], whole)
