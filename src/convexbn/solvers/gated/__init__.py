"""Solvers of the gated program."""
