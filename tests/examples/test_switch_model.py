"""The Switch encoder: routing against a loop, what is dropped, gradients, independent samples."""

import doctest

import pytest
import torch

from examples.models import switch
from examples.models.switch import Mixture, Switch, SwitchConfig, assign, balance_loss
from lightning_mat import mntk, partition


def small(**options):
    return SwitchConfig(2, 64, vocab_size=50, max_length=16, dropout=0.0, **options)


def test_doctests():
    assert doctest.testmod(switch).failed == 0


def by_loop(mixture, x):
    """The mixture, token by token: [S, T, H] → [S, T, H], and the tokens dropped."""
    out, dropped = torch.zeros_like(x), 0
    places = mixture.config.capacity(x.shape[1])
    for s, sample in enumerate(x):
        full = [0] * mixture.config.experts
        for t, token in enumerate(sample):
            probabilities = mixture.router(token).softmax(0)
            expert = int(probabilities.argmax())
            if full[expert] == places:
                dropped += 1
                continue
            full[expert] += 1
            out[s, t] = probabilities[expert] * mixture.experts[expert](token)
    return out, dropped


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 4.0])
def test_mixture_and_its_gradients_equal_a_loop_over_tokens(factor):
    torch.manual_seed(0)
    mixture = Mixture(small(capacity_factor=factor))
    torch.nn.init.normal_(mixture.router.weight)
    x = torch.randn(3, 10, 64, requires_grad=True)
    # Double precision for all but the softmax, which the mixture takes in float32.
    mixture, x = mixture.double(), x.detach().double().requires_grad_()
    wanted, dropped = by_loop(mixture, x)
    found, _, share = mixture(x)
    assert share.item() == pytest.approx(dropped / 30)
    assert (dropped == 0) == (factor == 4.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    by = torch.randn_like(wanted)
    inputs = [x, *mixture.parameters()]
    for g, expected in zip(
        torch.autograd.grad((found * by).sum(), inputs, allow_unused=True),
        torch.autograd.grad((wanted * by).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        expected = torch.zeros_like(g) if expected is None else expected
        torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-6)


def test_no_expert_takes_more_than_its_places_and_who_comes_first_stays():
    torch.manual_seed(0)
    chosen = torch.randint(3, (5, 40))
    slot, kept = assign(chosen, experts=3, places=11)
    for s in range(5):
        taken = slot[s][kept[s]]
        assert len(set(taken.tolist())) == len(taken)
        assert torch.equal(taken // 11, chosen[s][kept[s]])
        for e in range(3):
            queue = kept[s][chosen[s] == e]
            assert queue.sum() == min(11, len(queue))
            assert queue[: int(queue.sum())].all()
    assert (slot[~kept] == 33).all()


def test_balance_loss_by_a_loop_and_when_even():
    torch.manual_seed(0)
    probabilities = torch.rand(2, 6, 3, dtype=torch.float64).softmax(-1)
    chosen = probabilities.argmax(-1)
    expected = 0.0
    for e in range(3):
        f = sum(int(c == e) for c in chosen.flatten()) / 12
        expected += 3 * f * float(probabilities[..., e].sum()) / 12
    assert float(balance_loss(probabilities, chosen)) == pytest.approx(expected, rel=1e-6)
    even = torch.full((2, 6, 3), 1 / 3)
    assert float(balance_loss(even, torch.arange(12).view(2, 6) % 3)) == pytest.approx(1)


def test_samples_do_not_compete():
    torch.manual_seed(0)
    model = Switch(small(capacity_factor=0.8)).double()
    words = torch.randint(50, (4, 12))
    together = model(words)
    assert together.dropped > 0
    for s in range(4):
        alone = model(words[s : s + 1]).logits[0]
        torch.testing.assert_close(alone, together.logits[s], rtol=1e-5, atol=1e-8)


def test_units_are_found_and_probed():
    torch.manual_seed(0)
    model = Switch(small())
    part = partition(model, "heads+experts")
    assert sorted(set(part.kinds)) == ["expert", "head"]
    assert len(part) == 2 * (4 + 1)
    assert not any("router" in s.param for unit in part for s in unit.slices)
    spectra = mntk(model, {"input_ids": torch.randint(50, (4, 12))}, part)
    assert (spectra.lambda_max > 0).all()


def test_every_parameter_gets_a_gradient_and_the_router_from_the_balance_too():
    torch.manual_seed(0)
    model = Switch(small())
    words, positions = torch.randint(50, (8, 12)), torch.randint(12, (8, 3))
    out = model(words, positions)
    assert out.logits.shape == (8, 3, 50)
    routers = [layer.mixture.router.weight for layer in model.layers]
    assert all(g.any() for g in torch.autograd.grad(out.balance, routers, retain_graph=True))
    out.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.decoder.weight is model.words.weight


def test_the_host_never_asks_the_device():
    # Tensors without values raise where one is asked for.
    with torch.device("meta"):
        model = Switch(small())
        out = model(torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long))
        (out.logits.sum() + out.balance).backward()


def test_unusable_sizes_are_named():
    with pytest.raises(ValueError, match=r"experts must be ≥ 1.*got 0 and 1.5"):
        small(experts=0)
    with pytest.raises(ValueError, match="17 tokens is longer than max_length 16"):
        Switch(small())(torch.zeros(1, 17, dtype=torch.long))
