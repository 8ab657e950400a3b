"""Generated stubs of conveyor.v1, the one tensor codec, the errors on the wire and the model description."""
