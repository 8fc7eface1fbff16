"""BENCHMARKS.md: what it says follows from the result files, and nothing else."""

import json

import pytest

from benchmarks.evidence import (
    causes,
    comparison,
    facts,
    figures,
    glossary,
    overhead,
    page,
    pareto,
    sentences,
    stability,
)
from benchmarks.suites import bert
from benchmarks.suites.pareto import methods as pareto_methods
from benchmarks.suites.registry import SUITES
from benchmarks.suites.results import Results
from benchmarks.suites.scales import SCALES
from benchmarks.suites.spec import Method, paired

ENVIRONMENT = {
    **{"commit": "0123456789abcdef", "modified": False, "device": "cpu", "cpu": "Some CPU"},
    **{"threads": 2, "torch": "2.15", "lightning": "2.6"},
}


def line(run, *, loss=5.0, seconds=100.0, flops=1e15, probe_seconds=0.0, needs=None) -> dict:
    """A finished run: the loss falls in a straight line from 7 at the first of two points."""
    point = {"paper_flops": flops, "flops": flops, "seconds": seconds, "loss": loss, "step": 6}
    first = {k: v / 2 for k, v in point.items()} | {"loss": 7.0, "step": 3}
    reasons = {"λ_max ≥ λ_α": 3, "below λ_α": 1}
    active = {"a|head": [1, 2], "b|head": [2, 2]}
    return {
        "key": run.key,
        **run.settings(),
        **{
            "steps": 3 if run.method.plain else 6,
            "initial": "x",
            "corpus": {"name": "embedded"},
            "seconds": seconds,
        },
        **{"flops": flops, "paper_flops": flops, "full_step_flops": 1e14, "units": 4},
        **{"probes": int(probe_seconds > 0), "episode_seconds": probe_seconds, "probe_flops": 0.0},
        **{"trained_share": 0.5, "shares_trained": {"50": 1, "100": 3}},
        "curve": [first, point],
        "episodes": [{"step": 2, "trained": active, "reasons": reasons}]
        if run.method.policy
        else [],
        **{"test_best": {"loss": loss}, "test_end": {"loss": loss}, "best_step": 6},
        "environment": ENVIRONMENT,
    }


def suite(losses: dict[str, tuple[float, ...]], **options) -> list[dict]:
    """Runs of the suite ``bert``, one loss per seed of each method."""
    runs = {(r.method.name, r.seed): r for r in bert.runs("test", range(3))}
    return [
        line(runs[name, seed], loss=loss, **options.get(name.replace("-", "_"), {}))
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]


BETTER = {"full": (5.0, 5.1, 5.2), "mat": (4.9, 5.0, 5.1), "short": (5.3, 5.4, 5.5)}


def test_the_committed_page_is_what_the_committed_results_give():
    results = page.load()
    written = (page.ROOT / page.PAGE).read_text(encoding="utf-8")
    assert written == page.text(results, figures.names(results))
    for name in figures.names(results):
        assert (page.ROOT / page.FIGURES / name).read_bytes()[:4] == b"\x89PNG"


def test_without_results_the_page_says_so(tmp_path):
    assert page.load(tmp_path) == {}
    assert page.NOTHING in page.text({})
    assert all("has not been measured yet" in text for text in sentences.sentences({}))


def test_the_page_is_read_from_files_and_the_same_each_time(tmp_path):
    results = Results("bert", "cpu", tmp_path)
    for one in suite(BETTER):
        results.append(one)
    found = page.load(tmp_path)
    assert page.text(found) == page.text(json.loads(json.dumps(found)))
    paths = page.write(tmp_path, tmp_path / "out")
    assert {p.parent for p in paths[1:]} == {tmp_path / "out" / "figures"}
    assert [p.name for p in paths[1:]] == list(figures.names(found))
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths[1:])
    text = paths[0].read_text()
    assert text == page.text(found, figures.names(found), "figures")
    assert "over FLOPs and seconds, BERT tiny](figures/bert-test-cpu-tiny-curves.png)" in text
    command = "OMP_NUM_THREADS=2 python -m benchmarks bert --scale test --data DIR --results FOLDER"
    assert f"`{command}`" in text
    assert "| `mat` | MAT with the paper's α and β" in text
    assert "| `multirate` |" not in text
    assert "## BERT, masked words of the embedded corpus (paper: table 1)" in text
    assert "| `bert` | test | Some CPU | 2 | torch 2.15, lightning 2.6 | 012345678 | 9 |" in text


