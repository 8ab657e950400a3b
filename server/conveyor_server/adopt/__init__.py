"""`conveyor adopt`: describes an ONNX file that Conveyor did not export, and proves what it says before it writes it.

Invariant: what the graph, its names and the command line do not settle is asked, and never guessed.
"""
