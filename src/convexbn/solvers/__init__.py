"""Solvers of the training programs; each is a frozen dataclass of settings with one method ``solve``."""
