"""MobileNetV2 in plain PyTorch, with timm's parameter names.

The network that the scripts beside this file time and that
tests/fixtures/make_fixtures.py takes its expected values from. Options cover
small images (stem stride, stage strides, head width). Run the file to compare
keys, shapes and logits with timm's own models:

    python mobilenet_v2.py
"""

import argparse
import math

import torch
from torch import nn

# (expansion, channels, blocks, default stride) per stage; expansion 1 = depthwise-separable block.
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
STAGE_STRIDES = [s for *_, s in STAGES]


def round_channels(channels, divisor=8, round_limit=0.9):
    """Nearest multiple of `divisor`, never less than `round_limit` of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < round_limit * channels else rounded


def conv(c_in, c_out, k, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False)


class SeparableBlock(nn.Module):
    """Depthwise conv, pointwise linear conv; skip where shapes agree."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv_dw, self.bn1 = conv(c_in, c_in, 3, stride, c_in), nn.BatchNorm2d(c_in)
        self.conv_pw, self.bn2 = conv(c_in, c_out, 1), nn.BatchNorm2d(c_out)
        self.act = nn.ReLU6(inplace=True)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        y = self.act(self.bn1(self.conv_dw(x)))
        y = self.bn2(self.conv_pw(y))
        return x + y if self.skip else y


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise conv, pointwise linear projection; skip where shapes agree."""

    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        mid = round_channels(c_in * expansion)
        self.conv_pw, self.bn1 = conv(c_in, mid, 1), nn.BatchNorm2d(mid)
        self.conv_dw, self.bn2 = conv(mid, mid, 3, stride, mid), nn.BatchNorm2d(mid)
        self.conv_pwl, self.bn3 = conv(mid, c_out, 1), nn.BatchNorm2d(c_out)
        self.act = nn.ReLU6(inplace=True)
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        y = self.act(self.bn1(self.conv_pw(x)))
        y = self.act(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.skip else y


class MobileNetV2(nn.Module):
    def __init__(self, width=1.0, in_channels=3, classes=1000, input_stride=2, stage_strides=None, head_channels=None):
        super().__init__()
        strides = list(stage_strides or STAGE_STRIDES)
        assert len(strides) == len(STAGES), "seven stage strides"
        head = head_channels or max(1280, round_channels(1280 * width))
        c_in = round_channels(32 * width)
        self.conv_stem, self.bn1 = conv(in_channels, c_in, 3, input_stride), nn.BatchNorm2d(c_in)
        stages = []
        for (expansion, channels, count, _), stride in zip(STAGES, strides):
            c_out, blocks = round_channels(channels * width), []
            for i in range(count):
                s = stride if i == 0 else 1
                if expansion == 1:
                    blocks.append(SeparableBlock(c_in, c_out, s))
                else:
                    blocks.append(InvertedResidual(c_in, c_out, s, expansion))
                c_in = c_out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head, self.bn2 = conv(c_in, head, 1), nn.BatchNorm2d(head)
        self.classifier = nn.Linear(head, classes)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x):
        x = self.act(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.act(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((2, 3)))


@torch.no_grad()
def init_(model, seed=0, perturb=False):
    """Deterministic start: convs normal, kaiming fan-out (per group); classifier normal 0.01.

    With `perturb`, batch-norm weights, biases and running statistics and the
    classifier bias get random values, so that a check against them proves
    something. The biases lie in 0..4: both bends of ReLU6 are met, yet training a
    few steps from there is not chaotic, and two right implementations agree.
    """
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            m.weight.normal_(0, math.sqrt(2 / fan_out) * (2 if perturb else 1), generator=g)
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.weight.fill_(1)
            m.bias.zero_()
            if perturb:
                m.weight.normal_(1, 0.2, generator=g)
                m.bias.uniform_(0, 4, generator=g)
                m.running_mean.normal_(0, 0.3, generator=g)
                m.running_var.uniform_(0.5, 1.5, generator=g)
        elif isinstance(m, nn.Linear):
            m.weight.normal_(0, 0.05 if perturb else 0.01, generator=g)
            m.bias.zero_()
            if perturb:
                m.bias.normal_(0, 0.1, generator=g)
    return model


@torch.no_grad()
def fold_(model):
    """Folds every batch norm into the convolution before it (the model must be in eval mode)."""
    pairs = {
        MobileNetV2: {"conv_stem": "bn1", "conv_head": "bn2"},
        SeparableBlock: {"conv_dw": "bn1", "conv_pw": "bn2"},
        InvertedResidual: {"conv_pw": "bn1", "conv_dw": "bn2", "conv_pwl": "bn3"},
    }
    for m in list(model.modules()):
        for c, b in pairs.get(type(m), {}).items():
            setattr(m, c, nn.utils.fusion.fuse_conv_bn_eval(getattr(m, c), getattr(m, b)))
            setattr(m, b, nn.Identity())
    return model


def add_network_options(parser, **defaults):
    """The options that choose the network, shared by the scripts beside this file."""
    d = dict(width=0.5, in_channels=1, classes=10, input_stride=1, stage_strides=STAGE_STRIDES, head_channels=None) | defaults
    ints = lambda s: [int(x) for x in s.split(",")]
    parser.add_argument("--width", type=float, default=d["width"])
    parser.add_argument("--in-channels", type=int, default=d["in_channels"])
    parser.add_argument("--classes", type=int, default=d["classes"])
    parser.add_argument("--input-stride", type=int, default=d["input_stride"])
    parser.add_argument("--stage-strides", type=ints, default=d["stage_strides"], help="seven numbers, comma between")
    parser.add_argument("--head-channels", type=int, default=d["head_channels"], help="default 1280, more above width 1")


def network_options(args):
    names = ["width", "in_channels", "classes", "input_stride", "stage_strides", "head_channels"]
    return {n: getattr(args, n) for n in names}


def compare_with_timm():
    import timm
    from timm.models.efficientnet import _gen_mobilenet_v2

    for width in (1.4, 1.0, 0.75, 0.5, 0.35, 0.25):
        name = f"mobilenetv2_{round(width * 100):03d}"
        known = timm.is_model(name)
        theirs = timm.create_model(name) if known else _gen_mobilenet_v2(name, width)
        ours = MobileNetV2(width)
        shapes = lambda m: [(k, tuple(v.shape)) for k, v in m.state_dict().items()]
        keys = shapes(theirs) == shapes(ours)
        init_(ours, seed=1, perturb=True)
        x = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(2))
        for m in ours.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 1.0  # one pass then sets the running statistics: evaluation stays in range
        ours.train()(x)
        theirs.load_state_dict(ours.state_dict())
        diffs = []
        for training in (False, True):
            a, b = ours.train(training)(x), theirs.train(training)(x)
            diffs.append(((a - b).abs().max() / b.abs().max()).item())
        fused = ours.eval()(x)
        fold = ((fold_(ours)(x) - fused).abs().max() / fused.abs().max()).item()
        note = "" if known else " (built by timm's generator, no named model)"
        print(
            f"{name}: parameters {sum(p.numel() for p in theirs.parameters())}, same keys and shapes in order: {keys}, "
            f"relative difference of logits: eval {diffs[0]:.1e}, train {diffs[1]:.1e}, folded {fold:.1e}{note}"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    compare_with_timm()
