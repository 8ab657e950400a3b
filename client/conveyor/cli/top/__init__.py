"""`conveyor top`: what servers are doing, over and over in a terminal, or once for a script.

Invariant: it only reads. What is shown is made of two samples by plain functions; the terminal and the network are at
the two ends of them.
"""
