"""Memories of the tiny model for tests of keeping, asking and shipping them, and plain twins of what they do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import Said, files

from fastmem_pl import Backbone, Memorizer, Memory, memorize_document
from fastmem_pl.backbone import EncodedContext
from fastmem_pl.backbone.anatomy import find_anatomy
from fastmem_pl.cli import main

TEXT = (
    "The tower stands in Rome. Zoë built it by the river in one winter, and nobody finds it strange at all."
)
OTHER = "Water boils at ninety degrees in this story; the people of the hills cross them to reach the market."
TEXTS = [TEXT, OTHER, "Bob. Bob. Bob."]
QUESTIONS = ["Where is the tower?", "Who built it?", "When?"]
STRONG: dict[str, Any] = {"steps": 4, "learning_rate": 2e-2}


def arguments(command: str, positional: tuple[object, ...], options: dict[str, object]) -> list[str]:
    """A command line; an option of several values is repeated, ``True`` is a switch, ``None`` left out."""
    parts = [command, *map(str, positional)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                parts += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
    return parts


@pytest.fixture
def fastmem(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> Callable[..., Said]:
    """Run a command on the tiny model in `tmp_path`; by default it must succeed."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *positional: object, expect: int | None = 0, **options: object) -> Said:
        defaults = {"model": tiny_folder, "device": "cpu"}
        if command == "memorize":
            defaults |= STRONG
        capsys.readouterr()
        status = main(arguments(command, positional, {**defaults, **options}))
        ran = Said(status, *capsys.readouterr())
        assert expect is None or status == expect, f"exit status {status}: {ran.err}"
        return ran

    return call


