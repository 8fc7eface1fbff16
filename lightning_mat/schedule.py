"""Schedule: at which batches an episode begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mat.checks import check_whole


def steps_per_episode(
    policy: object, every_n_epochs: int = 1, every_n_steps: int | None = None
) -> int | None:
    """Return ``every_n_steps``: the policy's own if it has one, else what was given.

    Args:
        policy: A policy that means something on one calendar alone says so in ``every_n_steps``.
        every_n_epochs: As given by the user.
        every_n_steps: As given by the user.

    Raises:
        ValueError: If the user gave another calendar than the policy's.
    """
    own: int | None = getattr(policy, "every_n_steps", None)
    if own is None:
        return every_n_steps
    if every_n_epochs != 1 or every_n_steps not in (None, own):
        given = (
            f"every_n_epochs={every_n_epochs}"
            if every_n_steps is None
            else f"every_n_steps={every_n_steps}"
        )
        raise ValueError(
            f"{type(policy).__name__} decides every {own} optimizer steps, which is part of the "
            f"method, but {given} is given: leave it out"
        )
    return own


class Schedule:
    """Counts epochs or optimizer steps, and lets decisions change between optimizer steps only.

    An episode that is due while gradients are being accumulated waits for the step: its units
    would otherwise be stepped with the gradients of a part of their batches. With several
    optimizers that step in different batches it waits for a step of any.

    Args:
        every_n_epochs: Epochs per episode.
        every_n_steps: Optimizer steps per episode, in the place of ``every_n_epochs``.
        warmup_epochs: Epochs before the first episode.

    Attributes:
        decided_at: Step of the newest decision, -1 before the first.

    Raises:
        ValueError: If a number is out of range, or both calendars are given.

    Example:
        >>> schedule = Schedule(every_n_steps=2, warmup_epochs=0)
        >>> begun = []
        >>> for batch, step in enumerate([0, 0, 1, 1, 2, 2]):  # a step every second batch
        ...     if schedule.ready(schedule.is_due(0, step, batch)):
        ...         schedule.decided(step)
        ...         begun.append(batch)
        ...     schedule.end_batch(stepped=batch % 2 == 1)
        >>> begun
        [0, 4]
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        warmup_epochs: int = 1,
    ) -> None:
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("every_n_steps", 1 if every_n_steps is None else every_n_steps, 1),
            ("warmup_epochs", warmup_epochs, 0),
        ):
            check_whole(name, value, least)
        if every_n_steps is not None and every_n_epochs != 1:
            raise ValueError(
                f"every_n_epochs={every_n_epochs} and every_n_steps={every_n_steps} are two "
                "calendars: give one"
            )
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.warmup_epochs = warmup_epochs
        self.begin()

    def begin(self) -> None:
        """Begin a run."""
        self.decided_at = -1
        self._waiting = False
        self._stepped = True

    def is_due(self, epoch: int, step: int, batch_idx: int) -> bool:
        """Return whether an episode should begin before this batch."""
        if epoch < self.warmup_epochs or self.decided_at == step:
            return False
        if self.every_n_steps is not None:
            first = self.decided_at < 0
            return first or step - self.decided_at >= self.every_n_steps
        return batch_idx == 0 and (epoch - self.warmup_epochs) % self.every_n_epochs == 0

    def ready(self, due: bool) -> bool:
        """Return whether an episode begins now: one is due, or waits, and no gradients do."""
        self._waiting = self._waiting or due
        return self._waiting and self._stepped

    def decided(self, step: int) -> None:
        """Note that an episode began after so many steps."""
        self.decided_at, self._waiting = step, False

    def end_batch(self, *, stepped: bool) -> None:
        """Note whether an optimizer stepped in the batch that ends."""
        self._stepped = stepped

    def check_warmup(self, policy: object) -> None:
        """Raise a ValueError if a policy needs a warm-up, and there is none."""
        if getattr(policy, "budget", None) is not None and not self.warmup_epochs:
            raise ValueError(
                "a policy with a budget needs the cost of a full step, which is counted in the "
                "warm-up: set warmup_epochs to at least 1"
            )

    def never(self, epochs: int, steps: int) -> str:
        """Return what to say of a run that ended before its first episode."""
        return (
            f"MAT never measured: training ended after {epochs} epochs and {steps} steps, before "
            f"its first episode (warmup_epochs={self.warmup_epochs}). Lower warmup_epochs, and set "
            "every_n_steps if an epoch is long"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {"decided_at": self.decided_at, "waiting": self._waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; gradients are not part of a checkpoint."""
        self.decided_at = int(state["decided_at"])
        self._waiting, self._stepped = bool(state.get("waiting", False)), True
