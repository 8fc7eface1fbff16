"""``lightning-mat inspect MODULE:CALLABLE``: the units of a model, before any training."""

from __future__ import annotations

import argparse
import importlib
import json
import operator
import sys
from typing import Any

from torch import nn

from lightning_mat.units import partition


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "inspect",
        help="show the units of a model",
        description="Build a model and print the table of its units.",
        epilog="examples: lightning-mat inspect timm:create_model "
        '--arguments \'{"model_name": "vit_tiny_patch16_224"}\'; '
        "lightning-mat inspect transformers:AutoModel.from_pretrained "
        '--arguments \'{"pretrained_model_name_or_path": "FOLDER"}\'',
    )
    parser.add_argument("model", metavar="MODULE:CALLABLE", help="what returns the model")
    parser.add_argument("--arguments", default="{}", help="its keyword arguments, as JSON")
    parser.add_argument("--units", default="auto", help="as in lightning_mat.partition")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and return the exit code."""
    try:
        model = build(arguments.model, arguments.arguments)
        print(partition(model, arguments.units).describe())
    except (ValueError, TypeError, ImportError, AttributeError, RuntimeError, OSError) as error:
        print(f"lightning-mat inspect: {error}", file=sys.stderr)
        return 1
    return 0


def build(target: str, arguments: str) -> nn.Module:
    """Return what ``module:callable`` makes of JSON keyword arguments.

    Modules of the working folder are found, as by ``python -m``.

    Raises:
        ValueError: If the target is not of that form, the arguments are no JSON object, or the
            result is not a module.
    """
    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise ValueError(
            f"expected MODULE:CALLABLE such as torchvision.models:vgg16, got {target!r}"
        )
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ValueError(f"--arguments is not JSON ({error}): {arguments!r}") from None
    if not isinstance(keywords, dict):
        raise ValueError(
            f"--arguments must be a JSON object of keyword arguments, got {arguments!r}"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    found = operator.attrgetter(attribute)(importlib.import_module(name))
    made = found if isinstance(found, nn.Module) else found(**keywords)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{target} returned a {type(made).__name__}, not a torch.nn.Module")
    return made
