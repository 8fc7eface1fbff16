"""BENCHMARKS.md: put together from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from benchmarks.evidence import causes, glossary
from benchmarks.evidence.sentences import sentences
from benchmarks.evidence.words import listed
from benchmarks.suites.registry import SUITES
from benchmarks.suites.results import RESULTS, Line, read
from benchmarks.suites.spec import DATA_SETS
from benchmarks.tabular import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = "BENCHMARKS.md"
#: Folder of the figures beside the project's own page, and beside any other.
FIGURES, OTHER_FIGURES = "docs/figures", "figures"

NOTHING = "No suite has been run yet: this page has no numbers."

READING = """\
Every method of a seed starts from the same weights and sees the same data and masks in the same
order. Text models begin after a head start that all seeds share, so that a seed there is another
order and other masks, not other weights. A difference is taken per seed; shown are its mean ±
standard error over the seeds and a 95% interval (Student's t). Where the interval covers zero the
verdict is "no difference seen": with so few seeds that is no proof that there is none, and of many
comparisons some exclude zero by chance. Test results are those of the weights with the best
validation result; on 640 reviews, or 2,000 images, one run's accuracy is uncertain by one or two
points by that alone.

Cost is counted in FLOPs of the operations that ran, probes included. "Paper's rule" takes a
backward pass for two forward passes and lets resting units cost nothing in it, by their share of
all units, also with the probes added. The same FLOPs are not the same seconds: small models spend
much of a step on what no count of products shows, and may save less time than FLOPs. Seconds are of
training with its probes, without validation; on one thread of a CPU, the CPU time of the process.

`short` is the fair rival of whatever saves work per step. At equal seconds or FLOPs of two runs of
as many steps, the learning rate of the cheaper one has fallen further, which flatters it: those
columns have no verdict. The cost until a target is shown only if every seed reached it; targets are
of validation results. `multirate` changes its decision in two of five steps, and every change
rebuilds the plans of gate and optimizer, which its seconds show."""

MACHINES = (
    "Seconds on a shared machine move from run to run, as caches and memory are shared, by a tenth "
    "and more where much else ran: differences below that are noise. Ratios of FLOPs are exact."
)


def load(folder: Path = RESULTS) -> dict[str, list[Line]]:
    """Return the finished runs of every suite that has some, CPU before GPU, by seed and order.

    Lines of runs that the suite has no more, because a setting has changed, are left out.
    """
    found = {}
    for name in SUITES:
        paths = sorted(folder.glob(f"{name}-*.jsonl"), key=lambda p: ("cpu" not in p.stem, p.stem))
        lines = [line for path in paths for line in read(path).values() if is_current(name, line)]
        if lines:
            found[name] = lines
    return found


def is_current(suite: str, line: Line) -> bool:
    """Return whether a suite still has the run that a line is of."""
    return line["key"] in _keys(suite, line["scale"], line["seed"])


@lru_cache
def _keys(suite: str, scale: str, seed: int) -> frozenset[str]:
    return frozenset(run.key for run in SUITES[suite].runs(scale, [seed]))


def text(
    results: Mapping[str, Sequence[Line]],
    figures: Mapping[str, str] | None = None,
    folder: str = FIGURES,
) -> str:
    """Return the page; equal results give equal text.

    Args:
        results: The finished runs of each suite.
        figures: What the figures there are show, by name: :mod:`benchmarks.evidence.figures`.
        folder: Where they are, as the page links to them.
    """
    if not results:
        return f"# Benchmarks\n\n{NOTHING}\n"
    parts = ["# Benchmarks", *sentences(results), causes.section(results)]
    names = [line["method"]["name"] for lines in results.values() for line in lines]
    parts += ["## The methods", glossary.methods(names)]
    parts += ["## How to read this", READING, MACHINES]
    parts += ["## Where it was measured", machines(results)]
    for name, lines in results.items():
        suite = SUITES[name]
        scales = dict.fromkeys(line["scale"] for line in lines)
        differs = " ".join(filter(None, (glossary.stand_in(name, scale) for scale in scales)))
        parts += [f"## {title(name, lines)}", differs, commands(name, lines)]
        parts.append(suite.report(list(lines)))
        parts += [
            f"![{words}]({folder}/{figure})"
            for figure, words in (figures or {}).items()
            if figure.startswith(f"{name}-")
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(suite: str, lines: Sequence[Line]) -> str:
    """Return a suite's title with the data sets that its runs were trained on."""
    names = list(dict.fromkeys(line["corpus"]["name"] for line in lines if "corpus" in line))
    return SUITES[suite].TITLE.format(corpus=listed([DATA_SETS.get(n, n) for n in names]))


def commands(suite: str, lines: Sequence[Line]) -> str:
    """Return the commands that a suite's runs are of."""
    found = {}
    for line in lines:
        environment = line["environment"]
        own = environment["device"] == "cpu"
        before = f"OMP_NUM_THREADS={environment['threads']} " if own else ""
        command = f"{before}python -m benchmarks {suite} --scale {line['scale']}"
        found[f"`{command} --data DIR --results FOLDER`"] = True
    return listed(list(found))


def machines(results: Mapping[str, Sequence[Line]]) -> str:
    """Return which runs come from which machine, versions and commits."""
    rows: dict[tuple[str, ...], int] = {}
    for name, lines in results.items():
        for line in lines:
            e = line["environment"]
            commit = (e["commit"] or "unknown")[:9] + (" (modified)" if e["modified"] else "")
            machine = e["cpu"] if e["device"] == "cpu" else e["device"]
            versions = f"torch {e['torch']}, lightning {e['lightning']}"
            key = (name, line["scale"], machine, str(e["threads"]), versions, commit)
            rows[key] = rows.get(key, 0) + 1
    cells = [[f"`{key[0]}`", *key[1:], str(count)] for key, count in rows.items()]
    head = ["suite", "scale", "machine", "threads", "versions", "commit", "runs"]
    return markdown(head, cells)


def home(folder: Path) -> Path:
    """Return where the page of some results belongs: the project's root for its own."""
    return ROOT if folder.resolve() == RESULTS else folder


def write(folder: Path = RESULTS, out: Path = ROOT) -> list[Path]:
    """Write the page and its figures; return their paths.

    Args:
        folder: Of the results.
        out: Where the page goes; figures to ``docs/figures`` of the project's root, else to
            ``figures`` beside the page.

    Raises:
        ModuleNotFoundError: If there is something to draw and matplotlib is not installed.
    """
    from benchmarks.evidence.figures import draw, names

    results = load(folder)
    figures = FIGURES if out.resolve() == ROOT else OTHER_FIGURES
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw(results, out / figures)
    page = out / PAGE
    page.write_text(text(results, names(results), figures), encoding="utf-8")
    return [page, *drawn]
