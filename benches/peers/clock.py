"""What layers.py and networks.py share of PyTorch: the clock, the device's state and its peaks.

On CUDA work is captured some dozens of times into a CUDA graph, each time over
another set of operands and results so that none stays in the L2 cache. Events time
one replay, then two in a row; the difference is one replay without what starting it
takes. On the CPU each call is timed. depthshrinker times its own kernels alike.
"""

import statistics
import time

import torch

import serving
from serving import MIN_SAMPLES, samples_of

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MIN_LAUNCHES = 24
WARM_UP = 2
ATTEMPTS = 8  # where two replays took no longer than one


def about(args):
    """What is compared with; said once, before the first answer."""
    line = {"framework": "pytorch", "version": torch.__version__, "device": args.device, "precision": args.precision}
    if args.device == "cuda":
        if torch.cuda.device_count() <= args.ordinal:
            raise RuntimeError(f"this PyTorch sees no cuda:{args.ordinal}")
        torch.cuda.set_device(args.ordinal)
        line |= {"gpu": torch.cuda.get_device_name(), "ordinal": args.ordinal}
        line |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    flags = {"cudnn.benchmark": True, "allow_tf32": False, "deterministic": False, "channels_last": True}
    return line | {"threads": torch.get_num_threads(), "flags": flags}


def prepare(args):
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    # f32 is f32 here, as in the kernels it is compared with.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)


def main(description, answer):
    device, threads = "cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads()
    args = serving.parsed(description, DTYPES, device, threads)
    prepare(args)

    def answer_or_peaks(args, question):
        if question.get("name") == "peaks":
            return peaks(args, question.get("seconds", args.seconds))
        return answer(args, question)

    serving.run(args, about, answer_or_peaks, usable)


def usable(_args):
    try:
        torch.cuda.synchronize()
        # The other process needs the memory next.
        torch.cuda.empty_cache()
        return True
    except Exception:
        return False


def sample(device, body, sets, seconds):
    """Seconds of each of several runs of `body(i)`, i counting through the sets.

    The result of every set is held until that set's next run: memory that is freed
    at once is what the next run would be given, still in the cache.
    """
    held = [None] * sets

    def run(i):
        held[i % sets] = body(i % sets)

    if device == "cpu":
        for i in range(WARM_UP):
            run(i)
        samples, start, i = [], time.perf_counter(), 0
        while len(samples) < MIN_SAMPLES or time.perf_counter() - start < seconds:
            i += 1
            before = time.perf_counter()
            run(i)
            samples.append(time.perf_counter() - before)
        return samples
    # Algorithms are chosen and libraries loaded before anything is captured, on a stream that may be captured.
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(max(3, min(sets, 4))):
            run(i)
    torch.cuda.synchronize()
    held[:] = [None] * sets
    launches = -(-MIN_LAUNCHES // sets) * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(launches):
            run(i)
    return [s / launches for s in replays(graph, seconds)]


def replays(graph, seconds):
    """Seconds of one replay: two in a row less one alone."""

    def timed(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def once():
        for _ in range(ATTEMPTS):
            one = timed(1)
            difference = timed(2) - one
            if difference > 0:
                return difference
        raise RuntimeError(f"{ATTEMPTS} times, doing work twice took no longer than once")

    for _ in range(WARM_UP):
        once()
    return samples_of(once, seconds)


def summary(samples):
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"time_us": middle * 1e6, "iqr_us": (high - low) * 1e6, "samples": len(samples)}


def peaks(args, seconds):
    """Bytes per second of a large copy (read and written counted) and FLOP per second of a large product."""
    device, dtype = args.device, DTYPES[args.precision]
    elements = (1 << 26) if device == "cuda" else (1 << 24)
    a, b = torch.randn(elements, device=device), torch.empty(elements, device=device)
    n = 8192 if device == "cuda" else 1024
    x, y = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    z = torch.empty(n, n, device=device, dtype=dtype)
    product = min(sample(device, lambda _: torch.mm(x, y, out=z), 1, seconds))
    # Second, when the clock has risen.
    copy = min(sample(device, lambda _: b.copy_(a), 1, seconds))
    return {"copy_bytes_per_s": 2 * 4 * elements / copy, "gemm_flops_per_s": 2 * n**3 / product}
