"""ONNX Runtime as the oracle of tests/onnx.rs: checks and runs models until its input ends.

A request is one line of JSON, {"model": path, "input": path of f32 NCHW numbers, "shapes": [[n, c, h, w], ...]}: the
numbers are cut into one batch per shape. The answer is one line, {"logits": [[...] per batch], "operators": [...]} or
{"error": text}.
"""

import json
import math
import sys

import numpy as np
import onnx
import onnxruntime

OPTIONS = onnxruntime.SessionOptions()
OPTIONS.intra_op_num_threads = 1
OPTIONS.log_severity_level = 3


def answer(request):
    onnx.checker.check_model(request["model"], full_check=True)
    operators = [node.op_type for node in onnx.load(request["model"]).graph.node]
    session = onnxruntime.InferenceSession(request["model"], OPTIONS, providers=["CPUExecutionProvider"])
    numbers = np.fromfile(request["input"], dtype="<f4")
    logits, start = [], 0
    for shape in request["shapes"]:
        end = start + math.prod(shape)
        (out,) = session.run(["logits"], {"input": numbers[start:end].reshape(shape)})
        assert out.dtype == np.float32 and out.shape[0] == shape[0] and out.ndim == 2, (out.dtype, out.shape)
        logits.append(out.reshape(-1).astype(float).tolist())
        start = end
    return {"logits": logits, "operators": operators}


for line in sys.stdin:
    try:
        reply = answer(json.loads(line))
    except Exception as error:
        reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    print(json.dumps(reply), flush=True)
