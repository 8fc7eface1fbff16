"""What a rule is, and the registry of words that ask for one.

A rule looks at a model and returns units of one kind. It is a small object with options::

    class Embeddings:
        word = "embeddings"

        def find(self, model, taken):
            for path, module in model.named_modules():
                if isinstance(module, nn.Embedding) and f"{path}.weight" not in taken:
                    yield Unit(path, "embedding", path, (Slice(f"{path}.weight"),))

    partition(model, [Embeddings(), "heads"])        # as an object
    register_rule("embeddings", Embeddings)          # or by its word, from then on
    partition(model, "embeddings+heads")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Protocol, runtime_checkable

from torch import nn

from lightning_mat.units.unit import Unit


@runtime_checkable
class Rule(Protocol):
    """Finds units of one kind in a model.

    A rule may also have ``hint(model) -> str``, which says why it may have found nothing.
    """

    word: str
    """What the rule finds, in the plural, as in ``partition(model, "heads")``."""

    def find(self, model: nn.Module, taken: AbstractSet[str]) -> Iterable[Unit]:
        """Return the units of a model; none if the rule does not apply.

        Args:
            model: Any module whose parameters all have shapes.
            taken: Names of parameters (all names of tied ones) of which an earlier rule already
                owns a part. A rule passes over them; an overlap is an error.
        """
        ...


_RULES: dict[str, Callable[[], Rule]] = {}


def register_rule(word: str, rule: Callable[[], Rule]) -> None:
    """Let ``partition(model, word)`` use a rule, made with its default options.

    Among the words of one call, the one registered last goes first and has first choice.

    Args:
        word: A single word, e.g. ``"heads"``. Registering a word again replaces its rule.
        rule: The rule's class, or any callable that makes one.

    Raises:
        ValueError: If the word could not be told from the others.
    """
    if not word.isidentifier() or word == "auto":
        raise ValueError(
            f"a rule's word must be an identifier other than 'auto', got {word!r}: "
            "'+' combines words, and 'auto' chooses among them"
        )
    _RULES.pop(word, None)
    _RULES[word] = rule


def rule_words() -> tuple[str, ...]:
    """Return the registered words, in the order in which their rules are applied."""
    return tuple(reversed(_RULES))


def make_rule(word: str) -> Rule:
    """Return the rule of a word, with its default options.

    Raises:
        ValueError: If the word is not registered; the message lists those that are.
    """
    if word not in _RULES:
        raise ValueError(
            f"unknown units {word!r}: choose 'auto', one of {', '.join(rule_words())}, several "
            "joined by '+', or pass a rule or a callable"
        )
    return _RULES[word]()
