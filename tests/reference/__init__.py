"""Slow, plain float64 references that the fast code is compared with."""
