"""Runs step models over a slab of state rows. The only floor that imports onnxruntime."""
