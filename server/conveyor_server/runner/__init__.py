"""Runs step models over a slab of state rows. The only floor that imports onnxruntime."""

import os

# onnxruntime reads it when it is imported, and everything that imports it lies below this package.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
