"""What train.py and infer.py share: options, synthetic data, the clock, the JSON line."""

import argparse
import json
import statistics
import time

import torch

from mobilenet_v2 import MobileNetV2, add_network_options, init_, network_options


def parse(description, **network_defaults):
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(p, **network_defaults)
    p.add_argument("--image", type=int, nargs=2, default=[28, 28], metavar=("H", "W"))
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--threads", type=int, default=2)
    layout = p.add_mutually_exclusive_group()
    layout.add_argument("--channels-last", dest="channels_last", action="store_true", default=True, help="(the default)")
    layout.add_argument("--nchw", dest="channels_last", action="store_false")
    p.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    p.add_argument("--repeats", type=int, default=7, help="timed repeats, at least 5")
    p.add_argument("--seconds", type=float, default=2.0, help="least length of one repeat")
    return p


def prepare(args):
    """Model, images and labels, all in memory before anything is timed."""
    torch.set_num_threads(args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = init_(MobileNetV2(**network_options(args)), seed=0).to(memory_format=layout)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(args.batch, args.in_channels, *args.image, generator=g).contiguous(memory_format=layout)
    labels = torch.randint(args.classes, (args.batch,), generator=g)
    return model, images, labels


def measure(step, args):
    """Images per second of `step`, one batch each: median and interquartile range over the repeats."""

    def run(count):
        start = time.perf_counter()
        for _ in range(count):
            step()
        return time.perf_counter() - start

    run(3)
    count = max(1, round(args.seconds / (run(3) / 3)))
    rates = [count * args.batch / run(count) for _ in range(max(5, args.repeats))]
    low, middle, high = statistics.quantiles(rates, n=4)
    return middle, high - low, count


def report(args, kind, folded, rate, iqr, steps, **more):
    network = network_options(args) | {"image": args.image}
    line = {
        "framework": "pytorch",
        "version": torch.__version__,
        "threads": args.threads,
        "batch": args.batch,
        "network": network,
        "pass": kind,
        "images_per_s": round(rate, 2),
        "iqr": round(iqr, 2),
        "folded": folded,
        "channels_last": args.channels_last,
        "compiled": args.compile,
        "repeats": max(5, args.repeats),
        "steps_per_repeat": steps,
    }
    print(json.dumps(line | more))
