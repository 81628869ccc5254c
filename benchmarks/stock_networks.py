"""Which stock networks of timm and transformers can be quantized, exported to every target, and pruned.

    python benchmarks/stock_networks.py [--networks timm:xcit_nano_12_p16_224,hf:segformer] [--targets tflite,onnx]
        [--results stock_networks.jsonl] [--time-limit-s 900] [--summary]

Weights are random and inputs noise: this asks what is refused and what differs, not how accurate a network is. Each
network runs in a process of its own and makes one line, in words here and as JSON in ``--results``. What is there
already is not run again, so that a stopped run goes on. Networks of a package that is not installed are left out.

timm and transformers import torchvision, whose operators do not fit every build of torch. None of these networks calls
one, so that ``pip install --no-deps timm torchvision`` is enough: their registration is left out here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TARGETS = ("executorch", "coreml", "tflite", "onnx")
SAMPLES = 4
# Name in timm -> its arguments, smaller than those of ImageNet where the network lets them be. ``blocks`` is ours: how
# many of the network's own are kept, where no argument says that.
TIMM: Mapping[str, Mapping[str, Any]] = {
    "mobilenetv3_small_050": {},
    "mobileone_s0": {},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 2},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
    "levit_128s": {"img_size": 64},
    "skresnet18": {},
    "resmlp_12_224": {"img_size": 64, "blocks": 2},
    "mixer_s32_224": {"img_size": 64, "blocks": 2},
    "gmlp_s16_224": {"img_size": 64, "blocks": 2},
    "mobilenetv4_conv_small_050": {},
    "efficientnet_lite0": {},
    "mnasnet_small": {},
    "lcnet_050": {},
    "tinynet_e": {},
    "ghostnet_050": {},
    "repghostnet_050": {},
    "repvgg_a0": {},
    "resnet10t": {},
    "regnetx_002": {},
    "regnety_002": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "poolformer_s12": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "fastvit_t8": {},
    "efficientformerv2_s0": {"img_size": 64},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 64},
    "pvt_v2_b0": {},
    "starnet_s1": {},
    "mambaout_femto": {},
    "hgnetv2_b0": {},
    "dla46_c": {},
    "ese_vovnet19b_dw": {},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "beit_base_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 48, "window_size": 2},
}


def main() -> None:
    """Run what is asked for and not there yet, then print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", help="names, separated by commas; all by default")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--results", type=Path, default=Path("stock_networks.jsonl"))
    parser.add_argument("--time-limit-s", type=float, default=900)
    parser.add_argument("--summary", action="store_true", help="only print what the results hold")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    targets = given.targets.split(",")
    if given.one:
        print(json.dumps(tried(given.one, targets)))
        return
    known = networks()
    names = given.networks.split(",") if given.networks else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    results = {row["network"]: row for row in rows_of(given.results)}
    for name in names:
        if name in results or given.summary:
            continue
        results[name] = in_a_process(name, targets, given.time_limit_s)
        with given.results.open("a") as file:
            file.write(json.dumps(results[name]) + "\n")
        print(in_words(results[name]), flush=True)
    print(shares([row for name, row in results.items() if name in names], targets))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of an earlier run."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def in_a_process(name: str, targets: list[str], time_limit_s: float) -> dict[str, Any]:
    """Try one network in a process of its own, which a crash or an endless loop does not outlive."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--one", name, "--targets", ",".join(targets)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit_s, env=environment)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row = {"network": name, "quantize": f"took longer than {time_limit_s:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        row = {"network": name, "quantize": f"the process ended with {done.returncode}: {done.stderr[-200:]}"}
    return {**row, "seconds": round(time.monotonic() - began)}


def tried(name: str, targets: list[str]) -> dict[str, Any]:
    """Quantize a network after training, export it to the targets, and cut it to 60 % of its MACs."""
    import torch

    from lightning_edge import exporters, quantize
    from lightning_edge.network import Inputs

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    network, inputs = networks()[name]()
    network = network.eval()
    row: dict[str, Any] = {"network": name, "prune": outcome(lambda: pruned(network, inputs))}
    found: list[Any] = []
    row["quantize"] = outcome(lambda: found.append(quantize(network, [Inputs(inputs)])))
    with tempfile.TemporaryDirectory() as folder:
        for target in targets if found else ():
            path = Path(folder) / f"net{exporters.target(target).suffix}"
            row[target] = outcome(partial(_judgement, found[0], target, path))
    return row


def _judgement(network: Any, target: str, path: Path) -> Any:
    from lightning_edge.exporters import export

    return export(network, target, path).judgement


def outcome(step: Callable[[], Any]) -> str:
    """Give a step's verdict, ``ok`` where it has none, or its error in one line."""
    try:
        result = step()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return "ok" if result is None else str(result)


