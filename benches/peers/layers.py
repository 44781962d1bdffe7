"""Times convolution layers in PyTorch: what `depthshrinker bench kernels --json` prints, in the same passes.

Reads a list of layers as JSON (a file or standard input) and prints it again with
the median time of each in microseconds; with --serve it answers line by line, as
`depthshrinker bench kernels --peers` asks. channels_last, cudnn.benchmark, pure
half or bfloat16 arithmetic, over as many sets of operands and results as
depthshrinker rotates through (`operand_sets`); on CUDA in CUDA graphs.

fwd is the convolution with bias, residual and activation, each as its own call and
in place; `conv_time_us` is the convolution alone. dgrad, wgrad and dgrad+wgrad are
aten.convolution_backward. train-fwd and train-bwd are the convolution, batch norm
with batch statistics, residual and activation through autograd; for train-fwd what
the backward pass needs is kept, as in training. The question `peaks` is for the
rates of a large copy and of a large matrix product.

    depthshrinker bench kernels mobilenetv2-1.0 --json > layers.json
    python layers.py layers.json --device cuda --precision f16
"""

import torch
import torch.nn.functional as F

from clock import DTYPES, main, sample, summary

GRADIENTS = {"dgrad": [True, False, False], "wgrad": [False, True, False], "dgrad+wgrad": [True, True, False]}


class Operands:
    """One set of tensors of a layer, NHWC in memory."""

    def __init__(self, args, q):
        dtype, device = DTYPES[args.precision], args.device
        (top, left, bottom, right), groups = q["padding"], q["groups"]
        # PyTorch pads both sides alike; what is more on one side is there beforehand, untimed.
        self.padding = [min(top, bottom), min(left, right)]
        extra = [top - self.padding[0], bottom - self.padding[0], left - self.padding[1], right - self.padding[1]]

        def image(c, h, w):
            t = torch.randn(q["n"], c, h, w, device=device, dtype=torch.float32).clamp(0, 6)
            return t.to(dtype).contiguous(memory_format=torch.channels_last)

        self.x = image(q["c_in"], q["h"] + extra[0] + extra[1], q["w"] + extra[2] + extra[3])
        w = torch.randn(q["c_out"], q["c_in"] // groups, *q["kernel"], device=device) * 0.05
        self.w = w.to(dtype).contiguous(memory_format=torch.channels_last)
        self.b = torch.full((q["c_out"],), 0.1, device=device, dtype=dtype) if q["bias"] else None
        self.stride, self.groups, self.limit = q["stride"], groups, q["activation_limit"]
        self.activation = q["activation"]
        h, w = self.conv().shape[2:]
        self.dy = image(q["c_out"], h, w) * 0.05
        self.residual = image(q["c_out"], h, w) if q["residual"] else None
        self.reads_image = q["reads_image"]
        self.norm = None
        if q["pass"].startswith("train"):
            c = q["c_out"]
            one = lambda: torch.ones(c, device=device, requires_grad=True)
            self.norm = [torch.zeros(c, device=device), torch.ones(c, device=device), one(), one()]
            for t in [self.w, *([] if self.reads_image else [self.x]), *([self.residual] if q["residual"] else [])]:
                t.requires_grad_(True)

    def conv(self):
        return F.conv2d(self.x, self.w, self.b, self.stride, self.padding, 1, self.groups)

    def finish(self, y):
        if self.residual is not None:
            y += self.residual
        if self.activation:
            y = F.relu_(y) if self.limit is None else F.hardtanh_(y, 0.0, self.limit)
        return y

    def step(self):
        z = F.batch_norm(self.conv(), *self.norm, training=True, momentum=0.1, eps=1e-5)
        if self.residual is not None:
            z = z + self.residual
        if self.activation:
            z = F.relu(z) if self.limit is None else F.hardtanh(z, 0.0, self.limit)
        return z

    def gradients(self, mask):
        return torch.ops.aten.convolution_backward(
            self.dy, self.x, self.w, None, self.stride, self.padding, [1, 1], False, [0, 0], self.groups, mask
        )


def answer(args, q):
    seconds = q.get("seconds", args.seconds)
    sets = [Operands(args, q) for _ in range(q["operand_sets"])]
    timed = lambda body: summary(sample(args.device, body, len(sets), seconds))
    if q["pass"] == "fwd":
        with torch.no_grad():
            result = timed(lambda i: sets[i].finish(sets[i].conv()))
            if q["residual"] or q["activation"]:
                result["conv_time_us"] = timed(lambda i: sets[i].conv())["time_us"]
        return result
    if q["pass"] in GRADIENTS:
        with torch.no_grad():
            return timed(lambda i: sets[i].gradients(GRADIENTS[q["pass"]]))
    if q["pass"] == "train-fwd":
        # What the backward pass needs is kept, as in training.
        return timed(lambda i: sets[i].step())
    if q["pass"] == "train-bwd":
        return backward(args, sets, seconds)
    raise ValueError(f"unknown pass {q['pass']!r}")


def backward(args, sets, seconds):
    """Autograd from z, whose forward pass is done beforehand, again and again."""

    def prepared():
        graphs = []
        for s in sets:
            wanted = [s.w, *s.norm[2:], *([] if s.reads_image else [s.x])]
            graphs.append((s.step(), wanted + ([s.residual] if s.residual is not None else []), s.dy))
        return graphs

    body = lambda i: torch.autograd.grad(*graphs[i], retain_graph=True)
    if args.device == "cpu":
        graphs = prepared()
        return summary(sample(args.device, body, len(sets), seconds))
    # Autograd runs a step's backward on its forward's stream: both are made on the one that is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphs = prepared()
        torch.cuda.synchronize()
        return summary(sample(args.device, body, len(sets), seconds))


if __name__ == "__main__":
    main(__doc__, answer)
