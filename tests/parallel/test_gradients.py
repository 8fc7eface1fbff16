"""Gradients in two processes are those of one process on the same global batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_wrapper,
)

from lightning_mat import policies
from tests.parallel import cases

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddp": (("ddp", {}), {"mat": {}}),
    "ddp, units": (("ddp", {}), {"mat": {"skip": "units"}}),
    "ddp, bucket views": (("ddp", {"gradient_as_bucket_view": True}), {"mat": {}}),
    "ddp, finding": (("ddp", {"find_unused_parameters": True}), {"mat": {"skip": "units"}}),
    "ddp, manual": (("ddp", {}), {"mat": {}, "net": {"returns": "manual"}}),
    "ddp, no_sync": (("ddp", {}), {"mat": {}, "accumulate_grad_batches": 2}),
    "ddp, dict": (("ddp", {}), {"mat": {}, "net": {"returns": "dict"}}),
    "mat": (("ddp_mat", {}), {"mat": {}}),
    "mat, units": (("ddp_mat", {}), {"mat": {"skip": "units"}}),
    "mat, small buckets": (("ddp_mat", {"bucket_cap_mb": 0.001}), {"mat": {}}),
    "mat, bucket views": (
        ("ddp_mat", {"gradient_as_bucket_view": True}),
        {"mat": {"skip": "units"}, "accumulate_grad_batches": 2},
    ),
    "mat, manual": (("ddp_mat", {}), {"mat": {"skip": "units"}, "net": {"returns": "manual"}}),
    "mat, spectra": (
        ("ddp_mat", {}),
        {"mat": {"policy": cases.Cycle(needs_spectra=True), "every_n_steps": 3}},
    ),
    "mat, clipped": (("ddp_mat", {}), {"mat": {}, "gradient_clip_val": 0.05}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(
    name: str, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    plan, options = CASES[name]
    alone = cases.gradients(tmp_path / "alone", None, options)
    first, second = on_both(cases.gradients, tmp_path / "both", plan, options)
    assert first["active"] == alone["active"]
    assert any(not all(active) for active in first["active"])
    assert len(first["grads"]) == len(alone["grads"]) > 3
    for mine, other, expected in zip(first["grads"], second["grads"], alone["grads"], strict=True):
        for which, a, b, e in zip(first["names"], mine, other, expected, strict=True):
            assert (a is None) == (b is None) == (e is None), which
            if a is not None:
                assert torch.equal(a, b)
                assert torch.allclose(a, e, rtol=1e-9, atol=1e-12), which
    assert all(map(torch.equal, first["weights"], second["weights"]))
    for a, e in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["ddp", "ddp_mat"])
def test_everything_active_is_plain_training(
    name: str, tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    plan = ("ddp", {})
    plain = on_both(cases.gradients, tmp_path / "a", plan, {})
    options = {"mat": {"policy": policies.Full()}}
    adaptive = on_both(cases.gradients, tmp_path / "b", (name, {}), options)
    for a, b in zip(plain, adaptive, strict=True):
        assert all(map(torch.equal, a["weights"], b["weights"]))


@pytest.mark.parametrize(
    "options",
    [
        {"ddp_comm_hook": bf16_compress_hook},
        {"ddp_comm_wrapper": fp16_compress_wrapper, "gradient_as_bucket_view": True},
    ],
)
def test_compressed_gradients_are_rounded_ones(
    options: dict[str, Any], tmp_path: Path, on_both: Callable[..., list[Any]]
) -> None:
    mat = {"mat": {}, "max_steps": 4}
    exact = on_both(cases.gradients, tmp_path / "a", ("ddp_mat", {}), mat)[0]
    rounded = on_both(cases.gradients, tmp_path / "b", ("ddp_mat", options), mat)
    assert all(map(torch.equal, *(r["weights"] for r in rounded)))
    # Two bytes travel of each element where eight did, of what trains alone.
    assert [4 * sent for sent in rounded[0]["sent"]] == exact["sent"]
    for a, e in zip(rounded[0]["grads"][0], exact["grads"][0], strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-3)
            assert torch.equal(a == 0, e == 0)
