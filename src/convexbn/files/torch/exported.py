"""Layers of an exported program, a file of ``torch.export.save``: the graph is JSON, and the weights are plain bytes.

Torch's own ``torch.export.load`` falls back to an unpickler that runs what a file tells it to. Here the graph is
followed from its output back to its input, and nothing but JSON and numbers is read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convexbn.files.model_file import FormatError
from convexbn.files.torch.archive import Archive
from convexbn.files.torch.state_dict import assembled
from convexbn.program.layers import Layers

#: Torch's numbers for types of numbers.
_DTYPES = {5: "<i8", 6: "<f2", 7: "<f4", 8: "<f8"}

#: Steps that change nothing in eval mode.
_NO_OPS = ("aten.flatten.using_ints", "aten.dropout.default", "aten.dropout_.default")

_ENDING = (
    "only Linear, BatchNorm1d, ReLU, Linear, exported without decompositions, can be read: certify other modules in "
    "Python by convexbn.nn.certify"
)

_MOST_NODES = 10_000


def is_exported(archive: Archive) -> bool:
    """Whether an archive is one of ``torch.export.save`` (torch 2.8 or later)."""
    return "archive_format" in archive.names and archive.read("archive_format") == b"pt2"


def read_exported(archive: Archive) -> Layers:
    """Layers of the program, with its own ``eps``.

    Raises
    ------
    FormatError
        When the program is another than Linear, BatchNorm1d, ReLU, Linear, or the file is damaged.
    """
    names = [name for name in archive.names if name.startswith("models/") and name.endswith(".json")]
    if len(names) != 1:
        raise FormatError(f"it holds {len(names)} programs: export one")
    try:
        program = _Program(archive, names[0].removeprefix("models/").removesuffix(".json"))
        return program.layers()
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"its program has another form than torch writes ({error!r}): export it again") from None


class _Program:
    """Graph and weights of an archive; a value that is not as torch writes it raises the errors of its access."""

    def __init__(self, archive: Archive, name: str) -> None:
        self.archive = archive
        self.graph = archive.read_json(f"models/{name}.json")["graph_module"]
        self.weights = archive.read_json(f"data/weights/{name}_weights_config.json")["config"]
        nodes = self.graph["graph"]["nodes"]
        if len(nodes) > _MOST_NODES:
            raise FormatError(f"its program has more than {_MOST_NODES} steps: {_ENDING}")
        self.made_by = {node["outputs"][0]["as_tensor"]["name"]: node for node in nodes if _makes_one_tensor(node)}
        self.stored: dict[str, str] = {}
        self.given: list[str] = []
        for spec in self.graph["signature"]["input_specs"]:
            (kind, value), *_ = spec.items()
            if kind == "user_input":
                self.given.append(value["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer"):
                self.stored[value["arg"]["name"]] = value[f"{kind}_name"]

    def layers(self) -> Layers:
        """Follow the output back to the input."""
        specs = self.graph["signature"]["output_specs"]
        outputs = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in specs if "user_output" in spec]
        if len(outputs) != 1 or len(self.given) != 1:
            raise FormatError(f"its program has {len(self.given)} inputs and {len(outputs)} outputs: {_ENDING}")
        last = self._step(outputs[0], "aten.linear.default")
        relu = self._step(last["input"], "aten.relu.default", "aten.relu_.default")
        norm = self._step(relu["self"], "aten.batch_norm.default")
        first = self._step(norm["input"], "aten.linear.default")
        if self._skip(first["input"]) != self.given[0]:
            raise FormatError(f"its program changes the input before the first Linear: {_ENDING}")
        return assembled(self._tensors(norm), self._tensors(first), self._tensors(last), norm["eps"])

    def _step(self, name: str, *targets: str) -> dict[str, Any]:
        """Arguments of the step that makes a tensor: names of tensors, and numbers."""
        name = self._skip(name)
        node = self.made_by.get(name)
        target = "the input" if node is None else node["target"].removeprefix("torch.ops.")
        if node is None or target not in targets:
            raise FormatError(f"its program has {target[:80]} where {targets[0]} is expected: {_ENDING}")
        return _arguments(node)

    def _skip(self, name: str) -> str:
        """The tensor behind steps that change nothing."""
        for _ in range(len(self.made_by)):
            node = self.made_by.get(name)
            if node is None or node["target"].removeprefix("torch.ops.") not in _NO_OPS:
                break
            name = next(iter(_arguments(node).values()))
        return name

    def _tensors(self, arguments: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The weights among the arguments of a step."""
        stored = {key: name for key, name in arguments.items() if isinstance(name, str) and name in self.stored}
        return {key: self._tensor(name) for key, name in stored.items()}

    def _tensor(self, name: str) -> np.ndarray[Any, Any]:
        """A weight, from its bytes."""
        weight = self.weights[self.stored[name]]
        meta = weight["tensor_meta"]
        shape = [size["as_int"] for size in meta["sizes"]]
        strides = [stride["as_int"] for stride in meta["strides"]]
        plain = not weight["use_pickle"] and meta["dtype"] in _DTYPES and meta["storage_offset"]["as_int"] == 0
        if not plain or any(type(size) is not int or size < 1 for size in shape):
            raise FormatError(f"{self.stored[name]} is no plain tensor: export float32 or float64 numbers")
        steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if any(size > 1 and stride != step for size, stride, step in zip(shape, strides, steps, strict=True)):
            raise FormatError(f"{self.stored[name]} is not contiguous: export a contiguous tensor")
        data, dtype = self.archive.read(f"data/weights/{weight['path_name']}"), np.dtype(_DTYPES[meta["dtype"]])
        if len(data) != math.prod(shape) * dtype.itemsize or self.archive.read("byteorder") != b"little":
            raise FormatError(f"{self.stored[name]} has other bytes than its shape {shape} needs: export it again")
        return np.frombuffer(data, dtype).reshape(shape)


def _makes_one_tensor(node: dict[str, Any]) -> bool:
    return len(node["outputs"]) == 1 and "as_tensor" in node["outputs"][0]


def _arguments(node: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name: of tensors their names, else the value."""
    found = {}
    for item in node["inputs"]:
        (kind, value), *_ = item["arg"].items()
        found[item["name"]] = value["name"] if kind == "as_tensor" else value
    return found
