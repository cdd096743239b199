"""Recipes: rows, program, solver and judge put together."""
