"""What is measured, in this order. Each scenario adds rows to the run's results; those after `index` share its rows.

insert   every form of rows into an empty collection; acknowledged rows per second
mixed    the same while searches arrive at a fixed rate: their latency, and whether they were right
index    from the last insert to fully indexed, beside the engine's own build
size     memory at rest, disk before and after compaction
search   ef, connections, codec, beside the engine alone
filter   selectivities, beside exact search on the survivors
restart  from start to the first right answer, after SIGTERM and after SIGKILL
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tools.bench.reads import filtered, search
from tools.bench.rest import restart, size
from tools.bench.run import Bench
from tools.bench.writes import index, insert, mixed

SCENARIOS: Mapping[str, Callable[[Bench], None]] = {
    "insert": insert,
    "mixed": mixed,
    "index": index,
    "size": size,
    "search": search,
    "filter": filtered,
    "restart": restart,
}
