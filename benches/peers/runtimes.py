"""Times whole networks in the runtimes that people deploy with, from the ONNX file that depthshrinker exports.

The first line of --serve says which of them this Python has (`runtimes`, with their
versions) and which it lacks (`missing`, each with the reason). A question is a JSON
object: `runtime`, `file`, `batch` and `seconds`; its answer is the median throughput
in images per second, and a `note` on how the network ran. Inference only; PyTorch
is not needed.

Each runtime gets what depthshrinker has: as many threads, arithmetic in the file's
precision without TF32 or bf16 in f32's place, shapes that are known beforehand,
images and logits that lie on the device, and on CUDA a CUDA graph.
"""

import os
import time

# Before any library of NVIDIA is loaded: f32 is f32 here, as in the kernels that it is compared with.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import numpy as np

import serving
from serving import WARM_STEPS, first_that_runs, one_line, samples_of, throughput, timed

# Seconds that a row of runs on the GPU takes at least: what starting and awaiting it costs is little beside that.
ROW_SECONDS = 0.01
ATTEMPTS = 8  # where two rows took no longer than one


def openvino_version(args):
    import openvino

    # Without the build's number and branch.
    return openvino.__version__.split("-")[0]


def openvino(args, q):
    """OpenVINO on the CPU. It would take bf16 for f32 where the CPU has it, and leave out hardware threads."""
    import openvino

    core = openvino.Core()
    model = core.read_model(q["file"])
    model.reshape([q["batch"], *list(model.input(0).partial_shape)[1:]])
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": args.threads,
            "ENABLE_HYPER_THREADING": True,
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(images(list(compiled.input(0).shape))))
    hint, threads = (compiled.get_property(name) for name in ("INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS"))
    return timed(request.infer), f"CPU, {hint.to_string()}, {threads} threads"


def provider_version(provider):
    """Gives ONNX Runtime's version where it has this provider."""

    def version(args):
        import onnxruntime

        if provider not in onnxruntime.get_available_providers():
            raise LookupError(f"onnxruntime {onnxruntime.__version__} has no {provider}")
        return onnxruntime.__version__

    return version


def tensorrt_version(args):
    # Also loads its libraries for ONNX Runtime, which links to them.
    import tensorrt

    return f"{tensorrt.__version__} in onnxruntime {provider_version('TensorrtExecutionProvider')(args)}"


def onnxruntime_cpu(args, q):
    session, binding, _ = bound(args, q, ["CPUExecutionProvider"])
    return timed(lambda: session.run_with_iobinding(binding)), "CPUExecutionProvider"


def onnxruntime_cuda(**layout):
    """The CUDA provider, which picks its convolutions by trying all."""

    def prepare(args, q):
        def way(graph):
            return lambda: rows(*bound(args, q, [("CUDAExecutionProvider", common(args) | layout | {"enable_cuda_graph": graph})]))

        return first_that_runs([("CUDAExecutionProvider in a CUDA graph", way("1")), ("CUDAExecutionProvider", way("0"))])

    return prepare


def tensorrt(args, q):
    """TensorRT through its provider in ONNX Runtime; what it leaves, the CUDA provider takes."""
    tensorrt_version(args)
    half = "1" if args.precision == "f16" else "0"

    def way(graph):
        options = {"device_id": str(args.ordinal), "trt_fp16_enable": half, "trt_cuda_graph_enable": graph}
        cuda = ("CUDAExecutionProvider", common(args))
        return lambda: rows(*bound(args, q, [("TensorrtExecutionProvider", options), cuda]))

    return first_that_runs([("TensorrtExecutionProvider in a CUDA graph", way("1")), ("TensorrtExecutionProvider", way("0"))])


