"""What each suite trains at each scale: one table of sizes.

``cpu`` is sized for two cores and one to two minutes per run, ``gpu`` for one modern GPU and
minutes per run; ``paper`` has the settings of the MAT paper (appendix B.1); ``test`` takes seconds
and is what the project's tests run. ``python -m benchmarks calibrate`` measures what a step costs,
``python -m benchmarks list`` multiplies it out.
"""

from __future__ import annotations

from benchmarks.suites.spec import Task, with_name

SCALES = ("cpu", "gpu", "paper", "test")
