"""Layers of an exported program, a file of ``torch.export.save``: its graph is JSON, its weights are plain bytes.

Torch's own ``torch.export.load`` falls back to an unpickler that runs what a file tells it to. This reader follows the
graph from its output back to its input, and reads nothing but JSON and numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convexbn.files.model_file import FormatError
from convexbn.files.torch.archive import Archive
from convexbn.files.torch.state_dict import assembled, of_bfloat16
from convexbn.program.layers import Layers

#: Number types by torch's codes.
_DTYPES = {5: "<i8", 6: "<f2", 7: "<f4", 8: "<f8", 13: "<u2"}
_BFLOAT16 = 13

#: Steps that are the identity in eval mode.
_NO_OPS = ("aten.flatten.using_ints", "aten.dropout.default", "aten.dropout_.default")

_ENDING = (
    "only Linear, BatchNorm1d, ReLU, Linear, exported without decompositions, can be read: certify other modules in "
    "Python by convexbn.nn.certify"
)
_MOST_NODES = 10_000


def read_exported(archive: Archive) -> Layers:
    """Read the layers of the program, and its ``eps``; refuse all but Linear, BatchNorm1d, ReLU, Linear."""
    names = [name for name in archive.names if name.startswith("models/") and name.endswith(".json")]
    if len(names) != 1:
        raise FormatError(f"it holds {len(names)} programs: export one")
    try:
        return _Program(archive, names[0].removeprefix("models/").removesuffix(".json")).layers()
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise FormatError(f"its program has another form than torch writes ({error!r}): export it again") from None


class _Program:
    """Graph and weights of an archive; accessing what torch would not write raises KeyError, TypeError and the like."""

    def __init__(self, archive: Archive, name: str) -> None:
        self.archive = archive
        self.graph = archive.read_json(f"models/{name}.json")["graph_module"]
        self.weights = archive.read_json(f"data/weights/{name}_weights_config.json")["config"]
        nodes = self.graph["graph"]["nodes"]
        if len(nodes) > _MOST_NODES:
            raise FormatError(f"its program has more than {_MOST_NODES} steps: {_ENDING}")
        self.made_by = {
            node["outputs"][0]["as_tensor"]["name"]: node
            for node in nodes
            if len(node["outputs"]) == 1 and "as_tensor" in node["outputs"][0]
        }
        specs = [{**spec}.popitem() for spec in self.graph["signature"]["input_specs"]]
        self.given = [spec["arg"]["as_tensor"]["name"] for kind, spec in specs if kind == "user_input"]
        weights = [(kind, spec) for kind, spec in specs if kind in ("parameter", "buffer")]
        self.stored = {spec["arg"]["name"]: spec[f"{kind}_name"] for kind, spec in weights}

    def layers(self) -> Layers:
        """Follow the graph from its output back to its input."""
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
        """Return the arguments of the step that makes a tensor: names of tensors, and numbers."""
        name = self._skip(name)
        node = self.made_by.get(name)
        target = "the input" if node is None else node["target"].removeprefix("torch.ops.")
        if node is None or target not in targets:
            raise FormatError(f"its program has {target[:80]} where {targets[0]} is expected: {_ENDING}")
        arguments = {item["name"]: {**item["arg"]}.popitem() for item in node["inputs"]}
        return {key: value["name"] if kind == "as_tensor" else value for key, (kind, value) in arguments.items()}

    def _skip(self, name: str) -> str:
        """Return the tensor that identity steps pass on."""
        for _ in self.made_by:
            node = self.made_by.get(name)
            if node is None or node["target"].removeprefix("torch.ops.") not in _NO_OPS:
                break
            name = node["inputs"][0]["arg"]["as_tensor"]["name"]
        return name

    def _tensors(self, arguments: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Read the weights among the arguments of a step."""
        return {k: self._tensor(v) for k, v in arguments.items() if isinstance(v, str) and v in self.stored}

    def _tensor(self, name: str) -> np.ndarray[Any, Any]:
        """Read a weight."""
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
        values = of_bfloat16(data) if meta["dtype"] == _BFLOAT16 else np.frombuffer(data, dtype)
        return values.reshape(shape)
