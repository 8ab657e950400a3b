"""What a server tells of its services to whoever asks by reflection.

Their messages live in more than one descriptor pool (see conveyor_proto.inference.pool), and reflection asks one.
"""

from collections.abc import Iterable

from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool


def descriptors(services: Iterable[ServiceDescriptor]) -> DescriptorPool:
    """A pool with the files of services, from whatever pools they are, and what these files import."""
    pool = DescriptorPool()
    known: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in known:
            return
        known.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        proto = FileDescriptorProto()
        file.CopyToProto(proto)
        pool.Add(proto)

    for service in services:
        add(service.file)
    return pool
