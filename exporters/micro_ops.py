"""The files that run on TensorFlow Lite Micro: int8, and every operation with a kernel; what registers those."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_edge.errors import EdgeError, ExportError, RunnerError
from lightning_edge.exporters import tflite_contents, tflite_graph

# Method of MicroMutableOpResolver by the schema's name of the operation, from
# tensorflow/lite/micro/micro_mutable_op_resolver.h as of 2025.
_METHODS = {
    "ABS": "AddAbs",
    "ADD": "AddAdd",
    "ADD_N": "AddAddN",
    "ARG_MAX": "AddArgMax",
    "ARG_MIN": "AddArgMin",
    "ASSIGN_VARIABLE": "AddAssignVariable",
    "AVERAGE_POOL_2D": "AddAveragePool2D",
    "BATCH_MATMUL": "AddBatchMatMul",
    "BATCH_TO_SPACE_ND": "AddBatchToSpaceNd",
    "BROADCAST_ARGS": "AddBroadcastArgs",
    "BROADCAST_TO": "AddBroadcastTo",
    "CALL_ONCE": "AddCallOnce",
    "CAST": "AddCast",
    "CEIL": "AddCeil",
    "CONCATENATION": "AddConcatenation",
    "CONV_2D": "AddConv2D",
    "COS": "AddCos",
    "CUMSUM": "AddCumSum",
    "DEPTHWISE_CONV_2D": "AddDepthwiseConv2D",
    "DEPTH_TO_SPACE": "AddDepthToSpace",
    "DEQUANTIZE": "AddDequantize",
    "DIV": "AddDiv",
    "DYNAMIC_UPDATE_SLICE": "AddDynamicUpdateSlice",
    "ELU": "AddElu",
    "EMBEDDING_LOOKUP": "AddEmbeddingLookup",
    "EQUAL": "AddEqual",
    "EXP": "AddExp",
    "EXPAND_DIMS": "AddExpandDims",
    "FILL": "AddFill",
    "FLOOR": "AddFloor",
    "FLOOR_DIV": "AddFloorDiv",
    "FLOOR_MOD": "AddFloorMod",
    "FULLY_CONNECTED": "AddFullyConnected",
    "GATHER": "AddGather",
    "GATHER_ND": "AddGatherNd",
    "GREATER": "AddGreater",
    "GREATER_EQUAL": "AddGreaterEqual",
    "HARD_SWISH": "AddHardSwish",
    "IF": "AddIf",
    "L2_NORMALIZATION": "AddL2Normalization",
    "L2_POOL_2D": "AddL2Pool2D",
    "LEAKY_RELU": "AddLeakyRelu",
    "LESS": "AddLess",
    "LESS_EQUAL": "AddLessEqual",
    "LOG": "AddLog",
    "LOGICAL_AND": "AddLogicalAnd",
    "LOGICAL_NOT": "AddLogicalNot",
    "LOGICAL_OR": "AddLogicalOr",
    "LOGISTIC": "AddLogistic",
    "LOG_SOFTMAX": "AddLogSoftmax",
    "MAXIMUM": "AddMaximum",
    "MAX_POOL_2D": "AddMaxPool2D",
    "MEAN": "AddMean",
    "MINIMUM": "AddMinimum",
    "MIRROR_PAD": "AddMirrorPad",
    "MUL": "AddMul",
    "NEG": "AddNeg",
    "NOT_EQUAL": "AddNotEqual",
    "PACK": "AddPack",
    "PAD": "AddPad",
    "PADV2": "AddPadV2",
    "PRELU": "AddPrelu",
    "QUANTIZE": "AddQuantize",
    "READ_VARIABLE": "AddReadVariable",
    "REDUCE_ALL": "AddReduceAll",
    "REDUCE_MAX": "AddReduceMax",
    "REDUCE_MIN": "AddReduceMin",
    "RELU": "AddRelu",
    "RELU6": "AddRelu6",
    "RESHAPE": "AddReshape",
    "RESIZE_BILINEAR": "AddResizeBilinear",
    "RESIZE_NEAREST_NEIGHBOR": "AddResizeNearestNeighbor",
    "REVERSE_V2": "AddReverseV2",
    "ROUND": "AddRound",
    "RSQRT": "AddRsqrt",
    "SELECT_V2": "AddSelectV2",
    "SHAPE": "AddShape",
    "SIN": "AddSin",
    "SLICE": "AddSlice",
    "SOFTMAX": "AddSoftmax",
    "SPACE_TO_BATCH_ND": "AddSpaceToBatchNd",
    "SPACE_TO_DEPTH": "AddSpaceToDepth",
    "SPLIT": "AddSplit",
    "SPLIT_V": "AddSplitV",
    "SQRT": "AddSqrt",
    "SQUARE": "AddSquare",
    "SQUARED_DIFFERENCE": "AddSquaredDifference",
    "SQUEEZE": "AddSqueeze",
    "STRIDED_SLICE": "AddStridedSlice",
    "SUB": "AddSub",
    "SUM": "AddSum",
    "SVDF": "AddSvdf",
    "TANH": "AddTanh",
    "TRANSPOSE": "AddTranspose",
    "TRANSPOSE_CONV": "AddTransposeConv",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "AddUnidirectionalSequenceLSTM",
    "UNPACK": "AddUnpack",
    "VAR_HANDLE": "AddVarHandle",
    "WHILE": "AddWhile",
    "ZEROS_LIKE": "AddZerosLike",
}
# What Vela writes in the place of what the NPU runs.
ETHOS_U = "ethos-u"
_CUSTOM_METHODS = {ETHOS_U: "AddEthosU"}


def read(path: Path) -> Any:
    """Read a file that computes in integers.

    Returns:
        What `tflite_graph.parse` gives.

    Raises:
        ExportError: If it computes in float, naming the operations.
        RunnerError: If it is missing, cut short or no TensorFlow Lite file.
        ValueError: If its name does not end in ``.tflite``.
    """
    if path.suffix != ".tflite":
        raise ValueError(f"path={str(path)!r} has the suffix {path.suffix!r}; microcontrollers are given .tflite files")
    try:
        model, contents = tflite_graph.parse(path.read_bytes()), tflite_contents.contents(path)
    except EdgeError:
        raise
    except OSError as error:
        raise RunnerError(
            f"{path} cannot be read: {error.strerror}. export() with the target 'tflite' writes it"
        ) from error
    except Exception as error:
        raise RunnerError(f"{path.name} is no .tflite file: {error}. Export it again") from error
    if floats := sorted({*contents.float_compute_ops, *contents.float_ops}):
        raise ExportError(
            f"{path.name} computes in float: {', '.join(floats)}. Microcontrollers are given int8 files: quantize the "
            "network (Quantize in the fit, or quantize()) and export it again"
        )
    return model


def methods(model: Any, name: str) -> tuple[str, ...]:
    """Name the methods of MicroMutableOpResolver that a file needs, each once, in order of the alphabet.

    Args:
        model: What `tflite_graph.parse` gives.
        name: The file's name, for the message.

    Raises:
        ExportError: Naming every operation that has no kernel.
    """
    found, missing = set(), set()
    for kind, custom in _kinds(model):
        method = (_CUSTOM_METHODS if custom else _METHODS).get(kind)
        if method is None:
            missing.add(f"{kind} (custom)" if custom else kind)
        else:
            found.add(method)
    if missing:
        raise ExportError(
            f"{name} has operations without a kernel in TensorFlow Lite Micro: {', '.join(sorted(missing))}. "
            "Replace the layers they come from; docs/microcontrollers.md says where to look up what there is"
        )
    return tuple(sorted(found))


def _kinds(model: Any) -> Iterable[tuple[str, bool]]:
    for graph in model.subgraphs:
        for op in graph.operators:
            yield tflite_graph.op_name(model, op), bool(model.operatorCodes[op.opcodeIndex].customCode)
