"""A load generator for Conveyor: it speaks HTTP/2 by itself, so that one core of a client can load one of a server.

load = Load("127.0.0.1:50051", LoadSpec(model="charlm", sessions=256, streams=256, connections=8))
load.open()
result = load.run(1.0)
print(result.steps_per_s, result.latency.percentiles())
load.close()
"""

from conveyor.bench.histogram import Histogram, Percentiles
from conveyor.bench.load import Load
from conveyor.bench.result import LoadResult
from conveyor.bench.spec import LoadError, LoadSpec, Pattern

__all__ = ["Histogram", "Load", "LoadError", "LoadResult", "LoadSpec", "Pattern", "Percentiles"]
