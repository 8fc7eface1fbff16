"""docs/scaling.md: its numbers come from the result file, its formulas are the code's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import ddp_markdown

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")


def result() -> dict[str, Any]:
    """Return a result in which one process makes a step in 2 s and a probe in 1 + 3 s."""

    def run(processes: int, seconds: float) -> dict[str, Any]:
        row = {"way": "ddp_mat", "share": 0.5, "seconds": seconds, "bytes": 2_000_000}
        probe = {
            "seconds": 4.0,
            "forward_seconds": 1.0,
            "units": 20,
            "samples": 8,
            "busiest": {"1": 1.0, "2": 0.6, "4": 0.5, "8": 0.4},
            "work": {"1": 1.0, "2": 1.1, "4": 1.6, "8": 2.0},
            "collectives": 4,
            "gathered_bytes": 8 * 20 * 10,
            "decision_bytes": 500,
        }
        wire = [{"bytes": 0.0, "seconds": 0.1}, {"bytes": 4e6, "seconds": 0.5}]
        sizes = {"elements": 1_000_000, "trained_elements": 500_000}
        return {
            "processes": processes,
            "steps": [row | sizes],
            "probe": probe,
            "all_reduce": wire,
        }

    return {
        "title": "a model",
        "batch_size": 4,
        "rounds": 3,
        "cores": 2,
        "large": [8],
        "runs": [run(1, 2.0), run(2, 2.5), run(4, 5.0)],
    }


def test_predictions_are_those_of_the_formulas() -> None:
    made = result()
    _, two, four = made["runs"]
    steps = [ddp_markdown.predicted_step(made, run, run["steps"][0]) for run in (two, four)]
    # 0.1 s for each of two buckets, and 0.1 µs per byte; four processes take turns on two cores.
    assert steps == [pytest.approx(2.4), pytest.approx(4.4)]
    probes = [ddp_markdown.predicted_probe(made, run) for run in (two, four)]
    sent = 4 * 0.1 + 1600e-7
    expected = [1 + 0.6 * 3 + sent, (4 * 1 + 1.6 * 3) / 2 + sent]
    assert probes == [pytest.approx(seconds) for seconds in expected]


@pytest.mark.parametrize("elements", [1000, 2**18, 2**18 + 1, 20_000_000])
def test_ddp_makes_no_more_buckets(elements: int) -> None:
    params = [torch.empty(1000, device="meta")] * (elements // 1000)
    params += [torch.empty(elements % 1000, device="meta")] * (elements % 1000 > 0)
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    made = dist._compute_bucket_assignment_by_size(params, limits)[0]
    assert ddp_markdown.buckets(elements) - 1 <= len(made) <= ddp_markdown.buckets(elements)


def test_tables_show_what_was_counted() -> None:
    page = ddp_markdown.page(result())
    assert "| 2 | `ddp_mat` | 50% | 50.0% | 2.00 | 50.0% | 2.500 | 2.400 |" in page
    assert "| 8 | 40.0% | 2.8 | 0.5 |  |  |" in page
    assert "| 8 | 3.50 |" in page


def test_one_process_is_not_compared_with_itself() -> None:
    page = ddp_markdown.page(result())
    assert "| 1 | `ddp_mat` | 50% | 50.0% | 2.00 | 50.0% | 2.000 |  |" in page
    assert "| 1 | 100.0% | 0.0 | 0.5 | 4.000 |  |" in page


def test_the_agreement_is_counted() -> None:
    # Steps of 2.5 s and 5.0 s for 2.4 s and 4.4 s; probes of 4.0 s for 3.2 s and 4.8 s.
    assert ddp_markdown.agreement(result()) == (
        "With several processes, of 2 steps 1 took what the formula says to within 5%, and the "
        "differences are from +4% to +14%; of 2 probes 0 took what the formula says to within 5%, "
        "and the differences are from -17% to +25%."
    )


def test_tables_are_those_of_the_result_file() -> None:
    assert "Counted and measured" in PAGE
    for block in ddp_markdown.committed().split("\n\n"):
        assert block in PAGE