def pruned(network: Any, inputs: tuple[Any, ...]) -> None:
    """Cut a copy of a network to 60 % and train it on for one step."""
    import copy

    import torch

    from lightning_edge import Prune
    from lightning_edge.network import Inputs, flatten_outputs
    from lightning_edge.schedule import Clock

    class One:
        def inputs(self) -> Inputs:
            return Inputs(inputs)

        def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Any]]:
            raise NotImplementedError

    network, phase = copy.deepcopy(network), Prune(macs=0.6, round_to=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Prune")  # a goal that is missed
        change = phase.plan(network, Clock(0, 0.0), [], One())
    assert change is not None
    phase.perform(network, change)
    torch.stack([output.float().mean() for output in flatten_outputs(network.train()(*inputs))]).sum().backward()


def is_good(verdict: str | None) -> bool:
    """Whether a step did what it should."""
    return verdict is not None and verdict.split(":")[0] in ("ok", "exact", "close")


def in_words(row: Mapping[str, Any]) -> str:
    """One line of a network, and one more for each step that failed."""
    steps = {step: row[step] for step in ("quantize", *TARGETS, "prune") if step in row}
    grades = ", ".join(f"{step} {verdict.split(':')[0]}" for step, verdict in steps.items())
    faults = [f"\n    {step}: {verdict}" for step, verdict in steps.items() if not is_good(verdict)]
    return f"{row['network']} ({row['seconds']} s): {grades}{''.join(faults)}"


def shares(rows: list[dict[str, Any]], targets: list[str]) -> str:
    """How many networks came through each step."""
    steps = ("quantize", *targets, "prune")
    counts = Counter(step for row in rows for step in steps if is_good(row.get(step)))
    asked = {step: sum(step in row for row in rows) for step in steps}
    return ", ".join(f"{step} {counts[step]} of {asked[step]}" for step in steps)


def networks() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]:
    """Every network of an installed package: a function that builds it with an input."""
    found: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {}
    if find_spec("timm"):
        found |= {f"timm:{name}": partial(of_timm, name) for name in TIMM}
    if find_spec("transformers"):
        found |= {f"hf:{name}": partial(of_transformers, name) for name in TRANSFORMERS}
    return found


def leave_out_operators() -> None:
    """Let torchvision be imported without its operators, which it registers shapes of."""
    registration = "torchvision._meta_registrations"
    sys.modules.setdefault(registration, types.ModuleType(registration))


def of_timm(name: str) -> tuple[Any, tuple[Any, ...]]:
    """Build one of timm's."""
    import torch

    leave_out_operators()
    timm = importlib.import_module("timm")  # in no extra, so that type checkers lack it

    arguments = dict(TIMM[name])
    blocks = arguments.pop("blocks", None)
    network = timm.create_model(name, num_classes=10, **arguments)
    if blocks is not None:
        network.blocks = network.blocks[:blocks]
    return network, (torch.randn(SAMPLES, 3, 64, 64),)


# Name of the configuration -> class of the network, what it is fed, arguments.
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
_IMAGES = {**_TEXT, "image_size": 32, "patch_size": 8}
TRANSFORMERS: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        "images",
        {
            **{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16},
            "num_attention_heads": [1, 2, 3, 4],
        },
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", "images", _IMAGES),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", "images", _IMAGES),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", "images", _IMAGES),
    "yolos": (
        "YolosConfig",
        "YolosForObjectDetection",
        "images",
        {**_IMAGES, "image_size": [32, 32], "num_detection_tokens": 5},
    ),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        "images",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        "images",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 128]},
    ),
    "mobilenet_v2": (
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        "images",
        {"depth_multiplier": 0.35, "image_size": 32},
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        "images",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        "images",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    ),
    "poolformer": (
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        "images",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32]},
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", "text", _TEXT),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        "text",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32},
    ),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", "text", {**_TEXT, "pad_token_id": 1}),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", "text", {**_TEXT, "embedding_size": 16}),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", "text", {**_TEXT, "embedding_size": 16}),
    "t5_encoder": (
        "T5Config",
        "T5EncoderModel",
        "text",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        "sound",
        {
            **{name: value for name, value in _TEXT.items() if name != "max_position_embeddings"},
            **{"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4], "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        },
    ),
    "audio_spectrogram": (
        "ASTConfig",
        "ASTForAudioClassification",
        "spectrogram",
        {**_TEXT, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
}


def of_transformers(name: str) -> tuple[Any, tuple[Any, ...]]:
    """Build one of transformers', as a network of tensors alone."""
    import torch
    from torch import nn

    leave_out_operators()
    import transformers

    config_name, kind, fed, arguments = TRANSFORMERS[name]
    model = getattr(transformers, kind)(getattr(transformers, config_name)(**arguments))

    class Tensors(nn.Module):
        """Gives the first output: logits, or the last hidden state."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return self.model(x)[0]

    size = arguments.get("image_size", 64)
    shapes = {
        "images": (3, *(size if isinstance(size, list) else (size, size))),
        "sound": (800,),
        "spectrogram": (32, 16),
    }
    x = torch.randint(2, 64, (SAMPLES, 12)) if fed == "text" else torch.randn(SAMPLES, *shapes[fed])
    return Tensors(), (x,)


if __name__ == "__main__":
    main()
