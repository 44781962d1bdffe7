"""Times whole networks in PyTorch from depthshrinker's own graphs, so that any network it knows can be compared.

A question is a JSON object: `graph` (as `depthshrinker` keeps it in a model file's
metadata), `batch`, `training`, `compile`, and `seconds`. The answer is the median
throughput in images per second. channels_last, cudnn.benchmark; inference in pure
f16 or bf16, training under autocast with f32 weights, SGD-Nesterov and label
smoothing. `compile` uses torch.compile, with freezing for inference. On CUDA the
whole pass (inference, or a step from the loss to the optimizer) is captured in one
CUDA graph, compiled or not; where that raises, a compiled pass runs with the
compiler's own graphs (reduce-overhead), else as it is. `note` in the answer says
which of them was timed, and what failed before.
"""

import json
import math

import torch
import torch.nn.functional as F
from torch import nn

from clock import DTYPES, main, replays
from serving import WARM_STEPS, first_that_runs, samples_of, throughput, timed

# Calls between two events where nothing is captured.
CALLS_IN_A_ROW = 4


class Activation(nn.Module):
    def __init__(self, limit, slope):
        super().__init__()
        self.limit, self.slope = limit, slope

    def forward(self, x):
        if self.slope == 1:
            return x
        if self.slope == 0:
            return F.relu(x) if self.limit is None else F.hardtanh(x, 0.0, self.limit)
        y = F.relu(x) if self.limit is None else F.hardtanh(x, 0.0, self.limit)
        return y + self.slope * (x - y)


class Conv(nn.Module):
    def __init__(self, op, shape):
        super().__init__()
        k, pad = op["window"], op["window"]["pad"]
        self.pad = [pad["left"], pad["right"], pad["top"], pad["bottom"]]
        symmetric = pad["left"] == pad["right"] and pad["top"] == pad["bottom"]
        padding = (pad["top"], pad["left"]) if symmetric else 0
        if symmetric:
            self.pad = None
        size, stride = (k["k_h"], k["k_w"]), (k["stride_h"], k["stride_w"])
        bias = op["bias"] == "channel"
        self.conv = nn.Conv2d(op["c_in"], op["c_out"], size, stride, padding, groups=op["groups"], bias=bias)
        self.map = nn.Parameter(torch.zeros(1, *shape)) if op["bias"] == "map" else None

    def forward(self, x):
        y = self.conv(x if self.pad is None else F.pad(x, self.pad))
        return y if self.map is None else y + self.map


class Network(nn.Module):
    """Interprets the nodes in order; a value is dropped after its last reader."""

    def __init__(self, graph):
        super().__init__()
        self.nodes = graph["nodes"]
        self.last = [max([i for i, n in enumerate(self.nodes) if id_ in n["inputs"]], default=-1) for id_ in range(len(self.nodes))]
        self.layers = nn.ModuleDict()
        shapes = []
        for i, node in enumerate(self.nodes):
            layer, shape = build(node, [shapes[j] for j in node["inputs"]])
            shapes.append(shape)
            if layer is not None:
                self.layers[str(i)] = layer

    def forward(self, x):
        values = {0: x}
        for i, node in enumerate(self.nodes[1:], 1):
            read = [values[j] for j in node["inputs"]]
            op = node["op"]
            if op == "add":
                values[i] = read[0] + read[1]
            elif op == "pad":
                sides = [node[side] for side in ("left", "right", "top", "bottom")]
                values[i] = nn.functional.pad(read[0], sides)
            elif op == "global_avg_pool":
                values[i] = read[0].mean((2, 3))
            else:
                values[i] = self.layers[str(i)](read[0])
            for j in node["inputs"]:
                if self.last[j] == i:
                    values.pop(j, None)
        return values[len(self.nodes) - 1]


def build(node, inputs):
    """The layer of a node, if it has one, and the shape [c, h, w] of its value."""
    op = node["op"]
    if op == "input":
        s = node["shape"]
        return None, (s["c"], s["h"], s["w"])
    c, h, w = inputs[0]
    if op == "conv":
        k, pad = node["window"], node["window"]["pad"]
        h = (h + pad["top"] + pad["bottom"] - k["k_h"]) // k["stride_h"] + 1
        w = (w + pad["left"] + pad["right"] - k["k_w"]) // k["stride_w"] + 1
        shape = (node["c_out"], h, w)
        return Conv(node, shape), shape
    if op == "batch_norm":
        return nn.BatchNorm2d(c, node["eps"], node["momentum"]), inputs[0]
    if op == "activation":
        return Activation(node["limit"], node["slope"]), inputs[0]
    if op == "max_pool":
        k, pad = node["window"], node["window"]["pad"]
        h = (h + pad["top"] + pad["bottom"] - k["k_h"]) // k["stride_h"] + 1
        w = (w + pad["left"] + pad["right"] - k["k_w"]) // k["stride_w"] + 1
        pool = nn.MaxPool2d((k["k_h"], k["k_w"]), (k["stride_h"], k["stride_w"]))
        sides = (pad["left"], pad["right"], pad["top"], pad["bottom"])
        return (nn.Sequential(nn.ConstantPad2d(sides, -math.inf), pool) if any(sides) else pool), (c, h, w)
    if op == "linear":
        return nn.Linear(node["c_in"], node["c_out"]), (node["c_out"], 1, 1)
    if op == "dropout":
        return nn.Dropout(node["p"]), inputs[0]
    if op == "add":
        return None, inputs[0]
    if op == "pad":
        return None, (c, h + node["top"] + node["bottom"], w + node["left"] + node["right"])
    if op == "global_avg_pool":
        return None, (c, 1, 1)
    raise ValueError(f"node {node['name']}: this script does not know {op!r}")


