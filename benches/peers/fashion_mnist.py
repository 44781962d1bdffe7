"""Trains MobileNetV2 on a cut of Fashion-MNIST in plain PyTorch on the CPU.

The cut is the first 1000 training and the first 200 test images of each class,
so the full IDX files and a folder that holds just the cut give the same data. Both
the published names (train-images-idx3-ubyte.gz, t10k-...) and the cut's own
(train-images.gz, test-...) are found.
SGD-Nesterov, linear warm-up then cosine, random flip (and crop), label smoothing.
Prints one JSON object per epoch (with --verbose) and one at the end: top-1 on
the test images and seconds.

    python fashion_mnist.py --data ../../data/fashion-mnist-cut --epochs 6
"""

import argparse
import gzip
import json
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F

from mobilenet_v2 import MobileNetV2, add_network_options, init_, network_options

MEAN, STD = 0.2860, 0.3530
HERE = pathlib.Path(__file__).resolve().parent


def read_idx(path):
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, -1, 4 + 4 * raw[3]).reshape(shape)


def find(folder, names):
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise SystemExit(f"{folder} holds neither {' nor '.join(names)}; give --data FOLDER")
    return found[0]


def load(folder, part, per_class):
    """Images [N,1,28,28], normalised, and labels; the first `per_class` of each class in file order."""
    published = {"train": "train", "test": "t10k"}[part]
    images = read_idx(find(folder, [f"{part}-images.gz", f"{published}-images-idx3-ubyte.gz"]))
    labels = read_idx(find(folder, [f"{part}-labels.gz", f"{published}-labels-idx1-ubyte.gz"]))
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)]))
    x = torch.from_numpy(images[keep].astype(np.float32)) / 255
    return ((x - MEAN) / STD)[:, None], torch.from_numpy(labels[keep].astype(np.int64))


def batches(x, y, args, g):
    """One epoch of shuffled full batches, each image shifted by up to `crop` pixels and flipped half the time."""
    size, pad = x.shape[-1], args.crop
    padded, span = F.pad(x[:, 0], (pad,) * 4, value=-MEAN / STD), torch.arange(size)
    for index in torch.randperm(len(x), generator=g).split(args.batch):
        if len(index) < args.batch:
            return
        n = (args.batch, 1)
        rows = torch.randint(2 * pad + 1, n, generator=g) + span
        columns = torch.randint(2 * pad + 1, n, generator=g)
        flip = torch.rand(n, generator=g) < (0.0 if args.no_flip else 0.5)
        columns = columns + torch.where(flip, size - 1 - span, span)
        yield padded[index[:, None, None], rows[:, :, None], columns[:, None, :]][:, None], y[index]


@torch.inference_mode()
def top1(model, x, y):
    model.eval()
    right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500)))
    model.train()
    return right / len(y)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(p, head_channels=256)
    p.add_argument("--data", type=pathlib.Path, default=HERE.parents[1] / "data" / "fashion-mnist-cut")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=0.1)
    p.add_argument("--weight-decay", type=float, default=5e-4)
    p.add_argument("--warmup", type=float, default=0.5, help="epochs of linear warm-up")
    p.add_argument("--smoothing", type=float, default=0.1)
    p.add_argument("--crop", type=int, default=0, help="pixels; costs top-1 in runs of few epochs")
    p.add_argument("--no-flip", action="store_true")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--verbose", action="store_true")
    args = p.parse_args()

    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(args.seed)
    x, y = load(args.data, "train", 1000)
    x_test, y_test = (t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in load(args.data, "test", 200))
    model = init_(MobileNetV2(**network_options(args)), args.seed).to(memory_format=torch.channels_last)
    decayed = [q for q in model.parameters() if q.ndim > 1]
    others = [q for q in model.parameters() if q.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True, fused=True)
    per_epoch = len(x) // args.batch
    total, warm = per_epoch * args.epochs, args.warmup * per_epoch

    start, step, training = time.perf_counter(), 0, 0.0
    for epoch in range(args.epochs):
        begun, losses = time.perf_counter(), 0.0
        for images, labels in batches(x, y, args, g):
            if step < warm:
                lr = args.lr * (step + 1) / warm
            else:
                lr = args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels, label_smoothing=args.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses += loss.item()
            step += 1
        training += time.perf_counter() - begun
        if args.verbose:
            line = {"epoch": epoch + 1, "loss": round(losses / per_epoch, 4), "top1": top1(model, x_test, y_test)}
            print(json.dumps(line | {"seconds": round(time.perf_counter() - start, 1)}), flush=True)
    line = {
        "framework": "pytorch",
        "version": torch.__version__,
        "threads": args.threads,
        "batch": args.batch,
        "network": network_options(args) | {"image": [28, 28]},
        "parameters": sum(q.numel() for q in model.parameters()),
        "epochs": args.epochs,
        "lr": args.lr,
        "top1": top1(model, x_test, y_test),
        "seconds": round(training, 1),
        "images_per_s": round(step * args.batch / training, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
