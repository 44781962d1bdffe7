"""Times inference of MobileNetV2 in PyTorch on the CPU.

Evaluation mode under torch.inference_mode, on the same synthetic batch; with
`--folded` every batch norm is first folded into its convolution. Prints one
JSON object.

    python infer.py --folded --width 0.5 --image 28 28 --batch 128 --threads 2
"""

import torch

from mobilenet_v2 import fold_
from timing import measure, parse, prepare, report


def main():
    p = parse(__doc__)
    p.add_argument("--folded", action="store_true", help="fold batch norms into convolutions")
    args = p.parse_args()
    model, images, _ = prepare(args)
    model.eval()
    if args.folded:
        fold_(model)
        model = model.to(memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    forward = torch.compile(model) if args.compile else model
    with torch.inference_mode():
        report(args, "infer", args.folded, *measure(lambda: forward(images), args))


if __name__ == "__main__":
    main()
