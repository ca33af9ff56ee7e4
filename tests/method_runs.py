"""Runs of every method on every task, and the same by plain loops over whole models."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from tokenizers import pre_tokenizers
from torch.nn import functional as F

from fastmem_pl import FastMemDataModule, FastMemModule, FastMemTrainer
from fastmem_pl.cli import main

METHODS = ["zero-shot", "one-shot", "cad", "dola", "fastmem", "fastmem+cd", "fastmem+cad", "fastmem+dola"]
NQ = [
    {"input": question, "context": text.format(old), "answer": old, "sub_context": text.format(new), "sub_answer": new}
    for question, old, new, text in (
        ("where is the tower", "Paris", "Rome", "The tower stands in {}."),
        ("who wrote the play", "Ann", "Bob", "A play of five acts, {} wrote it in one winter, and no one knew."),
        ("where was zoë born", "Oslo", "Rome", "Zoë was born in {}; «naïve» readers ask why."),
        ("what is the mark", "dot", "star", "The mark <|im_end|> is a {}."),
    )
]  # fmt: skip
QUOTE = 'Write a quote that ends in the word "first"'
MEMOTRAP = [
    {"prompt": f"{QUOTE}: He laughs best who laughs", "classes": "[' first.', ' last.']", "answer_index": 0}
]
HOTPOT = [
    {
        "id": "one",
        "question": "Which river is longer?",
        "answer": "the Long",
        "context": {
            "title": ["Long", "Short"],
            "sentences": [["The Long is a river.", " It is long."], ["Short."]],
        },
    }
]
QA = [
    {"context": "The cat is red.", "question": "What colour is the cat?", "answers": ["red", "crimson"]},
    {"context": "The dog is very old and blue.", "question": "What colour is the dog?", "answer": "blue"},
]
SUMMARIES = [
    {"article": "The cats sat on a red mat.\nA dog barked.", "summary": "The cat slept.\nA dog barked."},
    {"article": "Zoë's river rose by the mill.", "summary": "the cats slept soundly, as a river rose"},
    {"article": "Rain fell; nothing else happened that day in the long valley.", "summary": "Rain."},
]
ROUGE = {"rouge1", "rouge2", "rougeL", "rougeLsum"}
SUMMARY_TASKS = ("xsum", "cnndm", "wikihow", "summary")
ICL = (
    "Please extract from the context the span that best answers the question and provide the answer in the "
    'following format: "The answer is: ...".\nContext: '
)
RECORDS = {"nqswap": NQ, "nq": NQ, "nqswap_icl": NQ, "nq_icl": NQ, "memotrap": MEMOTRAP}
RECORDS |= {"hotpotqa": HOTPOT, "qa": QA} | dict.fromkeys(SUMMARY_TASKS, SUMMARIES)
TEXTS = {  # what stands for {context} and {question} in the prompts
    "nqswap": [(r["sub_context"], r["input"] + "?") for r in NQ],
    "nq": [(r["context"], r["input"] + "?") for r in NQ],
    "nqswap_icl": [(ICL + r["sub_context"], r["input"] + "?") for r in NQ],
    "nq_icl": [(ICL + r["context"], r["input"] + "?") for r in NQ],
    "memotrap": [(QUOTE + ".", 'He laughs best who laughs\nCandidates: "first" or "last"')],
    "hotpotqa": [("The Long is a river.  It is long.\nShort.", "Which river is longer?")],
    "qa": [(r["context"], r["question"]) for r in QA],
    **{task: [(r["article"], "") for r in SUMMARIES] for task in SUMMARY_TASKS},
}
TOKENIZER = make_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def read(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def run_methods(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict]]:
    """Answer a task's records in `tmp_path`, by the trainer or the command line; gives the records."""
    monkeypatch.chdir(tmp_path)

    def call(task: str, methods=METHODS, data=None, run_dir="run", command=None, **settings) -> list[dict]:
        model = {"backbone": tiny_folder, "methods": [*methods], "steps": 2, "learning_rate": 0.01}
        model |= {"max_new_tokens": 3} | {name: v for name, v in settings.items() if "__" not in name}
        model = {name: str(value) if isinstance(value, Path) else value for name, value in model.items()}
        source = {"task": task, "path": str(write(tmp_path / f"{task}.jsonl", data or RECORDS[task]))}
        source |= {name[6:]: value for name, value in settings.items() if "__" in name}
        if command is None:
            trainer = FastMemTrainer(accelerator="cpu", enable_progress_bar=False)
            trainer.fit_predict(FastMemModule(**model), FastMemDataModule(**source), run_dir=run_dir)
        else:
            options = {f"model.{name}": value for name, value in model.items()}
            options |= {f"data.{name}": value for name, value in source.items()}
            options |= {
                "trainer.accelerator": "cpu",
                "trainer.enable_progress_bar": False,
                "run_dir": run_dir,
            }
            pairs = [(f"--{name}", v if isinstance(v, str) else json.dumps(v)) for name, v in options.items()]
            assert main([command, *(part for pair in pairs for part in pair)]) == 0
        return read(tmp_path / run_dir)

    return call