def test_verdicts_follow_the_intervals():
    [found] = facts.sorted_facts(suite(BETTER))
    assert found.versus("mat", "full").mean == pytest.approx(-0.1)
    assert found.verdict(found.versus("mat", "full")) == "better"
    assert found.verdict(found.versus("short", "full")) == "worse"
    mixed = suite({"full": (5.0, 5.1, 5.2), "mat": (4.0, 6.0, 5.2)})
    [found] = facts.sorted_facts(mixed)
    assert found.verdict(found.versus("mat", "full")) == facts.NO_DIFFERENCE
    [found] = facts.sorted_facts(suite({"full": (5.0,), "mat": (4.0,)}))
    assert found.verdict(found.versus("mat", "full")) == "one seed: no interval"
    assert found.verdict(found.versus("mat", "nobody")) == "no pair"


def test_more_accuracy_is_better():
    lines = suite({"full": (0.5, 0.5, 0.5), "mat": (0.6, 0.7, 0.65)})
    for one in lines:
        one["task"] = {**one["task"], "model": "vgg"}
        one["test_best"] = {"accuracy": one["test_best"]["loss"]}
    [found] = facts.sorted_facts(lines)
    assert found.verdict(found.versus("mat", "full")) == "better"


def test_cost_until_the_full_runs_best_validation():
    # full falls from 7 at 50 s to 5 at 100 s; mat from 7 at 25 s to 4 at 50 s: 5 after 41.7 s.
    lines = suite({"full": (5.0,), "mat": (4.0,), "short": (5.5,)}, mat={"seconds": 50.0})
    [found] = facts.sorted_facts(lines)
    assert found.until_target("mat", "seconds") == {0: pytest.approx((25 + 25 * 2 / 3) / 100)}
    assert found.until_target("short", "seconds") == {0: None}
    assert found.until_target("full", "seconds") == {0: 1.0}
    # At 50 s full has seen 7, mat 4.
    assert found.at_equal("seconds", "mat").mean == pytest.approx(-3)
    # At equal FLOPs both are at their ends.
    assert found.at_equal("flops", "mat").mean == pytest.approx(-1)
    assert "| `short` | – | – | – | 0 of 1 |" in comparison.target(found)


def test_sentences_count_as_better_only_what_the_interval_calls_so():
    text = " ".join(sentences.sentences({"bert": suite(BETTER)}))
    short = "plain training cut to the same counted FLOPs"
    assert (
        "on average worse in none of 1 comparison, better in 1 (1 beyond the 95% interval)." in text
    )
    assert f"in none of 1 with {short}; beyond the 95% interval it was better than {short} in 1."
    swapped = {"full": BETTER["full"], "mat": BETTER["short"], "short": BETTER["mat"]}
    text = " ".join(sentences.sentences({"bert": suite(swapped)}))
    assert (
        "on average worse in 1 of 1 comparison (1 beyond the 95% interval), better in none." in text
    )
    assert (
        f"in 1 of 1 with {short}; beyond the 95% interval it was worse than {short} in 1." in text
    )
    even = {"full": (5.0, 5.1, 5.2), "mat": (5.2, 5.0, 5.2), "short": (5.0, 5.3, 5.2)}
    text = " ".join(sentences.sentences({"bert": suite(even)}))
    assert "worse in 1 of 1 comparison (none beyond the 95% interval), better in none." in text
    assert f"in none of 1 with {short}; beyond the 95% interval it was neither." in text


