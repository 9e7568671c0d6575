"""torchvision's zoo: every classification family, detection, segmentation, and the video and optical flow families."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from zoo_checks import QUIET, examine

torchvision = pytest.importorskip("torchvision")

pytestmark = QUIET

SHORT = {
    "resnet18",
    "densenet121",
    "googlenet",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_v2_t",
    "lraspp_mobilenet_v3_large",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
}


@dataclass(frozen=True)
class Example:
    """How to build a small version of a model: arguments of its builder, and the size of its images in pixels."""

    size: int = 64
    arguments: dict[str, Any] = field(default_factory=dict)


CLASSIFIERS = {
    "alexnet": Example(),
    "convnext_tiny": Example(),
    "densenet121": Example(),
    "efficientnet_b0": Example(),
    "efficientnet_v2_s": Example(),
    "googlenet": Example(arguments={"init_weights": False}),
    "inception_v3": Example(size=299, arguments={"init_weights": False}),
    "maxvit_t": Example(size=224),
    "mnasnet0_5": Example(),
    "mobilenet_v2": Example(),
    "mobilenet_v3_small": Example(),
    "regnet_x_400mf": Example(),
    "regnet_y_400mf": Example(),
    "resnet18": Example(),
    "resnext50_32x4d": Example(),
    "wide_resnet50_2": Example(),
    "shufflenet_v2_x0_5": Example(),
    "squeezenet1_1": Example(),
    "swin_t": Example(),
    "swin_v2_t": Example(),
    "vgg11": Example(),
    "vgg11_bn": Example(),
    "vit_b_16": Example(arguments={"image_size": 64}),
}
_FEW = {"rpn_pre_nms_top_n_train": 32, "rpn_pre_nms_top_n_test": 32, "rpn_post_nms_top_n_train": 16}
_RCNN = {"min_size": 64, "max_size": 64, "box_score_thresh": 0.0, **_FEW, "rpn_post_nms_top_n_test": 8}
_ONE_STAGE = {"min_size": 64, "max_size": 64, "score_thresh": 0.0}
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": Example(arguments=_RCNN),
    "fasterrcnn_resnet50_fpn_v2": Example(arguments=_RCNN),
    "maskrcnn_resnet50_fpn": Example(arguments=_RCNN),
    "keypointrcnn_resnet50_fpn": Example(arguments=_RCNN),
    "retinanet_resnet50_fpn": Example(arguments=_ONE_STAGE),
    "retinanet_resnet50_fpn_v2": Example(arguments=_ONE_STAGE),
    "fcos_resnet50_fpn": Example(arguments=_ONE_STAGE),
    "ssd300_vgg16": Example(arguments={"score_thresh": 0.0}),
    "ssdlite320_mobilenet_v3_large": Example(arguments={"score_thresh": 0.0}),
}
SEGMENTERS = {
    "deeplabv3_mobilenet_v3_large": Example(),
    "fcn_resnet50": Example(arguments={"aux_loss": True}),
    "lraspp_mobilenet_v3_large": Example(),
}
VIDEOS = {
    "mc3_18": Example(size=32),
    "mvit_v1_b": Example(size=224),
    "r2plus1d_18": Example(size=32),
    "r3d_18": Example(size=32),
    "s3d": Example(size=224),
    "swin3d_t": Example(size=32),
}
FLOWS = {"raft_small": Example(size=128)}
EXAMPLES = CLASSIFIERS | DETECTORS | SEGMENTERS | VIDEOS | FLOWS


@pytest.mark.zoo
def test_the_zoo_has_every_family_of_torchvision():
    known = {torchvision.models.get_model_builder(name).__module__ for name in EXAMPLES}
    every = {torchvision.models.get_model_builder(name).__module__ for name in torchvision.models.list_models()}
    assert known == {module for module in every if "quantization" not in module}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.zoo if name in SHORT else pytest.mark.zoo_full) for name in EXAMPLES],
)
def test_wrapping_keeps_every_bit_of_a_torchvision_model(name: str, report):
    example = EXAMPLES[name]
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **_few_classes(name), **example.arguments)
    report(examine(model, lambda training: _inputs(name, example.size, training)))


def _few_classes(name: str) -> dict[str, Any]:
    if name in DETECTORS:
        return {"weights_backbone": None, "num_classes": 2 if name.startswith("keypoint") else 3}
    if name in SEGMENTERS:
        return {"weights_backbone": None, "num_classes": 3}
    return {} if name in FLOWS else {"num_classes": 5}


def _inputs(name: str, size: int, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    if name in VIDEOS:
        frames = 16 if name.startswith(("mvit", "s3d")) else 4
        return (torch.randn(2, 3, frames, size, size, generator=generator),), {}
    images = torch.randn(2, 3, size, size, generator=generator)
    if name in FLOWS:
        return (images, torch.randn(2, 3, size, size, generator=generator)), {"num_flow_updates": 2}
    if name not in DETECTORS:
        return (images,), {}
    boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0], [20.0, 10.0, 60.0, 50.0]])
    target = {
        "boxes": boxes,
        "labels": torch.ones(2, dtype=torch.long),
        "masks": torch.ones(2, size, size, dtype=torch.uint8),
        "keypoints": torch.tensor([[[10.0, 10.0, 1.0]] * 17] * 2),
    }
    targets = [{key: value.clone() for key, value in target.items()} for _ in range(2)]
    return (list(images), targets) if training else (list(images),), {}
