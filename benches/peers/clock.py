"""What layers.py and networks.py share: the clock, the device's state, and answering questions line by line.

On CUDA work is captured some dozens of times into a CUDA graph, each time over
another set of operands so that none stays in the L2 cache, and replays are timed
with events, as depthshrinker times its own kernels. On the CPU each call is timed.
"""

import argparse
import json
import statistics
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CACHES = 3  # all sets of operands together are so much larger than the cache
HOST_CACHE_BYTES = 64 << 20
MAX_HOST_BYTES = 512 << 20
MAX_SETS = 64
MIN_LAUNCHES = 24
MIN_SAMPLES = 5


def options(description):
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("questions", nargs="?", help="JSON file with the questions, default standard input")
    p.add_argument("--serve", action="store_true", help="answer each line of standard input with one line")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=DTYPES, default="f32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seconds", type=float, default=0.2, help="measuring time of a question that names none")
    return p


def about(args):
    """What is compared with; said once, before the first answer."""
    line = {"framework": "pytorch", "version": torch.__version__, "device": args.device, "precision": args.precision}
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("this PyTorch sees no CUDA device")
        line |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
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
    args = options(description).parse_args()
    prepare(args)
    if args.serve:
        serve(args, answer)
        return
    text = open(args.questions).read() if args.questions else sys.stdin.read()
    questions = json.loads(text)
    questions = questions.get("layers", [questions]) if isinstance(questions, dict) else questions
    print(json.dumps({"about": about(args), "answers": [q | attempt(answer, args, q) for q in questions]}, indent=1))


def serve(args, answer):
    def say(line):
        print(json.dumps(line), flush=True)

    try:
        say(about(args))
    except Exception as e:
        return say({"error": one_line(e)})
    for line in sys.stdin:
        say(attempt(answer, args, json.loads(line)))


def attempt(answer, args, question):
    try:
        result = answer(args, question)
    except Exception as e:
        result = {"error": one_line(e)}
    if args.device == "cuda":
        # The other process needs the memory next.
        torch.cuda.empty_cache()
    return result


def one_line(e):
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"


def rotation(device, bytes_):
    """How many sets of operands of so many bytes each to rotate through."""
    if device == "cpu":
        return max(1, min(-(-CACHES * HOST_CACHE_BYTES // bytes_), MAX_SETS, MAX_HOST_BYTES // bytes_))
    free, _ = torch.cuda.mem_get_info()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(max(4, -(-CACHES * l2 // bytes_)), MAX_SETS, free // 4 // bytes_))


def sample(device, body, sets, seconds):
    """Seconds of each of several runs of `body(i)`, i counting through the sets."""
    if device == "cpu":
        body(0)
        samples, start, i = [], time.perf_counter(), 0
        while len(samples) < MIN_SAMPLES or time.perf_counter() - start < seconds:
            i = (i + 1) % sets
            before = time.perf_counter()
            body(i)
            samples.append(time.perf_counter() - before)
        return samples
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(max(3, min(sets, 4))):
            body(i % sets)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    launches = -(-MIN_LAUNCHES // sets) * sets
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            body(i % sets)
    return [s / launches for s in replays(graph, seconds)]


def replays(graph, seconds):
    def replay():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    replay()
    samples, begun = [], time.perf_counter()
    while len(samples) < MIN_SAMPLES or time.perf_counter() - begun < seconds:
        samples.append(replay())
    return samples


def summary(samples):
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"time_us": middle * 1e6, "iqr_us": (high - low) * 1e6, "samples": len(samples)}
