#!/usr/bin/env python3
"""Writes the facts about ImageNet networks that are built into the binary.

    python data/imagenet/make.py            # needs timm and torchvision (see benches/peers/README.md)

classes.txt        the 1 000 class names, one a line, in label order: `categories` of torchvision's weights
preprocessing.tsv  how each published network's images are made: `default_cfg` of timm's networks, `transforms` of
                   torchvision's, and what Hugging Face's image processors do. Columns: name, input side, side that the
                   picture's shorter side is resized to, interpolation, mean, standard deviation (one number stands for all three channels), and timm's
                   `crop_pct`, from which the resized side follows for other inputs.

A name without a tag (`resnet18`) is timm's default weights; `resnet18.tv_in1k` and the like name others. Names that only
torchvision has (`mobilenet_v2`) stand for IMAGENET1K_V1, and `mobilenet_v2.IMAGENET1K_V2` for the other weights.
"""

import fnmatch
import math
import pathlib

import torchvision
from timm.models._registry import _model_pretrained_cfgs as timm_cfgs
from torchvision.models import get_model_weights

HERE = pathlib.Path(__file__).resolve().parent
TIMM = ["mobilenetv2_*", "efficientnet_lite?*", "tf_efficientnet_lite?*", "mnasnet_*", "resnet18*", "resnet34*", "resnet50", "resnet50.*", "vgg19_bn*"]
TORCHVISION = ["mobilenet_v2", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "resnet18", "resnet34", "resnet50", "vgg19_bn"]

# transformers: MobileNetV2ImageProcessor as convert_original_tf_checkpoint_to_pytorch.py saves it (32 pixels more than the
# input, bilinear), and ConvNextImageProcessor as convert_resnet_to_pytorch.py does (crop_pct 0.875, bicubic).
MEAN, STD = "0.485,0.456,0.406", "0.229,0.224,0.225"
HUGGING_FACE = [
    *((f"google/mobilenet_v2_{width}_{side}", side, side + 32, "bilinear", "0.5", "0.5") for width, side in [("1.4", 224), ("1.0", 224), ("0.75", 160), ("0.35", 96)]),
    *((f"microsoft/resnet-{depth}", 224, 256, "bicubic", MEAN, STD, "0.875") for depth in (18, 34, 50)),
]


def numbers(values):
    values = list(values)
    return f"{values[0]:g}" if len(set(values)) == 1 else ",".join(f"{v:g}" for v in values)


def timm_rows():
    for name, cfg in sorted(timm_cfgs.items()):
        wanted = any(fnmatch.fnmatch(name, p) for p in TIMM)
        if not wanted or cfg.num_classes != 1000 or name.endswith(".untrained"):
            continue
        side = cfg.input_size[1]
        # timm rounds down: timm.data.transforms_factory.transforms_imagenet_eval.
        yield name, side, math.floor(side / cfg.crop_pct), cfg.interpolation, numbers(cfg.mean), numbers(cfg.std), f"{cfg.crop_pct:g}"


def torchvision_rows(taken):
    for name in TORCHVISION:
        for i, weights in enumerate(get_model_weights(name)):
            t = weights.transforms()
            row = t.crop_size[0], t.resize_size[0], t.interpolation.value, numbers(t.mean), numbers(t.std)
            yield f"{name}.{weights.name}", *row
            if i == 0 and name not in taken:
                yield name, *row


def main():
    names = get_model_weights("mobilenet_v2").IMAGENET1K_V1.meta["categories"]
    assert len(names) == 1000
    (HERE / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    rows = list(timm_rows())
    rows += torchvision_rows({row[0] for row in rows})
    rows += HUGGING_FACE
    lines = ["\t".join(map(str, row)) for row in sorted(rows)]
    (HERE / "preprocessing.tsv").write_text("\n".join(lines) + "\n")
    print(f"torchvision {torchvision.__version__}: {len(names)} classes, {len(lines)} networks")


if __name__ == "__main__":
    main()
