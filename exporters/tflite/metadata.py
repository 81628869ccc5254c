"""TensorFlow Lite Metadata: what an app reads from a file about its images and classes.

A flatbuffer by itself (``TFLITE_METADATA``, file identifier ``M001``) beside the graph's, and the file with the labels
in a zip behind it, as https://ai.google.dev/edge/litert/conversion/tensorflow/metadata says. Its tables are those of
``metadata_schema.fbs`` of TensorFlow Lite Support, version 1.1.0; the slots below are the places of their fields.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_edge.errors import require
from lightning_edge.exporters.input_adapter import place_of_scores
from lightning_edge.exporters.tflite import graph as tflite_graph
from lightning_edge.interface import Interface

NAME = "TFLITE_METADATA"
LABELS = "labels.txt"
_IDENTIFIER = b"M001"
_VERSION = "1.0.0"
# ModelMetadata, SubGraphMetadata
_SUBGRAPHS, _PARSER_VERSION = 3, 7
_INPUTS, _OUTPUTS = 2, 3
# TensorMetadata
_TENSOR_FIELDS = 7
_TENSOR_NAME, _CONTENT, _PROCESS_UNITS, _FILES = 0, 3, 4, 6
# Kinds of content, of process units, of files, and colors.
_FEATURES, _IMAGE = 1, 2
_NORMALIZATION = 1
_AXIS_LABELS = 2
_COLORS = {1: 2, 3: 1}


def add_metadata(model: Any, interface: Interface) -> None:
    """Write how a file is called into its object tree: our notes, and where it takes pixels or has labels, metadata.

    The normalization that the metadata states is none: the graph does it, and an app hands over pixels as they are.
    """
    for name, text in replace(interface, labels=()).notes().items():  # those have a place of their own
        tflite_graph.set_note(model, name, text.encode())
    if interface.pixels is None and not interface.labels:
        return
    graph = model.subgraphs[0]
    builder = require("flatbuffers", "tflite").Builder(1024)
    ends = {side: [graph.tensors[int(index)] for index in getattr(graph, side)] for side in ("inputs", "outputs")}
    scores = place_of_scores([len(end.shape) for end in ends["outputs"]])
    inputs = [_tensor(builder, end, interface, labelled=False) for end in ends["inputs"]]
    outputs = [_tensor(builder, end, interface, labelled=at == scores) for at, end in enumerate(ends["outputs"])]
    sides = {_INPUTS: _offsets(builder, inputs), _OUTPUTS: _offsets(builder, outputs)}
    subgraph = _table(builder, 7, sides)
    fields = {_SUBGRAPHS: _offsets(builder, [subgraph]), _PARSER_VERSION: builder.CreateString(_VERSION)}
    builder.Finish(_table(builder, 8, fields), file_identifier=_IDENTIFIER)
    tflite_graph.set_note(model, NAME, bytes(builder.Output()))


def with_labels(data: bytes, labels: Sequence[str]) -> bytes:
    """Put the file with the labels, one a line, into a zip behind a packed file, which readers of the graph skip."""
    if not labels:
        return data
    buffer = io.BytesIO(data)
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(LABELS), "\n".join(labels) + "\n")
    return buffer.getvalue()


def labels_of(data: bytes) -> tuple[str, ...]:
    """Read the labels behind a file back; none where there are none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return tuple(archive.read(LABELS).decode().split("\n")[:-1])
    except (zipfile.BadZipFile, KeyError):
        return ()


def _tensor(builder: Any, tensor: Any, interface: Interface, *, labelled: bool) -> int:
    image = interface.pixels is not None and tensor.type == tflite_graph.schema_module().TensorType.UINT8
    fields = {_TENSOR_NAME: builder.CreateString(tensor.name)}
    if image:
        channels = int(tensor.shape[3 if interface.layout == "nhwc" else 1])
        properties = _table(builder, 2, {}, {0: _COLORS.get(channels, 0)})
        fields[_CONTENT] = _table(builder, 3, {1: properties}, {0: _IMAGE})
        options = _table(builder, 2, {0: _floats(builder, [0.0]), 1: _floats(builder, [1.0])})
        fields[_PROCESS_UNITS] = _offsets(builder, [_table(builder, 2, {1: options}, {0: _NORMALIZATION})])
    else:
        fields[_CONTENT] = _table(builder, 3, {1: _table(builder, 0, {})}, {0: _FEATURES})
    if labelled and interface.labels:
        file = _table(builder, 4, {0: builder.CreateString(LABELS)}, {2: _AXIS_LABELS})
        fields[_FILES] = _offsets(builder, [file])
    return _table(builder, _TENSOR_FIELDS, fields)


def _table(builder: Any, size: int, offsets: dict[int, int], numbers: dict[int, int] | None = None) -> int:
    """Write a table of ``size`` fields: those that point elsewhere, and those that are small numbers."""
    builder.StartObject(size)
    for slot, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    for slot, number in (numbers or {}).items():
        builder.PrependUint8Slot(slot, number, 0)
    return int(builder.EndObject())


def _offsets(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _floats(builder: Any, values: Sequence[float]) -> int:
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependFloat32(value)
    return int(builder.EndVector())
