"""Tables, the HTML page and the command."""

from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser

import pytest

from lightning_mat.report import report, results_table, text_table
from lightning_mat.report.command import add_arguments, report_command
from lightning_mat.report.layers import short_names
from lightning_mat.report.page import find_spectra

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Page(HTMLParser):
    """Collects the tables of a page, and checks that its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.sources = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_the_page_holds_everything_itself(stored, tmp_path):
    data = stored(4)
    path = report(tmp_path / "run")
    assert path == tmp_path / "run" / "mat" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|<script", text)
    episodes, *units = page.tables
    assert len(episodes) == 1 + len(data.step)
    assert sum(len(table) - 1 for table in units) == len(data.names)


def test_the_tables_of_the_page_say_what_was_stored(stored, tmp_path):
    data = stored(4)
    page = Page(report(tmp_path / "run", tmp_path / "page.html").read_text(encoding="utf-8"))
    episodes, heads, _ = page.tables
    last = dict(zip(episodes[0], episodes[-1], strict=False))
    trained = int(data.active[-1, data.by_kind()["head"]].sum())
    assert (last["episode"], last["epoch"], last["step"]) == ("3", "3", "40")
    assert last["head trained"] == f"{trained} of 4"
    for row in heads[1:]:
        i = data.names.index(row[0])
        assert row[1] == data.reasons[-1][i]
        assert row[2] == f"{int(data.active[:, i].sum())} of 4"
        assert float(row[4]) == pytest.approx(data.lambda_max[-1, i], rel=5e-3)


def test_names_are_escaped(stored, tmp_path):
    stored(1)
    folder = tmp_path / "run" / "mat"
    other = (tmp_path / "<b>&" / "mat").mkdir(parents=True) or tmp_path / "<b>&" / "mat"
    (other / "spectra.npz").write_bytes((folder / "spectra.npz").read_bytes())
    text = report(other.parent).read_text(encoding="utf-8")
    assert "<h1>Modular adaptive training: &lt;b&gt;&amp;</h1>" in text
    Page(text)


def test_a_run_is_found_by_its_folder_its_file_or_a_folder_above(stored, tmp_path):
    stored(1)
    run = tmp_path / "run"
    for place in (run, run / "mat", run / "mat" / "spectra.npz", tmp_path):
        assert find_spectra(place) == run / "mat" / "spectra.npz"


def parse(*arguments):
    """Return the command's parsed arguments."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


def test_the_command_prints_what_it_wrote(stored, tmp_path, capsys):
    stored(2)
    page = tmp_path / "out" / "page.html"
    assert report_command(parse(tmp_path / "run", "--output", page, "--png")) == 0
    written = capsys.readouterr().out.split()
    assert written == [
        str(page.with_name(n)) for n in ("page.html", "lambda_max.png", "active.png")
    ]
    assert all((tmp_path / "out" / name).stat().st_size for name in written)


def test_the_command_tells_what_to_put_right(stored, tmp_path, capsys):
    assert report_command(parse(tmp_path)) == 1
    assert f"no mat/spectra.npz at or below {tmp_path}" in capsys.readouterr().err
    stored(1)
    second = tmp_path / "second" / "mat"
    second.mkdir(parents=True)
    (second / "spectra.npz").write_bytes(b"")
    assert report_command(parse(tmp_path)) == 1
    assert f"2 runs below {tmp_path}, name one:" in capsys.readouterr().err
    assert report_command(parse(second)) == 1
    assert "not a spectra file" in capsys.readouterr().err


def test_results_stand_side_by_side_with_dashes_for_what_is_missing():
    text = results_table(
        [
            {"method": "full", "test_loss": 5.43210, "steps": 12000, "pflops": 12.3456},
            {"method": "random", "seconds": None, "trained_share": 0.5, "other": 1},
        ]
    )
    head, rule, full, random = text.splitlines()
    assert head == "method  test loss   steps  PFLOPs  seconds  probe share  trained share"
    assert set(rule) == {"-", " "}
    assert full.split() == ["full", "5.4321", "12,000", "12.35", "-", "-", "-"]
    assert random.split() == ["random", "-", "-", "-", "-", "-", "50.0%"]
    assert len({len(line) for line in (head, rule, full, random)}) == 1


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        text_table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("layers", "short"),
    [
        (["a.0", "a.1", "a.0"], ["0", "1"]),
        (["a"], ["a"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["a.b.0", "a.c.0"], ["b.0", "c.0"]),
        (["features.0", "classifier"], ["features.0", "classifier"]),
        ([], []),
    ],
)
def test_short_names_drop_what_all_layers_share_and_stay_distinct(layers, short):
    assert list(short_names(layers).values()) == short
