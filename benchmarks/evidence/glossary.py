"""What the methods of the suites are called, and how the small tasks differ from the paper's."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.tabular import markdown

#: Methods by a pattern of their name, in the order of the page.
METHODS = {
    "full": "plain training",
    "mat": 'MAT with the paper\'s α and β, `skip="weights"`; in `finetune` `skip="units"`',
    "mat-units": 'the same with `skip="units"`',
    "short": "plain training cut to the counted FLOPs of `mat`, its learning-rate schedule with it",
    "short-units": "the same for `mat-units`",
    "random": 'half of the units of each kind, drawn anew in every episode, `skip="weights"`; in '
    '`finetune` `skip="units"`',
    "random-units": 'the same with `skip="units"`',
    "multirate": "half of the units step every fifth step with five times the learning rate "
    "(Vlaar and Leimkuhler 2022)",
    "bottom": "as many units as `mat` in each episode, those with the smallest λ_max",
    "matched": "as many units of each layer as `mat` in each episode, drawn at random",
    "mat-auto": '`alpha="auto"`: the threshold lies in the widest gap of log λ_max; `skip="units"`',
    "mat-budget": "`budget=0.75`: units rest until three quarters of a full step's FLOPs are left; "
    '`skip="units"`',
    "mat-loss": '`mat` by the kernel of the loss, `output="loss"`',
    "short-loss": "plain training cut to the counted FLOPs of `mat-loss`",
    "lower-half": "the embedding and the lower half of the layers frozen",
    "top-…-n%": "n% of the units of each kind, the largest by this criterion of this output; "
    '`skip="units"`',
    "bottom-n%": 'n% of the units of each kind, those with the smallest λ_max of the loss; `skip="'
    'units"`',
    "random-n%": 'n% of the units of each kind, drawn at random; `skip="units"`',
    "matched-n%": "as many units of each layer as `top-lambda_max-loss-n%`, drawn at random",
    "short-n%": "plain training cut to the counted FLOPs of `top-lambda_max-loss-n%`",
    "top-weights-n%": '`top-lambda_max-loss-n%`, but `skip="weights"`',
    "random-weights-n%": '`random-n%`, but `skip="weights"`',
}

#: What a suite trains at a scale in place of the paper's model and data.
STAND_INS = {
    ("bert", "cpu"): "4 layers of a pretrained encoder of width 384 stand in for BERT, 64 word "
    "pieces of context for 512; feed-forward blocks are units beside heads, and a probe has 6 "
    "samples, not 64",
    ("switch", "cpu"): "2 layers of width 384 stand in for 12, WikiText-2 for WikiText-103, and a "
    "probe has 6 samples, not 64",
    ("vgg", "cpu"): "a quarter of the filters and 2,048 images without augmentation stand in for "
    "VGG16 on all of CIFAR-10, and a probe has 16 samples, not 64",
    ("optimizers", "cpu"): "as in `bert`",
    ("finetune", "cpu"): "the paper has no such task; its thresholds are those for BERT",
}


def methods(names: Iterable[str]) -> str:
    """Return a table of the methods that have some of these names."""
    known = {_general(name) for name in names}
    rows = [[f"`{name}`", text] for name, text in METHODS.items() if name in known]
    return markdown(["method", "what it is"], rows)


def stand_in(suite: str, scale: str) -> str:
    """Return in a sentence how a suite differs from the paper; "" where that is not noted."""
    text = STAND_INS.get((suite, scale), "")
    return f"Differs from the paper: {text}." if text else ""


def _general(name: str) -> str:
    """Return a method's name without its share and criterion.

    Example:
        >>> _general("top-coherence-loss-50%"), _general("top-weights-25%"), _general("mat")
        ('top-…-n%', 'top-weights-n%', 'mat')
    """
    general = re.sub(r"\d+%$", "n%", name)
    if general.startswith("top-") and general != "top-weights-n%":
        return "top-…-n%"
    return general
