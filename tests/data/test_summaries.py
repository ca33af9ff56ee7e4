"""Files of articles and summaries: field names of one's own, and malformed records."""

import pytest
from runs import SUMMARIES, write

from fastmem_pl import FastMemDataModule, FastMemError
from fastmem_pl.data import read_samples


def test_a_summary_file_of_the_users_own(tmp_path):
    renamed = [{"text": r["article"], "gold": r["summary"], "article": "?"} for r in SUMMARIES]
    paths = [
        write(tmp_path / f"{name}.jsonl", data) for name, data in (("own", renamed), ("usual", SUMMARIES))
    ]
    fields = {"article": "text", "summary": "gold"}
    own = FastMemDataModule("summary", str(paths[0]), fields=fields)
    usual = FastMemDataModule("summary", str(paths[1]))
    for data in (own, usual):
        data.setup("predict")
    assert own.samples == usual.samples


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"article": ""}, "article"),
        ({"article": 3}, "article"),
        ({"articel": "x"}, "article"),
        ({"article": "x", "summary": 3}, "summary"),
    ],
)
def test_a_malformed_summary_record_is_refused(tmp_path, bad, field):
    with pytest.raises(FastMemError, match=rf"mine\.jsonl.*line 2.*'{field}'"):
        read_samples(write(tmp_path / "mine.jsonl", [SUMMARIES[0], bad]), "cnndm")
