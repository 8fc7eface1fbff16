"""Many random orders of MAT's events; the short form is in tests/faults."""

from __future__ import annotations

import pytest

from tests.faults.test_machine import case

TestManyOrders = pytest.mark.soak(case(60, 15, derandomize=False))