def test_rankings_are_said_to_beat_what_their_intervals_say():
    runs = paired("pareto", "test", [_task()], _methods(), (0, 1, 2))
    losses = {"full": 5.0, "random-50%": 5.2, "short-50%": 5.4, "top-lambda_max-loss-50%": 5.1}
    lines = [line(r, loss=losses[r.method.name] + 0.01 * r.seed) for r in runs]
    [found] = facts.sorted_facts(lines)
    assert list(pareto.shares(found)) == ["50%"]
    names = pareto.shares(found)["50%"]
    assert pareto.ranked(found, names)[0] == "top-lambda_max-loss-50%"
    text = sentences.same_cost([found])
    assert "random units by -0.100 [-0.100, -0.100] (the loss's) with 50% of the units" in text
    assert "of 1 rankings 1 beat random units and 1 plain training of as many FLOPs" in text
    for one in lines:
        if one["method"]["name"].startswith("top"):
            one["test_best"]["loss"] += (0.1, 0.2, -0.1)[one["seed"]]
    text = sentences.same_cost([found])
    assert "by -0.033 [" in text
    assert "of 1 rankings none beat random units and none plain training of as many" in text
    twins = [
        {**one, "method": {**one["method"], "name": "top-x-50%"}}
        for one in lines
        if one["method"]["name"].startswith("top")
    ]
    found = facts.sorted_facts([*lines, *twins])[0]
    assert pareto.shares(found)["50%"][-1] == "top-x-50%"
    assert "of 1 rankings" in sentences.same_cost([found])  # the same results count once


def test_stability_is_the_least_and_the_largest_that_was_measured():
    def point(sampled, between):
        return {
            "samples": {"sum_logits": {"16": sampled}},
            "outputs": {"sum_logits vs loss": between},
        }

    [one] = suite({"full": (5.0,)})
    one["ranking"] = [point({"head": 0.9, "ffn": 0.5}, {"head": 0.8, "ffn": None})]
    one["ranking"].append(point({"head": 1.0, "ffn": None}, {"head": 0.0, "ffn": -0.2}))
    text = sentences.stability(facts.sorted_facts([one]))
    assert "0.50 to 1.00 (median 0.90) with 16 samples" in text
    assert "it is -0.20 to 0.80 (median 0.00)" in text


def test_models_with_other_sizes_of_probes_stand_in_the_same_columns():
    def ranked(name, by_size):
        [one] = suite({"full": (5.0,)})
        one["task"] = {**one["task"], "name": name}
        kinds = {size: {"head": value} for size, value in by_size.items()}
        point = {"step": 3, "samples": {"loss": kinds}, "outputs": {"a vs b": {"head": 0.5}}}
        return {**one, "ranking": [point]}

    lines = [ranked("one", {"6": 0.25, "16": 0.5}), ranked("other", {"16": 0.75})]
    text = stability.tables(lines)
    assert "| after | 6 samples | 16 samples |" in text
    assert "| 3 of 6 steps | 0.25 | 0.50 |" in text
    assert "| 3 of 6 steps | – | 0.75 |" in text


def test_lines_of_earlier_settings_are_left_out(tmp_path):
    results = Results("bert", "cpu", tmp_path)
    [first, second] = suite({"full": (5.0, 5.1)})
    results.append(first)
    results.append({**second, "key": "of-another-setting"})
    assert [one["seed"] for one in page.load(tmp_path)["bert"]] == [0]


def test_causes_say_who_rested_and_how_unequal_the_units_are():
    lines = suite({**BETTER, "mat-budget": (4.9, 5.2, 5.1)})
    for one in lines:
        for episode in one["episodes"]:
            episode["trained"] = {"0|head": [1, 2], "1|head": [2, 2], "2|head": [0, 2]}
            episode["skew"] = {"head": 4.5}
    text = causes.section({"bert": lines})
    said = "| head | 4.5 | 50% | 100% | 0% | 100% |"
    assert f"| BERT tiny (bert) | `mat` {said} -0.1000 ± 0.0000 | better | better | – | – |" in text
    same = "-0.0333 ± 0.0667 | no difference seen | – | – | – |"
    assert f"| BERT tiny (bert) | `mat-budget` {said} {same}" in text
    assert causes.section({"overhead": lines}) == ""


def _task():
    return bert.runs("test", [0])[0].task


