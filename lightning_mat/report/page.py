"""One HTML page about a run, with everything in it."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_mat.policies.base import BELOW, PROTECTED, TEMPORAL, compact
from lightning_mat.report.files import write_whole
from lightning_mat.report.plot import active_figure, lambda_max_figure
from lightning_mat.report.store import SpectraData, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECTRA = Path("mat") / "spectra.npz"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22262e;
  background: #fff; max-width: 60rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem; }
p { max-width: 44rem; }
img { width: 100%; height: auto; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2.4rem; margin: 1.4rem 0; }
dt { color: #6b7280; font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .7rem; border-bottom: 1px solid #e6e8eb;
  white-space: nowrap; }
th { color: #6b7280; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text, th.text { text-align: left; }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0; }
.muted { color: #6b7280; }
"""


def report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write a page about a run: pictures, episodes and units, in one file that needs no network.

    Args:
        run_dir: The run's folder, which holds ``mat/spectra.npz``; or that file itself; or a folder
            with a single such run somewhere below.
        output: The page; ``report.html`` beside ``spectra.npz`` by default.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If no run is found.
        ValueError: If several runs are found, the file is damaged, or holds no probe.
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If the page cannot be written.
    """
    source = find_spectra(run_dir)
    data = read(source)
    page = Path(output) if output is not None else source.with_name("report.html")
    text = render(data, _title(source))
    write_whole(page, lambda stream: stream.write(text.encode()))
    return page


def find_spectra(run_dir: str | Path) -> Path:
    """Return the spectra file of a run.

    Raises:
        FileNotFoundError: If there is none at or below ``run_dir``.
        ValueError: If there are several below it.
    """
    place = Path(run_dir)
    for candidate in (place, place / SPECTRA, place / SPECTRA.name):
        if candidate.is_file():
            return candidate
    found = sorted(place.rglob(str(SPECTRA))) if place.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"no {SPECTRA} at or below {place}: name the run's log folder, e.g. "
            "lightning_logs/version_0, of a run that got past its warm-up"
        )
    if len(found) > 1:
        runs = "\n".join(f"  {file.parent.parent}" for file in found)
        raise ValueError(f"{len(found)} runs below {place}, name one:\n{runs}")
    return found[0]


def render(data: SpectraData, title: str) -> str:
    """Return the page as text.

    Args:
        data: The probes, at least one.
        title: What the page is about.
    """
    kinds = data.by_kind()
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(data),
        "<h2>How trainable every unit was</h2>",
        "<p>The principal eigenvalue of a unit's neural tangent kernel says how fast training it "
        "still lowers the loss. A line is solid where the unit trained until the next probe, and "
        "dotted where it rested.</p>",
        _image(lambda_max_figure(data), "λ_max of every unit over the optimizer steps"),
        "<h2>Which units trained</h2>",
        _image(active_figure(data), "map of the units that trained in each episode"),
        "<h2>Episodes</h2>",
        _episodes(data),
        "<h2>Units</h2>",
    ]
    for kind, members in kinds.items():
        parts.append(
            f"<details{' open' if len(members) <= 64 else ''}><summary>{escape(kind)}: "
            f"{len(members)} units</summary>{_units(data, members)}</details>"
        )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _title(source: Path) -> str:
    """Return a name for a run, from the folder that holds its ``mat`` folder."""
    folder = source.resolve().parent
    folder = folder.parent if folder.name == SPECTRA.parent.name else folder
    return f"Modular adaptive training: {folder.name}"


def _facts(data: SpectraData) -> str:
    """Return the run in a few numbers."""
    kinds = ", ".join(f"{len(m)} {kind}" for kind, m in data.by_kind().items())
    facts = (
        ("units", f"{len(data.names)} ({kinds})"),
        ("probes", str(len(data.step))),
        ("last probe at step", f"{data.step[-1]:,}"),
        ("units trained, on average", f"{data.active.mean():.1%}"),
        ("seconds per probe", f"{data.seconds.mean():.3g}"),
    )
    return (
        "<dl>"
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        + "</dl>"
    )


def _image(figure: Figure, description: str) -> str:
    """Return a figure as an image inside the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    code = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{code}">'


def _episodes(data: SpectraData) -> str:
    """Return the table of episodes: who trained, above which threshold, and why others rested."""
    titles = ["episode", "epoch", "step", "probe s"]
    for kind in data.by_kind():
        titles += [f"{kind} trained", "λ_α", "below", "temporal", "protected"]
    rows = []
    for p in range(len(data.step)):
        row = [str(p), str(data.epoch[p]), f"{data.step[p]:,}", f"{data.seconds[p]:.3g}"]
        for kind, members in data.by_kind().items():
            reasons = Counter(data.reasons[p][i] for i in members)
            threshold = float(data.thresholds[kind][p])
            row += [
                f"{int(data.active[p, members].sum())} of {len(members)}",
                compact(threshold) if np.isfinite(threshold) else "",
                *(str(reasons[r]) if reasons[r] else "" for r in (BELOW, TEMPORAL, PROTECTED)),
            ]
        rows.append(row)
    return _table(titles, rows)


def _units(data: SpectraData, members: Sequence[int]) -> str:
    """Return the table of a kind's units."""
    titles = ["unit", "now", "episodes trained", "λ_max first", "λ_max last", "effective rank last"]
    rows = [
        [
            data.names[i],
            data.reasons[-1][i],
            f"{int(data.active[:, i].sum())} of {len(data.step)}",
            compact(float(data.lambda_max[0, i])),
            compact(float(data.lambda_max[-1, i])),
            compact(float(data.effective_rank[-1, i])),
        ]
        for i in members
    ]
    return _table(titles, rows, 1)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], text: int = 0) -> str:
    """Return an HTML table; column ``text`` is aligned to the left, as the first one always is."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=text' if place == text else ''}>{escape(cell)}</{tag}>"
                for place, cell in enumerate(cells)
            )
            + "</tr>"
        )

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll"><table><thead>{line("th", titles)}</thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
