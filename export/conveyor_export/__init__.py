"""From a trained torch.nn.Module to a step model in ONNX with explicit state."""
