"""The warning of base models."""

import pytest
from conftest import make_model, make_tokenizer

from fastmem_pl import Backbone
from fastmem_pl.memory.advice import warn_of_base_model


@pytest.mark.parametrize("template", [None, "", "{{ messages }}"])
def test_a_base_model_is_named(caplog, template):
    tokenizer = make_tokenizer()
    backbone = Backbone(make_model(), tokenizer, name="some-base")
    tokenizer.chat_template = template
    warn_of_base_model(backbone)
    assert ("some-base has no chat template, so it seems a base model" in caplog.text) == (not template)
