"""The blocking client: the asynchronous one, driven without an event loop.

Invariant: no rule lives here. Each method drives its namesake, whose primitives block (see `_io`); any thread may call.
"""
