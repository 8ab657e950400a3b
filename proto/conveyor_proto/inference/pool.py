"""The descriptor pool of the Open Inference Protocol's messages: their names are others' too, in the default one.

Generated stubs take it where they would take google.protobuf.descriptor_pool.
"""

from google.protobuf import descriptor_pool

_POOL = descriptor_pool.DescriptorPool()


def Default() -> descriptor_pool.DescriptorPool:  # noqa: N802 - the name that generated code calls
    """The pool."""
    return _POOL
