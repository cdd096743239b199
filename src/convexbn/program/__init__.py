"""The question and the answer: losses, gates and programs; neurons, networks and layers."""
