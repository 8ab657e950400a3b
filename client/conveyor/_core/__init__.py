"""The SDK's protocol, without I/O, threads or clocks: both clients drive it, and every rule is a unit test.

Invariant: nothing here imports grpc's channels, asyncio, threading or time.
"""