class Last:
    """The network asked for last: asked again in the next turn, what took long to compile is kept, and no more than
    one holds the GPU's memory."""

    key, prepared = None, None


def answer(args, q):
    key = json.dumps([q["graph"], q["batch"], q["training"], q["compile"]])
    if key != Last.key:
        Last.key = Last.prepared = None
        torch._dynamo.reset()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        Last.prepared = prepare(args, q)
        Last.key = key
    run, note, memory = Last.prepared
    rate = throughput(q["batch"], run(q.get("seconds", args.seconds)))
    result = rate | {"compiled": q["compile"], "note": note}
    return result if memory is None else result | {"memory_bytes": memory}


def prepare(args, q):
    """What times the network, how it runs in words, and the most bytes of the GPU it took."""
    network = Network(q["graph"]).to(args.device, memory_format=torch.channels_last)
    shape = q["graph"]["nodes"][0]["shape"]
    images = torch.randn(q["batch"], shape["c"], shape["h"], shape["w"], device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    before = 0
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    make = training if q["training"] else inference
    run, note = first_that_runs(make(args, q, network, images), torch._dynamo.reset)
    run(0)
    return run, note, torch.cuda.max_memory_allocated() - before if args.device == "cuda" else None


def inference(args, q, network, images):
    dtype = DTYPES[args.precision]
    network, images = network.eval().to(dtype), images.to(dtype)

    def one(forward):
        # Not inference_mode: freezing and CUDA graphs of the compiler want ordinary tensors.
        def body():
            with torch.no_grad():
                return forward(images)

        return body

    def compiled(mode):
        from torch._inductor import config as inductor

        inductor.freezing = True
        return one(torch.compile(network, mode=mode))

    return ways(args, q["compile"], one(network), compiled)


def training(args, q, network, images):
    network.train()
    labels = torch.arange(q["batch"], device=args.device) * 7 % q["graph"]["nodes"][-1]["c_out"]
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    # It has no `capturable`, nor needs it: nothing of a step is decided on the host. Fused, it also takes the scaler's
    # scale and verdict on the device, where others would ask for them.
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, nesterov=True, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "f16")
    half = args.precision != "f32"

    def step(forward):
        def body():
            # Gradients come anew from the pool of whoever captures this.
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(args.device, DTYPES[args.precision] if half else None, enabled=half):
                loss = F.cross_entropy(forward(images), labels, label_smoothing=0.1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return body

    return ways(args, q["compile"], step(network), lambda mode: step(torch.compile(network, mode=mode)))


def ways(args, compile_, eager, compiled):
    """How to run `eager` or, compiled in a mode, `compiled(mode)`: whole in a CUDA graph where there is CUDA."""
    if args.device == "cpu":
        return [("compiled", lambda: timed(compiled("default")))] if compile_ else [("eager", lambda: timed(eager))]
    if not compile_:
        return [("eager in a CUDA graph", lambda: captured(eager)), ("eager", lambda: timed_on_gpu(eager))]
    return [
        ("compiled, in a CUDA graph", lambda: captured(compiled("default"))),
        ("compiled with reduce-overhead", lambda: timed_on_gpu(compiled("reduce-overhead"))),
        ("compiled", lambda: timed_on_gpu(compiled("default"))),
    ]


def captured(body):
    """Captures the body as PyTorch's notes on CUDA graphs say: warmed up on a side stream, which compiles, chooses
    algorithms, makes the optimizer's state and the scaler's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_STEPS):
            body()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = body()
    # What is captured reads and writes memory that the body and its result hold.
    return lambda seconds, _=(body, result): replays(graph, seconds)


def timed_on_gpu(body):
    """Seconds of a call in a row of calls, between events: the GPU does not wait for the host to look."""

    def some(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            body()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    some(WARM_STEPS)
    return lambda seconds: samples_of(lambda: some(CALLS_IN_A_ROW), seconds)


if __name__ == "__main__":
    main(__doc__, answer)
