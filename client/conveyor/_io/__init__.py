"""What drives the core: one interface, with threads and with asyncio.

Invariant: the client's logic is written once, as coroutines over `Io`. Under asyncio they suspend as usual; under
threads each primitive blocks instead, so a coroutine runs to its end at its first `send` (see `drive`).
"""
