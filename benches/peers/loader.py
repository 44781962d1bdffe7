"""Times torchvision's loader on a folder of JPEG files.

ImageFolder and DataLoader with worker processes, one of three pipelines: `crop-flip` (RandomResizedCrop to 224, flip,
normalise), `crop-flip-randaugment-erase` (timm's rand-m5-mstd0.5-inc1 and its random erasing with noise beside) or `eval`
(Resize to 256, CenterCrop to 224, normalise). Resizing is bicubic. Prints one JSON object.

    python loader.py --pictures ../../target/loader-pictures --pipeline crop-flip --threads 2
"""

import argparse
import json
import statistics
import time

import torch
import torchvision
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIPELINES = ["crop-flip", "crop-flip-randaugment-erase", "eval"]


def transform(pipeline):
    finish = [T.ToTensor(), T.Normalize(MEAN, STD)]
    bicubic = InterpolationMode.BICUBIC
    if pipeline == "eval":
        return T.Compose([T.Resize(256, bicubic), T.CenterCrop(224), *finish])
    start = [T.RandomResizedCrop(224, interpolation=bicubic), T.RandomHorizontalFlip()]
    if pipeline == "crop-flip":
        return T.Compose(start + finish)
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing

    fill = tuple(round(255 * m) for m in MEAN)
    policy = rand_augment_transform(
        "rand-m5-mstd0.5-inc1", {"translate_const": 100, "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    )
    return T.Compose([*start, policy, *finish, RandomErasing(0.25, mode="pixel", device="cpu")])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pictures", required=True, help="a folder with train/<class>/*.jpg")
    p.add_argument("--pipeline", choices=PIPELINES, default="crop-flip")
    p.add_argument("--threads", type=int, default=2, help="worker processes; 0 works in the main process")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--repeats", type=int, default=5, help="timed epochs, at least 5")
    args = p.parse_args()

    torch.set_num_threads(1)
    data = torchvision.datasets.ImageFolder(f"{args.pictures}/train", transform(args.pipeline))
    train = args.pipeline != "eval"
    loader = torch.utils.data.DataLoader(
        data,
        args.batch,
        shuffle=train,
        drop_last=train,
        num_workers=args.threads,
        persistent_workers=args.threads > 0,
        prefetch_factor=3 if args.threads else None,
    )

    def epoch():
        start = time.perf_counter()
        count = sum(len(labels) for _, labels in loader)
        return count / (time.perf_counter() - start)

    epoch()
    rates = [epoch() for _ in range(max(5, args.repeats))]
    low, middle, high = statistics.quantiles(rates, n=4)
    line = {
        "framework": "torchvision",
        "version": torchvision.__version__,
        "threads": args.threads,
        "batch": args.batch,
        "pass": "loader",
        "pipeline": args.pipeline,
        "images_per_s": round(middle, 2),
        "iqr": round(high - low, 2),
        "repeats": len(rates),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
