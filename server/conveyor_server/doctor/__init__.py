"""`conveyor doctor`: looks at all that a server needs before it is started, and says what to fix.

Invariant: it takes what `conveyor serve` takes, starts nothing, and leaves a server that runs as it is: it makes no
file, takes no session, and what it writes to a store to see that it can is gone a moment later.
"""