def common(args):
    return {"device_id": str(args.ordinal), "cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}


# On each device in the order of the rows: name, function for the version, function that prepares a network: it gives what
# times it for some seconds, and how it runs in words.
RUNTIMES = {
    "cpu": [
        ("onnxruntime", provider_version("CPUExecutionProvider"), onnxruntime_cpu),
        ("openvino", openvino_version, openvino),
    ],
    "cuda": [
        ("onnxruntime-cuda", provider_version("CUDAExecutionProvider"), onnxruntime_cuda()),
        ("onnxruntime-cuda-nhwc", provider_version("CUDAExecutionProvider"), onnxruntime_cuda(prefer_nhwc="1")),
        ("tensorrt", tensorrt_version, tensorrt),
    ],
}


def images(shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def bound(args, q, providers):
    """A session of ONNX Runtime, its images and logits bound to the device, and the options of a run."""
    import onnxruntime

    if args.device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        # Those of the PyTorch that it shares this Python with.
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", q["batch"])
    session = onnxruntime.InferenceSession(q["file"], options, providers=providers)
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if wanted not in session.get_providers():
        # It would go on with the next without an error.
        raise RuntimeError(f"{wanted} did not start, only {', '.join(session.get_providers())}")
    binding, place = session.io_binding(), (args.device, args.ordinal)
    (x,), (y,) = session.get_inputs(), session.get_outputs()
    values = images([q["batch"], *x.shape[1:]])
    binding.bind_ortvalue_input(x.name, onnxruntime.OrtValue.ortvalue_from_numpy(values, *place))
    logits = onnxruntime.OrtValue.ortvalue_from_shape_and_type([q["batch"], *y.shape[1:]], np.float32, *place)
    binding.bind_ortvalue_output(y.name, logits)
    run = onnxruntime.RunOptions()
    if args.device == "cuda":
        run.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return session, binding, run


def rows(session, binding, run):
    """What times a run on the GPU: a row of runs, awaited once, and one twice as long; the difference is the time of the runs
    without what starting and awaiting a row takes."""

    def seconds_of(count):
        start = time.perf_counter()
        for _ in range(count):
            session.run_with_iobinding(binding, run)
        binding.synchronize_outputs()
        return time.perf_counter() - start

    seconds_of(WARM_STEPS)
    count = max(1, round(ROW_SECONDS * WARM_STEPS / seconds_of(WARM_STEPS)))

    def once():
        for _ in range(ATTEMPTS):
            difference = seconds_of(2 * count) - seconds_of(count)
            if difference > 0:
                return difference / count
        raise RuntimeError(f"{ATTEMPTS} times, doing work twice took no longer than once")

    return lambda seconds: samples_of(once, seconds)


def about(args):
    """Which runtimes there are, and why each of the others is not; said once, before the first answer."""
    found, missing = [], []
    for name, version, _ in RUNTIMES[args.device]:
        try:
            found.append({"runtime": name, "version": version(args)})
        except Exception as e:
            missing.append({"runtime": name, "reason": one_line(e)})
    threads = {"threads": args.threads, "device": args.device, "precision": args.precision}
    return threads | {"runtimes": found, "missing": missing}


class Last:
    """The network asked for last: asked again in the next turn, what took long to build is kept."""

    key, prepared = None, None


def answer(args, q):
    key = (q["runtime"], q["file"], q["batch"])
    if key != Last.key:
        Last.key = Last.prepared = None
        prepare = next(prepare for name, _, prepare in RUNTIMES[args.device] if name == q["runtime"])
        Last.prepared = prepare(args, q)
        Last.key = key
    run, note = Last.prepared
    return throughput(q["batch"], run(q.get("seconds", args.seconds))) | {"note": note}


def usable(args):
    """Whether the GPU still takes and gives memory; one that a kernel has lost does not."""
    import onnxruntime

    try:
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), args.device, args.ordinal).numpy()
        return True
    except Exception:
        return False


if __name__ == "__main__":
    args = serving.parsed(__doc__, ["f32", "f16", "bf16"], "cpu", os.cpu_count())
    serving.run(args, about, answer, usable)
