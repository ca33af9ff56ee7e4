"""The results of a search: terminal tables, Markdown and picture say what the ranking holds."""

import io
import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
from matplotlib import colormaps
from rich.console import Console

from fastmem_pl.search import summary
from fastmem_pl.search.ranking import Baseline, RankedPoint, Ranking
from fastmem_pl.search.summary import heat_map, markdown, plot_study, print_search

SVG = "{http://www.w3.org/2000/svg}"


def entry(value, rate=1e-5, steps=4, kl=0.1, n=40, failed=0, error=0.05, scores=None, **others):
    point = {"learning_rate": rate, "steps": steps, "kl_coeff": kl, **others}
    means = {"accuracy": value, "output_words": 3.4, **(scores or {})}
    measured = {"value": value, "standard_error": error, "gain": value - 0.5, "gain_error": error}
    return RankedPoint(point=point, n=n, scores=means, failed=failed, seconds=0.5, **measured)


def ranking(points, objective="accuracy", warnings=(), baseline_n=40):
    axes = {name: sorted({p.point[name] for p in points}) for name in points[0].point}
    scores = {"accuracy": 0.5, "output_words": 7.0}
    baseline = Baseline(n=baseline_n, value=0.5, standard_error=0.08, scores=scores, seconds=0.1)
    return Ranking(objective, axes, baseline, list(points), list(warnings))


GRID = [
    entry(0.725, 1e-5, 4, 0.1),
    entry(0.675, 3e-5, 4, 0.1),
    entry(0.6, 1e-5, 8, 0.3),
    entry(0.55, 3e-5, 8, 0.3),
    entry(0.45, 3e-5, 8, 0.1),
]


def drawn(path, *given):
    """The picture of a ranking."""
    heat_map(ranking(*given), path)
    return ElementTree.parse(path).getroot()


def texts(picture):
    return [element.text for element in picture.iter(f"{SVG}text")]