def _methods() -> list[Method]:
    wanted = ("full", "random-50%", "short-50%", "top-lambda_max-loss-50%")
    return [m for m in pareto_methods((0.5,)) if m.name in wanted]


def test_probe_shares_and_callback_costs():
    lines = suite(BETTER, mat={"probe_seconds": 1.0})
    for one in lines:
        one["scale"] = "cpu"
    text = sentences.overhead({"bert": lines})
    assert "took 1.0% of a run's seconds, on average per suite, most in `bert`" in text
    rounds = [
        {"plain": {"step_seconds": 1.0}, "active": {"step_seconds": ratio}}
        for ratio in (1.0, 1.1, 9.0)
    ]
    assert overhead.step_ratio([{"rounds": rounds}], "active").mean == 1.1


def test_a_method_that_rested_nothing_is_called_so_and_not_compared():
    even = {"full": (5.0, 5.1, 5.2), "mat": (5.1, 5.0, 5.2), "short": (5.0, 5.2, 5.1)}
    lines = suite(even)
    ours = [one for one in lines if one["method"]["name"] == "mat"]
    for one in lines:
        one["trained_share"] = 1.0
    [found] = facts.sorted_facts(lines)
    assert found.says("mat", "full") == "`mat` rested nothing"
    assert found.says("short", "mat") == "`mat` rested nothing"
    assert found.says("short", "full") == facts.NO_DIFFERENCE  # fewer steps, never fewer units
    assert found.says("mat", "nobody") == "no pair"
    text = " ".join(sentences.sentences({"bert": lines}))
    assert "was not compared (1 rested too little to say, or had too few seeds)" in text
    assert "has not been measured yet" in text
    assert "| `mat` rested nothing |" in comparison.tables(lines)
    for one in lines:
        one["steps"] = 6
    assert found.says("short", "full") == "`short` left out no step"
    assert found.says("mat", "short") == "`mat` rested nothing and `short` left out no step"
    for one in ours:
        one["trained_share"] = 0.995
    assert found.says("mat", "full") == "`mat` rested below 1%"
    ours[0]["trained_share"] = 0.9
    assert found.says("mat", "full") == facts.NO_DIFFERENCE


def test_small_costs_are_in_a_readable_unit():
    text = comparison.tables(suite(BETTER, full={"flops": 4e10}))
    assert "| `full` | 100.0 ± 0.0 s | 40.00 ± 0.00 GFLOPs | 40.00 ± 0.00 GFLOPs |" in text
    assert "PFLOPs" not in text


def test_tables_name_every_method_and_pair():
    text = comparison.tables(suite(BETTER, mat={"flops": 8e14}))
    for method in BETTER:
        assert f"| `{method}` | 3 |" in text
    assert "| `mat` − `short` | 3 | -0.4000 ± 0.0000 |" in text
    assert "80%" in text
    assert "| why units train or rest | below λ_α | λ_max ≥ λ_α |" in text
    assert "| `mat` | 25% | 75% |" in text


def test_runs_that_started_apart_are_called_unpaired():
    lines = suite(BETTER)
    assert "All methods of a seed started from the same weights" in comparison.tables(lines)
    for one in lines:
        one["batches"] = [1, 2, 3][: one["steps"]]
    assert "saw the same first batches" in comparison.tables(lines)
    lines[5]["batches"] = [1, 7]
    assert "Not paired: methods saw different batches with seed 2." in comparison.tables(lines)
    lines[4]["initial"] = "y"
    assert "Not paired: methods started from different weights with seed 1." in comparison.tables(
        lines
    )


def test_differences_do_not_depend_on_the_order_of_lines():
    lines = suite(BETTER)
    forward, backward = (
        {method: facts.sorted_facts(some)[0].versus(method, "full") for method in BETTER}
        for some in (lines, lines[::-1])
    )
    assert forward == pytest.approx(backward, nan_ok=True)


def test_every_method_is_explained():
    names = {
        run.method.name
        for suite in SUITES.values()
        for scale in SCALES
        for run in suite.runs(scale, [0])
        if run.method.name != "interleaved"  # the three ways of `overhead` are in its own table
    }
    for name in names:
        assert glossary.methods([name]).count("\n") == 2, name
