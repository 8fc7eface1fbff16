"""The alignment with the loss gradient, against Jacobians of the samples' losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mat.mntk import alignment as module
from lightning_mat.mntk.alignment import loss_alignment
from lightning_mat.mntk.probe import Probe, mntk
from tests.mntk.test_probe import Case, make
from tests.reference.jacobian import jacobian_grams
from tests.reference.models import parameter_units


def labelled(name: str, dtype: torch.dtype) -> tuple[Case, dict[str, Tensor], Tensor]:
    """Return a model, its batch with labels, and the mNTKs of its losses by definition."""
    case = make(name)
    labels = torch.randint(0, 11, case.batch.shape, generator=torch.Generator().manual_seed(5))

    def losses(model: nn.Module) -> Tensor:
        logits = case.logits(model)
        return torch.stack(
            [nn.functional.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]
        )

    grams = jacobian_grams(case.model, losses, parameter_units(case.model))
    return make(name, dtype), {"x": case.batch, "labels": labels}, grams


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=str
)
def test_alignment_is_that_of_the_jacobian(dtype: torch.dtype, tolerance: float) -> None:
    case, batch, grams = labelled("encoder", dtype)
    part = parameter_units(case.model)
    found = mntk(
        case.model, batch, part, output="loss", forward=lambda m, b: m(b["x"]), alignment=True
    )
    assert found.gram is None
    assert found.alignment is not None
    left, singular, _ = torch.linalg.svd(grams)
    expected = left[:, :, 0].sum(1).square()
    # A direction is as well defined as its eigenvalue stands out; a key's bias has no gradient.
    clear = (singular[:, 0] > 1.1 * singular[:, 1]) & (singular[:, 0] > 1e-9 * singular.max())
    assert int(clear.sum()) > len(part) // 2
    assert expected[clear].max() > 2 * expected[clear].min()
    samples = len(batch["labels"])
    torch.testing.assert_close(
        found.alignment[clear], expected[clear], rtol=tolerance, atol=tolerance * samples
    )


def test_alignment_does_not_change_the_spectra_and_grams_are_kept_if_asked_for() -> None:
    case, batch, _ = labelled("encoder", torch.float64)
    part = parameter_units(case.model)
    plain, aligned, both = (
        mntk(case.model, batch, part, output="loss", forward=lambda m, b: m(b["x"]), **options)
        for options in ({}, {"alignment": True}, {"alignment": True, "keep_gram": True})
    )
    assert plain.alignment is None
    assert torch.equal(plain.eigenvalues, aligned.eigenvalues)
    assert both.gram is not None
    assert both.alignment is not None
    assert torch.equal(loss_alignment(both.gram), both.alignment)


def test_trainability_is_the_loss_reduction_of_a_step_where_one_direction_is_all() -> None:
    # One parameter: its mNTK has rank one, and λ_max (u₁ᵀr)² is the squared gradient of Σ losses.
    model = nn.Linear(1, 1, bias=False).double()
    x, y = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    part = parameter_units(model)
    spectra = mntk(model, (x, y), part, output="loss", alignment=True)
    assert spectra.alignment is not None
    (gradient,) = torch.autograd.grad((model(x) - y).square().sum(), model.weight)
    predicted = spectra.lambda_max * spectra.alignment
    assert predicted.item() == pytest.approx(float(gradient.square()), rel=1e-9)


def test_slices_zeros_and_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    jacobians = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(0))
    grams = jacobians @ jacobians.mT
    grams[2], grams[4] = 0.0, torch.nan
    whole = loss_alignment(grams)
    monkeypatch.setattr(module, "_SLICE_BYTES", 3 * 8 * 25)
    torch.testing.assert_close(loss_alignment(grams), whole, equal_nan=True)
    assert whole[2] == 0
    assert whole.isnan().tolist() == [i == 4 for i in range(7)]
    assert (whole[~whole.isnan()] <= 5 + 1e-9).all()


@pytest.mark.parametrize("output", ["sum_logits", "random", lambda m, b: m(b).sum(1)])
def test_other_outputs_are_refused(output: object) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match='exists for output="loss" only'):
        Probe(model, parameter_units(model), output=output, alignment=True)  # type: ignore[arg-type]
