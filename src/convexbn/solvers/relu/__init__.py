"""Solvers of the ReLU program."""
