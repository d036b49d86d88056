"""A network as an ONNX graph: written with the ``onnx`` package's helper, read back with onnxruntime.

Inputs: ``features`` float32 (n, d); of a policy for a range of λ also ``lam`` float64 (n,). Outputs: ``action`` int64
(n,) and ``logits`` float64 (n, 2). Inside all is float64, as in `agents.routers.mlp`, so that both decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.routers.base import Floats
from agents.routers.mlp import MLP, ConditionedMLP, Weights
from rollouts.errors import ArtefactError, ConfigError
from trim_env.features import LAM_BOUND

OPSET, IR_VERSION = 17, 8  # read by onnxruntime since 1.12
_REMEDY = "Install it: pip install 'trim-routing[onnx]'."


class _Graph:
    """Nodes and constants of a graph under construction."""

    def __init__(self, onnx: Any) -> None:
        self.onnx, self.nodes, self.constants = onnx, list[Any](), list[Any]()
        self._numbered = 0

    def constant(self, values: Any, dtype: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(values, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        self._numbered += 1
        name = name or f"value_{self._numbered}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def cast(self, value: str, dtype: Any, name: str = "") -> str:
        return self.add("Cast", value, name=name, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def to_onnx(router: MLP | ConditionedMLP) -> bytes:
    """Return a network as ONNX.

    Raises:
        ConfigError: The ``onnx`` package is not installed.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ConfigError(f"Writing policy.onnx needs the onnx package ({error}). {_REMEDY}") from error

    graph, helper, weights = _Graph(onnx), onnx.helper, router.weights
    inputs = [helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["n", _inputs_of(router)])]
    bias = graph.cast(graph.constant(weights["0.bias"], np.float32), np.float64)
    if isinstance(router, ConditionedMLP):
        inputs.append(helper.make_tensor_value_info("lam", onnx.TensorProto.DOUBLE, ["n"]))
        bias = _conditioned_bias(graph, weights)
    values = graph.cast("features", np.float64)
    last = len(weights) // 2 - 1
    for layer in range(last + 1):
        weight = weights[f"{layer}.weight"][:, : _inputs_of(router)] if layer == 0 else weights[f"{layer}.weight"]
        if layer:
            bias = graph.constant(weights[f"{layer}.bias"], np.float64)
        values = graph.add("MatMul", values, graph.constant(weight.T, np.float64))
        values = graph.add("Add", values, bias, name="logits" if layer == last else "")
        if layer < last:
            values = graph.add("Tanh", values)
    graph.add("ArgMax", "logits", name="action", axis=1, keepdims=0)
    outputs = [
        helper.make_tensor_value_info("action", onnx.TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("logits", onnx.TensorProto.DOUBLE, ["n", 2]),
    ]
    made = helper.make_model(
        helper.make_graph(graph.nodes, "policy", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="trim-routing",
    )
    onnx.checker.check_model(made, full_check=True)
    data: bytes = made.SerializeToString(deterministic=True)
    return data


def _inputs_of(router: MLP | ConditionedMLP) -> int:
    """Return the number of features, λ not among them."""
    return int(router.weights["0.weight"].shape[1]) - isinstance(router, ConditionedMLP)


def _conditioned_bias(graph: _Graph, weights: Weights) -> str:
    """Add what `ConditionedMLP.at` does: λ's column times its feature goes into the first bias, in float32."""
    scaled = graph.add("Div", graph.add("Log", "lam"), graph.constant(math.log(10), np.float64))
    scaled = graph.add("Add", scaled, graph.constant(3.0, np.float64))
    low, high = graph.constant(-LAM_BOUND, np.float64), graph.constant(LAM_BOUND, np.float64)
    feature = graph.cast(graph.add("Clip", scaled, low, high), np.float32)
    column = graph.add("Unsqueeze", feature, graph.constant([1], np.int64))
    share = graph.add("Mul", column, graph.constant(weights["0.weight"][None, :, -1], np.float32))
    return graph.cast(graph.add("Add", share, graph.constant(weights["0.bias"], np.float32)), np.float64)


@dataclass(frozen=True, eq=False)
class OnnxMLP(MLP):
    """The same network run by onnxruntime.

    Attributes:
        runtime: The session of onnxruntime.
        told: What it takes besides the features: λ, if the graph is for a range.
    """

    runtime: Any = None
    told: dict[str, float] = field(default_factory=dict)

    def _run(self, output: str, features: NDArray[np.float32]) -> NDArray[Any]:
        inputs: dict[str, Any] = {"features": np.ascontiguousarray(features, np.float32)}
        for name, value in self.told.items():
            inputs[name] = np.full(len(features), value, np.float64)
        found: NDArray[Any] = self.runtime.run([output], inputs)[0]
        return found

    def logits(self, features: NDArray[np.float32]) -> Floats:
        """Return (n, 2) logits of the actions for (n, d) features."""
        return self._run("logits", features)

    def probability(self, features: NDArray[np.float32]) -> Floats:
        """Return (n,) of 0 and 1: the argmax action."""
        return self._run("action", features).astype(np.float64)


@dataclass(frozen=True, eq=False)
class OnnxConditionedMLP(ConditionedMLP):
    """The same network for a range of λ run by onnxruntime.

    Attributes:
        runtime: The session of onnxruntime.
    """

    runtime: Any = None

    def at(self, lam: float) -> MLP:
        """Return the router for one λ; raises `ConfigError` as `ConditionedMLP.at`."""
        plain = super().at(lam)
        return OnnxMLP(
            plain.name, plain.schema, plain.knob, plain.weights, plain.max_large_tokens, self.runtime, {"lam": lam}
        )


def on_onnxruntime(router: MLP | ConditionedMLP, data: bytes, file: Path) -> OnnxMLP | OnnxConditionedMLP:
    """Return a network run by onnxruntime on one thread.

    Args:
        router: The network.
        data: Its ONNX form.
        file: Where that comes from, for messages.

    Raises:
        ConfigError: onnxruntime is not installed.
        ArtefactError: It does not take the file, or the file is that of another network.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"Runtime 'onnx' needs onnxruntime ({error}). {_REMEDY}") from error

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        runtime = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common root
        raise ArtefactError(f"{file}: onnxruntime does not take it ({error}).") from error
    found = {each.name: list(each.shape[1:]) for each in runtime.get_inputs()}
    wanted: dict[str, list[int]] = {"features": [_inputs_of(router)]}
    if isinstance(router, ConditionedMLP):
        wanted["lam"] = []
    if found != wanted or [each.name for each in runtime.get_outputs()] != ["action", "logits"]:
        raise ArtefactError(f"{file}: takes {found}, expected {wanted}, with outputs action and logits.")
    if isinstance(router, ConditionedMLP):
        own = router.name, router.schema, router.low, router.high, router.weights, router.max_large_tokens
        return OnnxConditionedMLP(*own, runtime)
    return OnnxMLP(router.name, router.schema, router.knob, router.weights, router.max_large_tokens, runtime)


__all__ = ["OnnxConditionedMLP", "OnnxMLP", "on_onnxruntime", "to_onnx"]
