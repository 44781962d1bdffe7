"""What layers.py and networks.py share: the clock, the device's state, its peaks, and answering questions line by line.

On CUDA work is captured some dozens of times into a CUDA graph, each time over
another set of operands and results so that none stays in the L2 cache. Events time
one replay, then two in a row; the difference is one replay without what starting it
takes. On the CPU each call is timed. depthshrinker times its own kernels alike.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MIN_LAUNCHES = 24
MIN_SAMPLES = 5
WARM_UP = 2
ATTEMPTS = 8  # where two replays took no longer than one


def options(description):
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("questions", nargs="?", help="JSON file with the questions, default standard input")
    p.add_argument("--serve", action="store_true", help="answer each line of standard input with one line")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    p.add_argument("--precision", choices=DTYPES, default="f32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seconds", type=float, default=0.2, help="measuring time of a question that names none")
    return p


def parsed(description):
    p = options(description)
    args = p.parse_args()
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", args.device)
    if not found:
        p.error(f"device {args.device!r}; expected cpu, cuda or cuda:N")
    # Which GPU is set once; from then on `cuda` is that one.
    args.ordinal, args.device = int(found[1] or 0), args.device.split(":")[0]
    return args


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
    args = parsed(description)
    prepare(args)
    if args.serve:
        serve(args, answer)
        return
    text = open(args.questions).read() if args.questions else sys.stdin.read()
    questions = json.loads(text)
    questions = questions.get("layers", [questions]) if isinstance(questions, dict) else questions
    print(json.dumps({"about": about(args), "answers": [q | attempt(answer, args, q) for q in questions]}, indent=1))


def serve(args, answer):
    # Answers have a way of their own: what a library prints goes to standard error, from Python or from C.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(id_, line):
        print(json.dumps({"id": id_} | line), file=answers, flush=True)

    try:
        say(0, about(args))
    except Exception as e:
        return say(0, {"error": one_line(e)})
    for line in sys.stdin:
        question = json.loads(line)
        say(question["id"], attempt(answer, args, question))
        if args.device == "cuda" and not usable():
            # Whoever asks starts another.
            sys.exit("the GPU is lost to this process")


def usable():
    try:
        torch.cuda.synchronize()
        # The other process needs the memory next.
        torch.cuda.empty_cache()
        return True
    except Exception:
        return False


def attempt(answer, args, question):
    """The answer, or why there is none; given up after `limit` seconds, as soon as Python is reached."""

    def give_up(*_):
        raise TimeoutError(f"not done within {question['limit']:.0f} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, question.get("limit", 0))
    try:
        if question.get("name") == "peaks":
            return peaks(args, question.get("seconds", args.seconds))
        return answer(args, question)
    except Exception as e:
        return {"error": one_line(e)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def one_line(e):
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"


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
    samples, begun = [], time.perf_counter()
    while len(samples) < MIN_SAMPLES or time.perf_counter() - begun < seconds:
        samples.append(once())
    return samples


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
