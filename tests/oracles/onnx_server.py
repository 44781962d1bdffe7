"""ONNX Runtime as the oracle of tests/onnx: checks and runs models until its input ends.

A request is one line of JSON, {"model": path, "input": path of f32 NCHW numbers, "shapes": [[n, c, h, w], ...],
"reference": bool}: the numbers are cut into one batch per shape; "reference" asks for ONNX's own reference evaluator, in
which every value has the type that the file says. The answer is one line, {"logits": [[...] per batch], null where one is
not finite, "operators": [...], "initializers": [in f32, in f16], "subnormals": numbers in these that are subnormal} or
{"error": text}.
"""

import json
import math
import sys

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference
import onnxruntime

OPTIONS = onnxruntime.SessionOptions()
OPTIONS.intra_op_num_threads = 1
OPTIONS.log_severity_level = 3
TYPES = [np.float32, np.float16]


def evaluator(path, reference):
    if reference:
        return onnx.reference.ReferenceEvaluator(path).run
    return onnxruntime.InferenceSession(path, OPTIONS, providers=["CPUExecutionProvider"]).run


def subnormal(array):
    return int(np.count_nonzero((array != 0) & (np.abs(array) < np.finfo(array.dtype).tiny)))


def answer(request):
    onnx.checker.check_model(request["model"], full_check=True)
    graph = onnx.load(request["model"]).graph
    initializers = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer]
    of_type = [[array for array in initializers if array.dtype == dtype] for dtype in TYPES]
    run = evaluator(request["model"], request["reference"])
    numbers = np.fromfile(request["input"], dtype="<f4")
    logits, start = [], 0
    for shape in request["shapes"]:
        end = start + math.prod(shape)
        (out,) = run(["logits"], {"input": numbers[start:end].reshape(shape)})
        assert out.dtype == np.float32 and out.shape[0] == shape[0] and out.ndim == 2, (out.dtype, out.shape)
        logits.append([float(x) if np.isfinite(x) else None for x in out.reshape(-1)])
        start = end
    return {
        "logits": logits,
        "operators": [node.op_type for node in graph.node],
        "initializers": [len(arrays) for arrays in of_type],
        "subnormals": [sum(subnormal(array) for array in arrays) for arrays in of_type],
    }


for line in sys.stdin:
    try:
        reply = answer(json.loads(line))
    except Exception as error:
        reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    print(json.dumps(reply), flush=True)
