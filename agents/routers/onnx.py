"""A network as an ONNX graph, for whoever runs it elsewhere; here NumPy decides.

Inputs: ``features`` float32 (n, d); of a policy for a range of λ also ``lam`` float64 (n,). Outputs: ``action`` int64
(n,) and ``logits`` float64 (n, 2). Inside all is float64, as in `agents.routers.mlp`, so that both decide alike; only
the error function of GELU is float32, as onnxruntime has no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from agents.routers.mlp import MLP, ConditionedMLP, Weights
from rollouts.errors import ArtefactError, ConfigError
from trim_env.features import LAM_BOUND

OPSET, IR_VERSION = 17, 8  # read by onnxruntime since 1.12
_PROBES, _LAMS, _CLOSE = 512, 8, 1e-4  # GELU is float32
_SINGLE = {"tanh": "Tanh", "relu": "Relu", "sigmoid": "Sigmoid"}


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
        ArtefactError: As of `check_onnx`.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ConfigError(
            f"Writing policy.onnx needs the onnx package ({error}). Install it: pip install 'trim-routing[onnx]'."
        ) from error

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
            values = _activated(graph, values, router.activation)
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
    check_onnx(data, router)
    return data


def check_onnx(data: bytes, router: MLP | ConditionedMLP) -> None:
    """Check that a graph stands alone and, where onnxruntime is installed, that it decides as the router does.

    Decisions are compared on features that are drawn, for a range of λ also at λ that are.

    Raises:
        ArtefactError: It is no graph, keeps data outside, or decides otherwise.
    """
    import onnx

    try:
        graph = onnx.load_model_from_string(data).graph
    except Exception as error:  # protobuf's, which is not imported here
        raise ArtefactError(f"policy.onnx of {router.name} is no ONNX graph ({error}).") from error
    if any(each.data_location == onnx.TensorProto.EXTERNAL or each.external_data for each in _tensors(graph)):
        raise ArtefactError(f"policy.onnx of {router.name} keeps data in other files; it is to stand alone.")
    try:
        import onnxruntime
    except ImportError:
        return
    draw = np.random.default_rng(0)
    features = draw.uniform(-3, 3, (_PROBES, _inputs_of(router))).astype(np.float32)
    wanted = np.empty((_PROBES, 2))
    told: dict[str, Any] = {"features": features}
    if isinstance(router, ConditionedMLP):
        lams = np.geomspace(router.low, router.high, _LAMS)
        which = draw.integers(_LAMS, size=_PROBES)
        told["lam"] = lams[which]
        for number, lam in enumerate(lams):
            wanted[which == number] = router.at(float(lam)).logits(features[which == number])
    else:
        wanted = router.logits(features)
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        action, logits = session.run(["action", "logits"], told)
    except Exception as error:  # onnxruntime's, of which there are many
        raise ArtefactError(f"policy.onnx of {router.name} does not run ({error}).") from error
    size = 1 + np.abs(wanted).max(axis=1, keepdims=True)
    clear = np.abs(wanted[:, 1] - wanted[:, 0]) > _CLOSE * size[:, 0]
    odd = (action != (wanted[:, 1] > wanted[:, 0])) & clear
    if odd.any() or not (np.abs(logits - wanted) <= _CLOSE * size).all():
        raise ArtefactError(f"policy.onnx of {router.name} decides otherwise than the router; it was not written.")


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield all tensors of a graph, also of graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (each for node in graph.node for each in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner) if inner.node or inner.initializer else ()


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


def _activated(graph: _Graph, values: str, activation: str) -> str:
    """Add what `agents.routers.mlp.ACTIVATIONS` compute."""
    if activation in _SINGLE:
        return graph.add(_SINGLE[activation], values)
    if activation == "square":
        return graph.add("Mul", values, values)
    if activation == "silu":
        return graph.add("Mul", values, graph.add("Sigmoid", values))
    if activation == "leaky_relu":  # LeakyRelu's slope is float32
        return graph.add("Max", values, graph.add("Mul", values, graph.constant(0.01, np.float64)))
    zero, one = graph.constant(0, np.float64), graph.constant(1, np.float64)
    if activation == "elu":
        below = graph.add("Sub", graph.add("Exp", graph.add("Min", values, zero)), one)
        return graph.add("Add", graph.add("Max", values, zero), below)
    assert activation == "gelu"
    scaled = graph.add("Div", values, graph.constant(2**0.5, np.float64))
    error = graph.cast(graph.add("Erf", graph.cast(scaled, np.float32)), np.float64)
    return graph.add("Mul", graph.add("Div", values, graph.constant(2, np.float64)), graph.add("Add", one, error))
