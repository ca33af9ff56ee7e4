"""What the commands on single memories share: the options of the model, and texts from files."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import torch

from fastmem_pl import Backbone, BackboneSettings, ChatSettings, FastMemModule
from fastmem_pl.base.errors import FastMemError
from fastmem_pl.base.outside import as_text, read_bytes
from fastmem_pl.cli.configs import read_configs
from fastmem_pl.cli.parser import OneLineParser


@dataclass(frozen=True)
class ModelOptions:
    """Model.

    Args:
        model: demo (default), a Hub id, a folder or a .gguf file.
        config: packaged configs or files whose model settings apply, later ones on top (default: those of
            memorizing in demo for the demo model, in base for others).
        device: auto, cpu, cuda or cuda:N.
        precision: by default 32-true on a CPU, bf16-true on a GPU.
        quantization: keep the trunk in fewer bits (extras bnb and torchao); a memory is asked as it was
            memorized.
        device_map: lay the model out over all GPUs: auto, balanced or sequential.
        trust_remote_code: run code that comes with the checkpoint.
        revision: branch, tag or commit of a Hub repository.
        subfolder: folder of the repository, or of a local folder, that holds the model.
        attn_implementation: eager, sdpa, flash_attention_2 and others; by default transformers' choice.
    """

    model: str | None = None
    config: str | None = None
    device: str = "auto"
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] | None = None
    quantization: Literal["bnb-4bit", "bnb-8bit", "torchao-int4", "torchao-int8"] | None = None
    device_map: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    subfolder: str | None = None
    attn_implementation: str | None = None

    @cached_property
    def settings(self) -> Any:
        """Settings of the configs by group (backbone, memorize, decode, chat), with these options on top.

        Of the configs that apply by default, only the settings of memorizing count.
        """
        configs = read_configs([self.config or ("demo" if self.model in (None, "demo") else "base")])
        found = configs.settings.get("model", {})
        if not self.config:
            found = {"memorize": found["memorize"]}
        names = {field.name for field in fields(BackboneSettings)} & {field.name for field in fields(self)}
        given = {"source": self.model, **{name: getattr(self, name) for name in names}}
        given = {name: value for name, value in given.items() if value}
        found["backbone"] = {**found.get("backbone", {}), **given}
        parser = OneLineParser()
        parser.add_class_arguments(FastMemModule, "model")
        try:
            return parser.parse_object({"model": found}).model
        except FastMemError as error:
            raise configs.name_file(error) from error

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Defaults of the other options of a command."""
        groups = {"settings": self.settings.memorize, "decode": self.settings.decode}
        return {f"{group}.{name}": v for group, found in groups.items() for name, v in vars(found).items()}

    def load(self, num_layers: int, experts: str = "auto", max_experts: int | None = None) -> Backbone:
        """The model on the chosen device; its trained layers stay together and unquantized."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = auto if self.device == "auto" else self.device
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise FastMemError(f"--device: {device!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
        count = torch.cuda.device_count()
        if device != "cpu" and int(device.partition(":")[2] or 0) >= count:
            raise FastMemError(f"--device: there is no {device} here ({count} GPUs); give --device cpu")
        precision = self.precision or ("32-true" if device == "cpu" else "bf16-true")
        trained = {"num_layers": num_layers, "experts": experts, "max_experts": max_experts}
        backbone = Backbone.load(
            precision=precision, device=device, **trained, **vars(self.settings.backbone)
        )
        return backbone.with_chat(ChatSettings(**vars(self.settings.chat)))


def read_text(path: str, what: str = "a text to memorize") -> str:
    """A text file, or standard input for ``-``; ``what`` says what it should hold."""
    name = "standard input" if path == "-" else path
    text = as_text(sys.stdin.buffer.read() if path == "-" else read_bytes(path, pipe=True), name)
    if not text.strip():
        raise FastMemError(f"{name} is empty; give {what}")
    return text
