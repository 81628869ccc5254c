"""Reports of every kind that a page has to show, and a reader that holds a page to being one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from lightning_edge.contents import Placement, Placements
from lightning_edge.interface import Interface
from lightning_edge.reporting.budget import Excess, Verdict
from lightning_edge.reporting.classes import ClassChanges
from lightning_edge.reporting.devices import About, DeviceRow, Endurance, Point, State
from lightning_edge.reporting.layers import LayerRow
from lightning_edge.reporting.report import Report, Row

LARGEST_BYTES = 300_000
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x00\u202e\ud800"

FLOAT = Row(
    "tflite",
    "fp32",
    "float",
    path="model-fp32.tflite",
    metrics={"val_acc": 0.96, "val_loss": 0.12},
    size_bytes=50_000,
    compressed_bytes=46_000,
    load_ms=2.5,
    p50_ms=0.5,
    p95_ms=0.75,
    p99_ms=1.5,
    throughput=1900.0,
    peak_memory_bytes=270_000,
    samples=360,
    top1=1.0,
    max_relative=3e-7,
    int8_weight_share=0.0,
    runtime="LiteRT",
    placements=Placements("the runtime", (Placement("CONV_2D", "delegate", 3, 380_000),)),
)
INT8 = replace(
    FLOAT,
    precision="int8",
    source="trained",
    path="model-int8.tflite",
    metrics={"val_acc": 0.98, "val_loss": 0.06},
    size_bytes=16_000,
    compressed_bytes=13_000,
    p50_ms=0.2,
    p95_ms=0.4,
    p99_ms=0.9,
    mean_steps=0.1,
    most_steps=1.0,
    max_steps=2.0,
    int8_weight_share=1.0,
    float_ops=("softmax",),
    placements=Placements(
        "the runtime", (Placement("CONV_2D", "delegate", 3, 300_000), Placement("TANH", "cpu", 1, 80_000))
    ),
)
TORCH = Row("torch", "fp32", "float", metrics={"val_acc": 0.96, "val_loss": 0.12}, size_bytes=48_000, p50_ms=1.0)
REPORT = Report(
    model="Digits",
    split="validate",
    rows=(TORCH, FLOAT, INT8),
    parameters=12_058,
    monitor="val_acc",
    warmup=10,
    repeats=100,
    calibration_batches=32,
    seed=0,
    notes=("done so",),
    versions={"torch": "2.13.0", "platform": "Linux", "cpus": "2"},
)
FAILED = Row("coreml", "int8", "trained", error="no such operation: roll")
NOT_RUN = replace(INT8, target="executorch", path="model-int8.pte", metrics={}, p50_ms=None, not_run="needs an NPU")
OVER = replace(INT8, target="onnx", budget=Verdict("exceeded", (Excess("size_bytes", 10_000, 16_000),)))
LONG = "a_name_" * 60
CLASSES = ClassChanges(
    samples=360,
    changed=9,
    pairs=((3, 5, 6), (0, 1, 2), (9, 4, 1)),
    first=((12, 3, 5), (40, 0, 1)),
    became_right=5,
    became_wrong=3,
    by_class=tuple((36, 30, 30 + label % 3) for label in range(10)),
    before=[[30 if label == found else int(found == 0) for found in range(10)] for label in range(10)],
    now=[[12_345 if label == found else 1_234 * int(found == 9) for found in range(10)] for label in range(10)],
)
LAYERS = (
    LayerRow("stem.0", "float", 640, 640, 0.5),
    LayerRow("blocks.0", "int8", 4_700, 18_496, 0.002),
    LayerRow("head", "int8", 1_320, 5_160, -1e-6),
)
QUANTILES = tuple(0.15 + 0.005 * step for step in range(21))
ON_DEVICE = DeviceRow(
    "pi4",
    "tflite",
    "int8",
    "trained",
    about=About("aarch64", model="Some Board"),
    runtime="LiteRT 9, 1 thread",
    metrics={"val_acc": 0.97},
    change_to_host={"val_acc": 0.0},
    change_to_float={"val_acc": -0.01},
    samples=64,
    max_steps=1.0,
    p50_ms=0.75,
    jitter_ms=0.0625,
    preprocess_ms=0.125,
    transfer_ms=2.5,
    postprocess_ms=0.25,
    fallback_share=0.21,
    verdict="close",
    energy_mj=2.5,
    energy_note="RAPL, package-0: 3 J",
    sustained=Endurance.of([Point(second, 9, 1 + second / 90, 2.0, State(40 + second / 9)) for second in range(1, 61)]),
)
AWAY = DeviceRow("away", "tflite", "int8", "trained", error="away: refused the connection")
REPORTS: Mapping[str, Report] = {
    "devices": replace(REPORT, devices=(ON_DEVICE, replace(ON_DEVICE, device="pi5"), AWAY)),
    "plain": REPORT,
    "failed": replace(REPORT, rows=(*REPORT.rows, FAILED)),
    "all failed": replace(REPORT, rows=(TORCH, FAILED)),
    "not run": replace(REPORT, rows=(*REPORT.rows, NOT_RUN)),
    "over budget": replace(REPORT, rows=(TORCH, OVER), warnings=("look here",)),
    "no metrics": replace(REPORT, rows=[replace(row, metrics={}) for row in REPORT.rows], monitor=None),
    "one row": replace(REPORT, rows=(INT8,)),
    "torch only": replace(REPORT, rows=(TORCH,)),
    "no rows": replace(REPORT, rows=()),
    "reference": replace(REPORT, rows=(TORCH, replace(INT8, is_reference=True))),
    "not finite": replace(
        REPORT,
        rows=(
            TORCH,
            FLOAT,
            replace(INT8, max_steps=math.inf, metrics={"val_acc": math.nan}, p99_ms=math.inf),
        ),
    ),
    "zeros": replace(REPORT, rows=(replace(FLOAT, size_bytes=0, p50_ms=0.0), replace(INT8, size_bytes=0, p50_ms=0.0))),
    "many": replace(
        REPORT,
        rows=[
            replace(row, target=f"target{number}", size_bytes=(row.size_bytes or 0) + 20 * number)
            for number in range(12)
            for row in (FLOAT, INT8)
        ],
    ),
    "pruned": replace(REPORT, channels={"stem.0": (16, 12), "head": (64, 8)}),
    "pruned deep": replace(REPORT, channels={f"layers.{number}.conv": (64, number % 64) for number in range(400)}),
    "full": replace(
        REPORT,
        rows=(
            TORCH,
            replace(FLOAT, quantiles_ms=QUANTILES, classes=ClassChanges(360, 0, became_right=0, became_wrong=0)),
            replace(
                INT8,
                quantiles_ms=QUANTILES,
                classes=CLASSES,
                interface=Interface(labels=("zero", "one", "two", "three")),
                verdict="differs",
                verdict_reason="off by 4 steps. The first layer that differs is 'blocks.0' (CONV_2D 3 in the file)",
            ),
        ),
        layers=LAYERS,
        channels={"blocks.0": (32, 16)},
        devices=(ON_DEVICE, AWAY),
    ),
    "many layers and classes": replace(
        REPORT,
        rows=(
            TORCH,
            replace(
                INT8,
                classes=ClassChanges(
                    50_000,
                    4_000,
                    tuple((label, label + 1, 100 - label) for label in range(40)),
                    tuple((1_000 * label, label, label + 1) for label in range(40)),
                    became_right=1_000,
                    became_wrong=2_000,
                    by_class=tuple((500, 400, 380 + label % 30) for label in range(100)),
                ),
            ),
        ),
        layers=[LayerRow(f"layers.{number}.conv", "int8", 64 * number, 256 * number, 1e-5) for number in range(300)],
    ),
    "long": replace(
        REPORT,
        model=LONG,
        monitor=LONG,
        rows=[replace(row, path=LONG, runtime=LONG, metrics={LONG: 0.5, **row.metrics}) for row in REPORT.rows],
        warnings=(LONG,),
    ),
    "hostile": Report(
        model=HOSTILE,
        split=HOSTILE,
        rows=[
            replace(
                row,
                target=HOSTILE,
                path=HOSTILE,
                runtime=HOSTILE,
                metrics={HOSTILE: 0.5},
                classes=ClassChanges(
                    9, 1, ((0, -7, 1),), ((5, 0, -7),), 0, 1, ((0, 0, 0), (9, 1, 1)), [[1, 1]], [[0], [3, 4]]
                ),
                quantiles_ms=(math.nan, math.inf, 3.0, 2.0, -1.0),
                interface=Interface(labels=(HOSTILE.replace("\x00", ""),)),
                float_ops=(HOSTILE,),
                placements=Placements(HOSTILE, (Placement(HOSTILE, "cpu", 1, 5),)),  # type: ignore[arg-type]
            )
            for row in (FLOAT, INT8, replace(INT8, error=HOSTILE), replace(INT8, not_run=HOSTILE))
        ],
        devices=[
            replace(ON_DEVICE, device=HOSTILE, runtime=HOSTILE, energy_note=HOSTILE),
            replace(AWAY, error=HOSTILE),
        ],
        monitor=HOSTILE,
        warnings=(HOSTILE,),
        notes=(HOSTILE,),
        versions={HOSTILE: HOSTILE},
        channels={HOSTILE: (4, 2)},
        layers=(LayerRow(HOSTILE, "int8", 5, None, math.nan),),
    ),
}


def trial(number: int, /, **others: Any) -> dict[str, Any]:
    return {
        "number": number,
        "status": "complete",
        "settings": {"model.init_args.width": 16, "optimizer.lr": 0.01},
        "values": {"val_acc": 0.9 + number / 1000, "tflite.size_bytes": 10_000.0 + 100 * number},
        "spread": None,
        "feasible": True,
        "front": number % 2 == 0,
        "folder": f"trial-{number:04d}",
        "reason": None,
        "seconds": 90.0,
        "url": None,
        **others,
    }


def front(*trials: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "study": "digits",
        "objectives": {"val_acc": "max", "tflite.size_bytes": "min"},
        "constraints": {"tflite.size_bytes": 50_000},
        "base": "recipe:quickstart",
        "trials": list(trials),
        **others,
    }


class _Reader(HTMLParser):
    """Holds a page to elements that are opened and closed in order, and to loading and running nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "img", "iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "style", "xlink:href"), name
            if name in ("x", "y", "cx", "cy", "r", "x1", "x2", "y1", "y2", "width", "height"):
                assert math.isfinite(float(str(value))), (name, value)
            if name == "points":
                assert all(math.isfinite(float(number)) for number in re.split("[ ,]", str(value)))
            if name == "href":
                assert tag == "a"
                self.links.append(str(value))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        else:
            assert "url(" not in data
            assert "@import" not in data


def read(page: str) -> _Reader:
    """Parse a page, which is whole and small and of nothing but itself."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert len(page.encode()) < LARGEST_BYTES
    return reader


def words(page: str) -> str:
    return " ".join(" ".join(read(page).texts).split())
