"""What all scripts that depthshrinker starts as peers share: their options, the protocol, and the clock on the host.

With --serve a line of JSON on standard input is a question, and a line on standard output its answer, under the
question's `id`. The first line, `id` 0, says who answers. Needs nothing but Python.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import time

MIN_SAMPLES = 5
# Calls before any that counts: algorithms are chosen, code is compiled, graphs are recorded.
WARM_STEPS = 4


def parsed(description, precisions, device, threads):
    """The options, of which `device` and `threads` are defaults."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("questions", nargs="?", help="JSON file with the questions, default standard input")
    p.add_argument("--serve", action="store_true", help="answer each line of standard input with one line")
    p.add_argument("--device", default=device, help="cpu, cuda or cuda:N")
    p.add_argument("--precision", choices=precisions, default="f32")
    p.add_argument("--threads", type=int, default=threads)
    p.add_argument("--seconds", type=float, default=0.2, help="measuring time of a question that names none")
    args = p.parse_args()
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", args.device)
    if not found:
        p.error(f"device {args.device!r}; expected cpu, cuda or cuda:N")
    # Which GPU is set once; from then on `cuda` is that one.
    args.ordinal, args.device = int(found[1] or 0), args.device.split(":")[0]
    return args


def run(args, about, answer, usable):
    """Answers a file's questions, or line by line as long as the device is `usable`."""
    if args.serve:
        serve(args, about, answer, usable)
        return
    text = open(args.questions).read() if args.questions else sys.stdin.read()
    questions = json.loads(text)
    questions = questions.get("layers", [questions]) if isinstance(questions, dict) else questions
    print(json.dumps({"about": about(args), "answers": [q | attempt(answer, args, q) for q in questions]}, indent=1))


def serve(args, about, answer, usable):
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
        found = attempt(answer, args, question)
        if args.device == "cpu":
            rest()
        say(question["id"], found)
        if args.device == "cuda" and not usable(args):
            # Whoever asks starts another.
            sys.exit("the GPU is lost to this process")


def rest():
    """Waits until this process's threads have stopped, a second at most. Those of ONNX Runtime look for more work for 40 ms
    after a run, on the cores that whoever asked measures on next."""
    for _ in range(20):
        begun = time.process_time()
        time.sleep(0.05)
        if time.process_time() - begun < 0.002:
            break


def attempt(answer, args, question):
    """The answer, or why there is none; given up after `limit` seconds, as soon as Python is reached."""

    def give_up(*_):
        raise TimeoutError(f"not done within {question['limit']:.0f} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, question.get("limit", 0))
    try:
        return answer(args, question)
    except Exception as e:
        return {"error": one_line(e)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def one_line(e):
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"


def first_that_runs(ways, after_failure=lambda: None):
    """What the first way that runs here gives, and how it runs: (description, function) of each, fastest first."""
    failures = []
    for name, way in ways:
        try:
            return way(), "; ".join([name, *failures])
        except TimeoutError:
            raise
        except Exception as e:
            failures.append(f"{name} failed: {one_line(e)}")
            after_failure()
    raise RuntimeError("; ".join(failures))


def samples_of(once, seconds):
    """What `once` returns, again and again for so long."""
    samples, begun = [], time.perf_counter()
    while len(samples) < MIN_SAMPLES or time.perf_counter() - begun < seconds:
        samples.append(once())
    return samples


def timed(body):
    """What times every call of `body` on the host, once it is warm."""

    def once():
        start = time.perf_counter()
        body()
        return time.perf_counter() - start

    for _ in range(WARM_STEPS):
        body()
    return lambda seconds: samples_of(once, seconds)


def throughput(batch, seconds):
    """The answer that a network's times make."""
    rates = [batch / s for s in seconds]
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return {"images_per_s": middle, "iqr": high - low, "samples": len(rates)}
