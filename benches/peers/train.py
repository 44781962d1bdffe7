"""Times training steps of MobileNetV2 in PyTorch on the CPU.

One step is forward, cross entropy with label smoothing, backward and
SGD-Nesterov, on the same synthetic batch. The optimizer's fastest form (fused,
foreach or one by one) is found first. Prints one JSON object.

    python train.py --width 0.5 --image 28 28 --batch 128 --threads 2
"""

import time

import torch
import torch.nn.functional as F

from timing import measure, parse, prepare, report

FORMS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}


def sgd(model, **form):
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True, **form)


def main():
    p = parse(__doc__)
    p.add_argument("--optimizer", choices=["fastest", *FORMS], default="fastest")
    args = p.parse_args()
    model, images, labels = prepare(args)
    model.train()
    forward = torch.compile(model) if args.compile else model

    def gradients():
        loss = F.cross_entropy(forward(images), labels, label_smoothing=0.1)
        loss.backward()
        return loss

    def seconds(form):
        optimizer = sgd(model, **FORMS[form])
        optimizer.step()
        start = time.perf_counter()
        for _ in range(20):
            optimizer.step()
        return time.perf_counter() - start

    gradients()
    form = min(FORMS, key=seconds) if args.optimizer == "fastest" else args.optimizer
    optimizer = sgd(model, **FORMS[form])

    def step():
        optimizer.zero_grad(set_to_none=True)
        gradients()
        optimizer.step()

    report(args, "train", False, *measure(step, args), optimizer=form)


if __name__ == "__main__":
    main()
