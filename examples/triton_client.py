"""NVIDIA's tritonclient against Conveyor: run `conveyor serve` and `python -m examples.quickstart` first.

Then `pip install 'tritonclient[grpc]'` and `python -m examples.triton_client [HOST:PORT]`. Three sequences are
interleaved on one stream; then the same steps go through Conveyor's own client, and the answers are compared.
"""

import queue
import sys

import conveyor
import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import triton_to_np_dtype

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
MODEL, STEPS = "tagger", 50
NAMES = ("kitchen", "garage", 7)  # a sequence's id is a string or a number; "7" would be another one than 7

with grpcclient.InferenceServerClient(target) as client:
    metadata = client.get_model_metadata(MODEL)
    given, made = metadata.inputs[0], metadata.outputs[0]
    row = given.shape[2:]  # behind the axes of batch and time
    x = np.random.default_rng(0).standard_normal((len(NAMES), STEPS, *row)).astype(triton_to_np_dtype(given.datatype))

    told: queue.Queue[tuple[grpcclient.InferResult, Exception | None]] = queue.Queue()
    client.start_stream(lambda result, error: told.put((result, error)))
    for step in range(STEPS):
        for index, name in enumerate(NAMES):
            tensor = grpcclient.InferInput(given.name, [1, *row], given.datatype)
            tensor.set_data_from_numpy(x[index, step : step + 1])
            client.async_stream_infer(
                MODEL,
                [tensor],
                request_id=str(index),
                sequence_id=name,
                sequence_start=step == 0,
                sequence_end=step == STEPS - 1,
            )
    answers: dict[str, list[np.ndarray]] = {}
    for _ in range(STEPS * len(NAMES)):
        result, error = told.get(timeout=60)
        if error is not None:
            raise SystemExit(f"{MODEL} answered an error: {error}")
        # Those of one sequence come in order; the request's id says of which.
        answers.setdefault(result.get_response().id, []).append(result.as_numpy(made.name))
    client.stop_stream()
    (statistics,) = client.get_inference_statistics(MODEL).model_stats

print(f"{MODEL} has answered {statistics.inference_count} steps in {statistics.execution_count} runs")
with conveyor.connect(target) as own:
    for index, name in enumerate(NAMES):
        with own.session(MODEL) as session:
            want = [session.step(step) for step in x[index]]
        difference = np.abs(np.concatenate(answers[str(index)]) - np.stack(want)).max()
        print(f"sequence {name!r}: {STEPS} steps, largest difference from Conveyor's own client {difference:.1e}")
