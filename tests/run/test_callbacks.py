"""The progress bar within a batch, and metrics that grow with each."""

import pytest

from fastmem_pl.run.callbacks import MetricAggregation, SampleProgress

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def moves(monkeypatch):
    """Where the bar was moved to, with the text beside it."""
    found, move = [], SampleProgress._move_to

    def kept(self, samples):
        move(self, samples)
        found.append((self._bar.n, self._bar.postfix))

    monkeypatch.setattr(SampleProgress, "_move_to", kept)
    return found


def test_moves_within_a_batch(tiny_run, moves, capsys):
    tiny_run(enable_progress_bar=True, model={"steps": 4})
    places = [place for place, _ in moves]
    assert places == sorted(places), "went back"
    assert {2, 4, 5} <= set(places), "batches of two"
    # Memorizing and each of three methods are a quarter of a batch, in tenths of a sample.
    assert places[:5] == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.6])
    assert [text for _, text in moves[:5]] == [*(f"memorizing {n}/4" for n in range(1, 5)), "answering 1/4"]
    assert max(place for place, text in moves[: places.index(2)]) < 2
    assert "5/5 [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "first"), [("fit", (1.0, "memorizing 1/2")), ("predict", (0.5, "answering 1/4"))]
)
def test_every_mode_fills_its_batches(tiny_run, moves, mode, first):
    tiny_run(mode, enable_progress_bar=True)
    assert moves[0] == first
    assert moves[-1] == (5, "")


def test_metrics_are_aggregated_batch_by_batch(tiny_run, monkeypatch):
    fed = []
    feed = MetricAggregation.feed
    monkeypatch.setattr(
        MetricAggregation, "feed", lambda self, records: (fed.append(len(records)), feed(self, records))
    )
    tiny_run()
    # What an earlier session did (nothing), then batches of two samples by three methods.
    assert fed == [0, 6, 6, 3]
