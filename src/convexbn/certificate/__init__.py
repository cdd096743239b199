"""The judge: objective, valid bound, gap and status of a network, whoever trained it."""
