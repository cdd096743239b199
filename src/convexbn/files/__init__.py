"""Formats on disk: saved models, files of torch, ONNX, HTML, tables and data sets."""
