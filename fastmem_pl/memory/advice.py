"""What to know about a model before it memorizes."""

import logging

from fastmem_pl.backbone import Backbone

log = logging.getLogger(__name__)


def warn_of_base_model(backbone: Backbone) -> None:
    """Warn of a model without a chat template, which memorizing may make worse."""
    if not backbone.tokenizer.chat_template:
        log.warning(
            "%s has no chat template, so it seems a base model: memorizing helps instruction-tuned models, "
            "and made answers of a base model worse (docs/troubleshooting.md); compare with zero-shot",
            backbone.name,
        )
