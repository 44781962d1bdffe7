"""Networks of real size with random weights through every kind of file: import's logits against PyTorch's.

    python tests/oracles/import_check.py target/release/depthshrinker   # needs torch, torchvision, timm, safetensors

Prints a line per network and format, the largest difference of a logit next to PyTorch's own error in f32, and fails above
1e-4 of the largest logit. Batch-norm's statistics come from data: a network with random ones is chaotic, and PyTorch's own
f32 logits are then nowhere near its f64 ones.
"""

import pathlib
import subprocess
import sys
import tempfile

import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

LIMIT, IMAGES = 1e-4, 2
# Our name, image side, the project's network.
NETWORKS = [
    ("mobilenetv2-1.0", 224, "timm mobilenetv2_100", lambda: timm.create_model("mobilenetv2_100")),
    ("mobilenetv2-1.4", 224, "timm mobilenetv2_140", lambda: timm.create_model("mobilenetv2_140")),
    ("mobilenetv2_110d", 224, "timm mobilenetv2_110d", lambda: timm.create_model("mobilenetv2_110d", num_classes=10)),
    ("mobilenet_v2", 224, "torchvision mobilenet_v2", torchvision.models.mobilenet_v2),
    ("mnasnet0_5", 224, "torchvision mnasnet0_5", torchvision.models.mnasnet0_5),
    ("mnasnet0_75", 224, "torchvision mnasnet0_75", torchvision.models.mnasnet0_75),
    ("mnasnet-1.0", 224, "torchvision mnasnet1_0", torchvision.models.mnasnet1_0),
    ("mnasnet1_3.IMAGENET1K_V1", 224, "torchvision mnasnet1_3", torchvision.models.mnasnet1_3),
    ("mnasnet_100.rmsp_in1k", 224, "timm mnasnet_100", lambda: timm.create_model("mnasnet_100")),
    ("tf_efficientnet_lite0", 224, "timm tf_efficientnet_lite0", lambda: timm.create_model("tf_efficientnet_lite0")),
    ("resnet18", 224, "torchvision resnet18", torchvision.models.resnet18),
    ("resnet50", 224, "torchvision resnet50", torchvision.models.resnet50),
    ("resnet34", 224, "timm resnet34", lambda: timm.create_model("resnet34")),
    ("resnet34", 224, "torchvision resnet34", torchvision.models.resnet34),
    ("vgg19_bn", 224, "timm vgg19_bn", lambda: timm.create_model("vgg19_bn")),
    ("vgg19_bn", 224, "torchvision vgg19_bn", torchvision.models.vgg19_bn),
]
FORMATS = {
    "zip .pth": ("w.pth", torch.save),
    "old .pth": ("w.pth", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
    ".safetensors": ("w.safetensors", save_file),
}


def settled(make, x):
    """The network with running statistics of a few passes over data."""
    torch.manual_seed(1)
    model = make().train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        torch.nn.init.uniform_(m.weight, 0.7, 1.3)
        torch.nn.init.uniform_(m.bias, -0.3, 0.3)
        m.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *x.shape[1:]))
    return model.eval()


def main(binary):
    failed = False
    for net, side, label, make in NETWORKS:
        x = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(2))
        model = settled(make, x)
        state = model.state_dict()
        with torch.no_grad():
            single = model(x)
            exact = model.double()(x.double())
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        for kind, (file, write) in FORMATS.items():
            with tempfile.TemporaryDirectory() as folder:
                weights, imported, images, logits = (pathlib.Path(folder) / f for f in (file, "m.safetensors", "x.safetensors", "y.safetensors"))
                write(state, weights)
                save_file({"input": x}, images)
                subprocess.run([binary, "import", net, weights, "-o", imported], check=True, stdout=subprocess.DEVNULL)
                subprocess.run([binary, "infer", imported, "--input", images, "--output", logits], check=True)
                got = load_file(logits)["logits"]
            scale = exact.abs().max().item()
            error, own = ((y - exact).abs().max().item() / scale for y in (got, single))
            failed |= not error <= LIMIT
            print(f"{label:28} {kind:12} differs by {error:.1e} of {scale:.2f} (PyTorch in f32: {own:.1e})", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