def tables(text):
    """Rows of every Markdown table, the header first; the rule below it is checked and left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}
        assert set(rows[1]) == {"---:"}
        found.append([rows[0], *rows[2:]])
    return found


def test_the_terminal_shows_the_best_zero_shot_heat_maps_and_warnings():
    def printed(warnings=(), **options):
        console = Console(file=io.StringIO(), width=140)
        print_search(ranking(GRID, warnings=warnings), console, **options)
        return re.sub(r"\s+", " ", console.file.getvalue())

    line = "the best [bold]x[/bold], 3e-05: add larger values :smile:"
    text = printed([line], top=2)
    assert "rank learning rate steps kl coeff accuracy gain words s/sample" in text
    assert "1 1e-05 4 0.1 72.5% ± 5.0 +22.5% ± 5.0 3.4 0.50 2 3e-05 4 0.1 67.5%" in text
    assert "zero-shot - - - 50.0% ± 8.0 - 7.0 0.10 3 further points: see search.md" in text
    assert "steps 4 learning_rate ↓ kl_coeff → 0.1 0.3" in text
    assert text.index("1e-05 72.5 - 3e-05 67.5 - ") < text.index("1e-05 - 60.0 3e-05 45.0 55.0")
    assert line in text
    assert "further point" not in printed(top=5)
    assert "svg" not in text


def test_columns_only_where_they_tell_something():
    plain = tables(markdown(ranking(GRID)))[0][0]
    assert plain == ["rank", "learning_rate", "steps", "kl_coeff", "accuracy", "gain", "words", "s/sample"]
    single = tables(markdown(ranking(GRID[:1])))[0][0]
    assert single == ["rank", "accuracy", "gain", "words", "s/sample"]
    failing = tables(markdown(ranking([*GRID, entry(0.1, 3e-5, n=39, failed=2)])))[0]
    assert failing[0][4] == "n"
    assert [row[4] for row in failing[-2:]] == ["39", "40"]
    assert failing[0][-2] == "failed"
    assert [row[-2] for row in failing[1:]] == ["0"] * 5 + ["2", "-"]


def test_further_scores_have_their_labels_and_gaps():
    best = entry(0.7, scores={"contained": 0.8, "format_failure": 0.05, "f1": 0.3})
    header, first, zero = tables(markdown(ranking([best])))[0]
    assert header == ["rank", "accuracy", "gain", "contained", "format failure", "words", "s/sample"]
    assert first[3:] == ["80.0%", "5.0%", "3.4", "0.50"]
    assert zero[3:] == ["-", "-", "7.0", "0.10"]


def test_a_single_point_and_sample(tmp_path):
    given = [entry(0.1, n=1, error=None)], "format_failure", (), 1
    text = markdown(ranking(*given))
    assert "Searched 1 point for format failure (lower is better) on 1 sample: learning_rate 1e-05;" in text
    points, cells = tables(text)
    assert points[1][:3] == ["1", "10.0%", "-40.0%"]
    assert cells[1] == ["1e-05", "**10.0**"]
    assert "10.0" in texts(drawn(tmp_path / "heatmap.svg", *given))


def test_text_contrasts_with_every_colour():
    """At least 4.5:1, which WCAG asks of text."""

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for i in range(256):
        behind = luminance(colormaps["viridis"](i)[:3])
        ink = {"#000000": 0.0, "#ffffff": 1.0}[summary._ink(colormaps["viridis"](i))]
        high, low = max(behind, ink), min(behind, ink)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_a_heat_map_over_further_axes_takes_the_best_and_says_so():
    points = [entry(0.7, alpha=0.5), entry(0.65, 3e-5, alpha=0.3), entry(0.6, alpha=0.3)]
    text = markdown(ranking(points))
    assert "a cell is the best over alpha" in text
    assert tables(text)[1][1] == ["1e-05", "**70.0**"]
    one = [entry(0.7, alpha=0.5), entry(0.65, 3e-5, alpha=0.5)]
    assert "best over" not in markdown(ranking(one))


def test_markdown_has_all_points_and_a_map_a_number_of_steps():
    text = markdown(ranking(GRID, warnings=["first thing", "second thing"]))
    points, four, eight = tables(text)
    assert [row[0] for row in points] == ["rank", "1", "2", "3", "4", "5", "zero-shot"]
    assert four[1:] == [["1e-05", "**72.5**", "-"], ["3e-05", "67.5", "-"]]
    assert eight[1:] == [["1e-05", "-", "60.0"], ["3e-05", "45.0", "55.0"]]
    assert four[0][1:] == ["0.1", "0.3"]
    assert (
        "Searched 5 points for accuracy (higher is better) on 40 samples: learning_rate 1e-05, 3e-05;" in text
    )
    assert points[-1][4:] == ["50.0% ± 8.0", "-", "7.0", "0.10"]
    assert text.endswith("## Warnings\n\n- first thing\n- second thing\n")
    assert len(re.findall(r"^!\[.+\]\(heatmap\.svg\)$", text, re.MULTILINE)) == 1


def test_the_picture_is_svg_with_all_values_and_axes_and_the_best_alone_outlined(tmp_path):
    root = drawn(tmp_path / "heatmap.svg", GRID)
    shown = texts(root)
    for value in ("72.5", "67.5", "60.0", "55.0", "45.0"):
        assert shown.count(value) == 1
    for label in ("steps 4", "steps 8", "accuracy (%)", "best outlined"):
        assert label in shown
    for label in ("1e-05", "3e-05", "0.1", "0.3", "learning_rate", "kl_coeff"):
        assert shown.count(label) == 2  # once a panel
    assert [path.name for path in tmp_path.iterdir()] == ["heatmap.svg"]
    (outlined,) = (element for element in root.iter(f"{SVG}g") if element.get("id") == "best")
    outline = outlined.find(f"{SVG}path").get("d")
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", outline)]
    value = next(e for e in root.iter(f"{SVG}text") if e.text == "72.5")
    found = re.search(r"translate\(([\d.]+) ([\d.]+)\)", value.get("transform"))
    place = found.groups() if found else (value.get("x"), value.get("y"))
    for ends, middle in zip((numbers[0::2], numbers[1::2]), map(float, place), strict=True):
        assert min(ends) < middle < max(ends)


def test_the_picture_has_the_same_bytes_each_time_and_leaves_no_state(tmp_path, monkeypatch):
    before = dict(plt.rcParams)
    drawn(tmp_path / "first.svg", GRID)
    assert dict(plt.rcParams) == before
    monkeypatch.setitem(plt.rcParams, "font.size", 30.0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    drawn(tmp_path / "second.svg", GRID)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


@pytest.mark.parametrize(("objective", "white"), [("accuracy", "45.0"), ("format_failure", "72.5")])
def test_the_picture_of_a_lower_is_better_score_has_the_low_end_bright(tmp_path, objective, white):
    found = drawn(tmp_path / "heatmap.svg", GRID, objective).iter(f"{SVG}text")
    ends = {text.text: "#ffffff" in text.get("style") for text in found if text.text in ("72.5", "45.0")}
    assert ends == {value: value == white for value in ("72.5", "45.0")}


def test_a_plot_of_a_study_that_fails_is_a_line_in_the_log(tmp_path, monkeypatch, caplog):
    optuna = pytest.importorskip("optuna")

    def fails(*args, **kwargs):
        raise ValueError("no\nroom")

    monkeypatch.setattr(summary, "_PLOTS", {"slice": "slice", "history": "optimization_history"})
    monkeypatch.setattr("optuna.visualization.matplotlib.plot_optimization_history", fails)
    found = optuna.create_study()
    assert plot_study(found, tmp_path, "accuracy") == []
    found.optimize(lambda trial: trial.suggest_float("alpha", 0, 1), n_trials=2)
    opened, style = plt.get_fignums(), dict(plt.rcParams)
    assert plot_study(found, tmp_path, "accuracy") == ["optuna-slice.svg"]
    assert "optuna-history.svg could not be drawn: no room" in caplog.messages
    assert (plt.get_fignums(), dict(plt.rcParams)) == (opened, style)