def ids_of(records: list[dict]) -> dict[tuple[int, str], list[int]]:
    return {(r["index"], r["method"]): r["token_ids"] for r in records}


def metrics_of(folder: Path, method: str) -> dict:
    return json.loads((folder / "metrics.json").read_text())["groups"]["all"][method]["metrics"]


@cache
def shown(task: str) -> dict[str, str]:
    """What `fastmem tasks TASK` prints under each of its headings, and its list of scores."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["tasks", task]) == 0
    _, *parts = re.split(r"^  (\w[^\n]*):$\n", out.getvalue(), flags=re.MULTILINE)
    bodies = [re.sub(r"^    ", "", body, flags=re.MULTILINE).rstrip("\n") for body in parts[1::2]]
    return dict(zip(parts[::2], bodies, strict=True)) | {
        "scores": re.search("scores: (.*)", out.getvalue())[1]
    }


def plain_ids(text: str) -> list[int]:
    """Ids of text, one a byte; nothing in it is a control token."""
    return [i for character in text for i in TOKENIZER.encode(character, add_special_tokens=False)]


def plain_prompt(task: str, form: str, sample: int) -> list[int]:
    named = dict(zip(("{context}", "{question}"), TEXTS[task][sample], strict=True))
    text = re.sub("{context}|{question}", lambda found: named[found[0]], shown(task)[form])
    return [START, *plain_ids(f"user\n{text}"), END, *plain_ids("\n"), START, *plain_ids("assistant\n")]


def plain_memorize(context: str, steps: int = 2, layers: int = 1, kl_coeff: float = 0.1):
    """The published loop: edit the weights of one model by autograd and torch's AdamW."""
    model, header = make_model(), [START, *plain_ids("assistant\n")]
    ids = torch.tensor([[*header, *plain_ids(context), END]])
    trained = [p for block in model.model.layers[-layers:] for p in block.mlp.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.01)
    reference, curve = None, {"cross_entropy": [], "kl": [], "grad_norm": []}
    for _ in range(steps):
        logs = model(ids).logits[0, len(header) - 1 : -1].log_softmax(-1)
        reference = logs.detach() if reference is None else reference
        loss = F.nll_loss(logs, ids[0, len(header) :])
        kl = (reference.exp() * (reference - logs)).sum(-1).mean()
        model.zero_grad()
        (loss + kl_coeff * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        for name, value in zip(curve, (loss, kl, norm), strict=True):
            curve[name].append(value.item())
    return model, curve


def save_roberta(folder: Path, model_class, seed=0) -> Path:
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=180).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"vocab_size": 261, "max_position_embeddings": 182, "type_vocab_size": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    model_class(transformers.RobertaConfig(initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder
