"""Write a network for an edge runtime, prove that the file is what it should be, and load it again.

```python
artifact = export(module, "tflite", "artifacts/net.tflite", inputs=images[:1])
logits, = load("artifacts/net.tflite")(images)
```
"""

from __future__ import annotations

from lightning_edge.contents import Contents
from lightning_edge.exporters.artifact import Artifact, contents_of, load
from lightning_edge.exporters.pipeline import export, stage
from lightning_edge.exporters.program import deployable
from lightning_edge.exporters.run.calls import TensorSpec
from lightning_edge.exporters.run.runner import Runner
from lightning_edge.exporters.staged import Staged
from lightning_edge.exporters.target import TARGETS, Target, check_options, check_target_installed, options_of, target
from lightning_edge.exporters.verify.contents import ExportWarning

__all__ = [
    "TARGETS",
    "Artifact",
    "Contents",
    "ExportWarning",
    "Runner",
    "Staged",
    "Target",
    "TensorSpec",
    "check_options",
    "check_target_installed",
    "contents_of",
    "deployable",
    "export",
    "load",
    "options_of",
    "stage",
    "target",
]