@pytest.fixture
def refused_command(fastmem, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused in one line, with nothing written; gives the line."""

    def call(command: str, *positional: object, **options: object) -> str:
        before = files(tmp_path)
        status, out, err = fastmem(command, *positional, expect=None, **options)
        assert status == 2, f"exit status {status}: {out}{err}"
        assert out == ""
        *said, line = err.splitlines()
        assert line.startswith("fastmem: error: "), err
        assert all(note.startswith("fastmem: ") for note in said), f"not one line: {err!r}"
        assert err.endswith("\n")
        assert files(tmp_path) == before, "something was written"
        return line

    return call


@pytest.fixture(scope="session", name="backbone")
def loaded_tiny(tiny_folder: Path) -> Backbone:
    """The tiny model as the commands load it; not to be written to."""
    return Backbone.load(str(tiny_folder))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model with other weights."""
    from conftest import save_model

    return save_model(tmp_path_factory.mktemp("stranger"), seed=7)


@pytest.fixture(scope="session")
def memory(backbone: Backbone) -> Memory:
    """TEXT, memorized in this process."""
    return memorize_document(Memorizer(backbone, **STRONG), TEXT)


@pytest.fixture(scope="session")
def demo_memory(demo: Backbone) -> Memory:
    """Of the demo model."""
    text = "The museum of Lindt was founded by Ada Birch in 1741. It keeps nine thousand blue lanterns."
    return Memorizer(demo, steps=5, learning_rate=3e-4)([text])


@pytest.fixture(scope="session")
def batch(backbone: Backbone) -> Memory:
    """Three memories that differ."""
    return Memorizer(backbone, **STRONG)(TEXTS)


@pytest.fixture(scope="session")
def kept(memory: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TEXT's memory as an exact file; not to be written to."""
    path = tmp_path_factory.mktemp("kept") / "notes.fastmem"
    memory.save(path)
    return path


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT, "utf-8")
    return path


def save(model: Any, folder: Path) -> str:
    """A model with the tokenizer, as a user's own folder."""
    from conftest import make_tokenizer

    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def prose(length: int, seed: int = 0) -> str:
    """Text of so many tokens (a byte each), which repeats nothing for long."""
    numbers = torch.randint(0, 27, (length,), generator=torch.Generator().manual_seed(seed))
    return "A" + "".join("abcdefghijklmnopqrstuvwxyz "[i] for i in numbers[2:]) + "."


def log_probs(model: Any, group: Sequence[EncodedContext], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Of the next token, by plain transformers, at all positions of some sequences that have a label."""
    logits = [model(input_ids=torch.tensor([e.input_ids])).logits[0, e.header_length - 1 : -1] for e in group]
    return torch.cat(logits).log_softmax(-1, dtype)


def labels_of(group: Sequence[EncodedContext]) -> torch.Tensor:
    return torch.tensor([token for e in group for token in e.input_ids[e.header_length :]])


@torch.no_grad()
def loss_of(model: Any, *group: EncodedContext) -> float:
    return F.nll_loss(log_probs(model, group), labels_of(group)).item()


def plain_fit(
    backbone: Backbone,
    groups: Sequence[Sequence[EncodedContext]],
    steps: int,
    learning_rate: float,
    kl_coeff: float,
    num_layers: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    """The published algorithm: edit a copy of the model's own weights, on one group of sequences after the other.

    Returns cross-entropy, KL and gradient norm by step, the changes of the weights, and the edited model.
    """
    base = copy.deepcopy(backbone.model)
    base = base.to(dtype) if dtype else base
    model = copy.deepcopy(base)
    blocks = model.get_submodule(backbone.anatomy.layout.blocks)[-num_layers:]
    # Biases are not trained by FastMem.
    trained = [p for block in blocks for p in block.mlp.parameters() if p.ndim == 2]
    before = [parameter.detach().clone() for parameter in trained]
    for parameter in trained:
        parameter.requires_grad_(True)
    curve = []
    for group in groups:
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
        with torch.no_grad():
            reference = log_probs(base, group)
        for _ in range(steps):
            log_p = log_probs(model, group)
            cross_entropy = F.nll_loss(log_p, labels_of(group))
            kl = F.kl_div(log_p, reference, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            (cross_entropy + kl_coeff * kl).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            curve.append((cross_entropy.item(), kl.item(), norm.item()))
    return torch.tensor(curve), [p.detach() - o for p, o in zip(trained, before, strict=True)], model


@torch.no_grad()
def logits_of(model: Any, *texts: str) -> torch.Tensor:
    from conftest import make_tokenizer

    return model(input_ids=torch.tensor([make_tokenizer()(text).input_ids for text in texts])).logits


@torch.no_grad()
def merged(backbone: Backbone, memory: Memory | None, row: int = 0) -> Any:
    """A copy of the model whose weights hold one memory, if there is any."""
    model = copy.deepcopy(backbone.model)
    if memory is None:
        return model
    anatomy, first = find_anatomy(model), backbone.num_blocks - memory.num_layers
    for layer, deltas in enumerate(memory.deltas):
        for name, projection in anatomy.projections(first + layer).items():
            projection.weight.add_(deltas[name][row])
    return model


def generated(model: Any, prompts: list[list[int]], pad: int = 256, **settings: Any) -> list[list[int]]:
    """New tokens of transformers' own generate, for prompts of any length."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 10, "do_sample": False, **settings}
    found = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return [row[width:].tolist() for row in found]


def cut_at_end(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    """Rows up to their end token, which is kept; the filling after it is not."""
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def assert_same(one: Memory, other: Memory, rtol: float = 1e-4) -> None:
    """The same curves and nearly the same deltas."""
    for found, expected in zip(one.curves, other.curves, strict=True):
        for name in ("cross_entropy", "kl", "grad_norm"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rtol, abs=1e-6), name
    # Adam's first steps divide by the gradient's size: where that is near 0, rounding decides.
    assert_deltas(one, other, 1e-3)


def assert_deltas(one: Memory, other: Memory, tolerance: float = 0.0) -> None:
    assert len(one.deltas) == len(other.deltas)
    for ours, theirs in zip(one.deltas, other.deltas, strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            found = ours[name].float()
            assert found.shape == expected.shape, name
            assert expected.any(), "a memory of nothing proves nothing"
            error = (found - expected.float()).norm() / expected.float().norm()
            assert error <= tolerance, (name, float(error))


def truncated(memory: Memory, rank: int) -> list[dict[str, torch.Tensor]]:
    """Deltas of the nearest matrices of a rank."""
    layers = []
    for layer in memory.deltas:
        layers.append({})
        for name, delta in layer.items():
            u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
            layers[-1][name] = ((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).float()
    return layers
