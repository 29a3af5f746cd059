"""DOOR to nmslib: the HNSW graph that an explicit HNSW index gets.

What nmslib does not do, and what is done about it here:

* ef belongs to the index, not to the search, and must not change while a search runs. So searches with the same ef run
  at once, and one that needs another waits for all to end (`_Turns`).
* It knows no filters. More candidates are fetched and the masked dropped, twice as many if these were too few, and
  then exact search takes over (`complete.py`).
* It saves to a file and loads from one, never memory; hence `tempfile`, the one place in this room that meets a disk.
  Nothing durable lives there.
* After a build it holds every row twice, once as given and once beside its links. A saved and loaded index holds it
  once, so each build ends with that.
* Its file holds the rows. They are cut out of a dump, as the caller keeps them anyway, and put back for loading.
* It cannot save what it has loaded (it writes no rows, and says nothing). So an index keeps its own dump, some 10 % of
  the rows at 384 dimensions.
* A running build cannot be stopped or watched: progress goes from 0 to 1.

It writes a hint about its build flags to file descriptor 2 when it is imported, below Python's reach.
"""

from __future__ import annotations

import logging
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import nmslib
import numpy as np
import numpy.typing as npt

from index.blob import pack, unpack
from index.complete import complete
from index.flat import squared_lengths
from index.metric import Metric
from index.protocol import BuildCancelled, Cancelled, Hits, IndexDamaged, Mask, Matrix, Offsets, Progress
from index.spec import IndexSpec, SearchParams

logging.getLogger("nmslib").setLevel(logging.ERROR)  # it tells every parameter of every call at INFO

_SPACES: Final = {Metric.L2: "l2", Metric.IP: "negdotprod", Metric.COSINE: "negdotprod"}
_KIND: Final = "nmslib HNSW"
_LINK_COST: Final = 1.5
"""Cost of following one link of a graph, in rows compared by exact search, which reads memory in order."""
_OVERFETCH: Final = 1.3
"""Candidates fetched for each that should pass a filter: a share is an average, and near a query it may be less."""
_SEARCHES_MAX: Final = 16
"""Searches of one index at once; more wait."""


def build_nmslib(
    spec: IndexSpec, vectors: Matrix, *, threads: int, progress: Progress, cancelled: Cancelled
) -> NmslibIndex:
    """Return a new index of one row or more. Raises BuildCancelled if told so before the graph is begun or after."""
    rows = len(vectors)
    if cancelled():
        raise BuildCancelled(0, rows)
    graph = _new_graph(spec.metric)
    graph.addDataPointBatch(vectors)
    graph.createIndex(
        {
            "M": spec.graph_degree,
            "efConstruction": min(int(spec.params["efConstruction"]), max(rows, spec.graph_degree)),
            "indexThreadQty": threads,
            "post": 0,  # no second pass over the graph: it doubles the build for a percent of recall
        }
    )
    if cancelled():
        raise BuildCancelled(rows, rows)
    image = _saved(graph)
    del graph  # before the copy is loaded, so that the rows are held thrice for no longer than need be
    dim = vectors.shape[1]
    blob = pack(_KIND, spec.metric, rows=rows, dim=dim, parts=_without_rows(image, vectors))
    index = NmslibIndex(spec, _loaded(spec.metric, image), vectors, blob, image_bytes=len(image))
    progress(1.0)
    return index


def load_nmslib(spec: IndexSpec, blob: bytes, vectors: Matrix) -> NmslibIndex:
    """Return the index that was dumped. Raises IndexDamaged if the blob is not one of these vectors."""
    rows, dim = vectors.shape
    head, links, tail = unpack(blob, _KIND, spec.metric, rows=rows, dim=dim, parts=3)
    image = _with_rows(head, links, tail, vectors)
    try:
        graph = _loaded(spec.metric, image)
    except Exception as error:  # nmslib throws what it likes
        raise IndexDamaged(str(error)) from error
    return NmslibIndex(spec, graph, vectors, blob, image_bytes=len(image))


class NmslibIndex:
    """An HNSW graph with its own copy of the rows, beside the given matrix."""

    def __init__(self, spec: IndexSpec, graph: Any, vectors: Matrix, blob: bytes, *, image_bytes: int) -> None:
        self._spec = spec
        self._graph = graph
        self._vectors = vectors
        self._blob = blob
        self._graph_bytes = image_bytes + len(blob)
        self._squares = None if spec.metric is Metric.COSINE else squared_lengths(vectors)
        self._turns = _Turns(graph)

    @property
    def spec(self) -> IndexSpec:
        return self._spec

    @property
    def rows(self) -> int:
        return len(self._vectors)

    @property
    def dim(self) -> int:
        return int(self._vectors.shape[1])

    @property
    def memory_bytes(self) -> int:
        return self._graph_bytes + (0 if self._squares is None else self._squares.nbytes)

    def search(self, queries: Matrix, k: int, *, params: SearchParams, mask: Mask | None = None) -> Hits:
        ef = params.ef_for(self._spec, k)
        degree = 2 * self._spec.graph_degree

        def cost(share: float) -> float:
            return _LINK_COST * degree * max(ef, _OVERFETCH * k) / share

        def find(some: Matrix, wanted: int, passing: Mask | None, share: float) -> Offsets:
            fetched = wanted if passing is None else min(self.rows, int(_OVERFETCH * wanted / share) + 8)
            # As wide a walk for each survivor as without a filter, or recall falls with the share.
            kept = int(ef / share)
            found = self._fetch(some, fetched, kept)
            if passing is None:
                return found
            while True:
                found[~_passes(found, passing)] = -1
                short = np.flatnonzero((found >= 0).sum(axis=1) < wanted)
                fetched = min(2 * fetched, self.rows)
                # Exact search, which serves those left short, is cheaper from here on.
                if len(short) == 0 or _LINK_COST * degree * fetched >= self.rows:
                    return found
                again = self._fetch(some[short], fetched, kept)
                found = np.pad(found, ((0, 0), (0, again.shape[1] - found.shape[1])), constant_values=-1)
                found[short] = again

        return complete(self, find, queries, k, params=params, mask=mask, cost=cost, squares=self._squares)

    def vectors(self) -> Matrix:
        return self._vectors

    def dump(self) -> bytes:
        return self._blob

    def _fetch(self, queries: Matrix, k: int, ef: int) -> Offsets:
        """Return (q, k) offsets found, -1 for none."""
        offsets = np.full((len(queries), k), -1, dtype=np.int64)
        with self._turns.at(min(max(ef, k), self.rows)):
            if len(queries) == 1:
                answers = [self._graph.knnQuery(queries[0], k=k)]
            else:
                answers = self._graph.knnQueryBatch(queries, k=k, num_threads=1)
        for line, (ids, _) in enumerate(answers):
            offsets[line, : len(ids)] = ids
        return offsets


class _Turns:
    """Lets searches of one ef run at once, and ef change only while none runs.

    Made of queues, which hand over between threads and need no clock: `_setting` holds the current ef and is taken by
    whoever decides, one at a time; `_places` holds a token for each search that may run. Changing ef takes them all.
    No deadlock: a search gives its token back without needing the setting.
    """

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._setting: SimpleQueue[int] = SimpleQueue()
        self._setting.put(0)
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_SEARCHES_MAX):
            self._places.put(None)

    @contextmanager
    def at(self, ef: int) -> Iterator[None]:
        """Hold a place to search with this ef."""
        current = self._setting.get()
        try:
            self._places.get()
            if current != ef:
                for _ in range(_SEARCHES_MAX - 1):
                    self._places.get()
                try:
                    self._graph.setQueryTimeParams({"ef": ef})
                    current = ef
                finally:
                    for _ in range(_SEARCHES_MAX - 1):
                        self._places.put(None)
        finally:
            self._setting.put(current)
        try:
            yield
        finally:
            self._places.put(None)


def _passes(offsets: Offsets, mask: Mask) -> Mask:
    passes: Mask = (offsets >= 0) & mask[offsets]
    return passes


def _new_graph(metric: Metric) -> Any:
    return nmslib.init(method="hnsw", space=_SPACES[metric])


def _saved(graph: Any) -> bytes:
    with tempfile.NamedTemporaryFile(prefix="annulus-") as file:
        graph.saveIndex(file.name, save_data=False)
        with open(file.name, "rb") as saved:  # by name: nmslib may have replaced the file
            return saved.read()


def _loaded(metric: Metric, image: bytes) -> Any:
    graph = _new_graph(metric)
    with tempfile.NamedTemporaryFile(prefix="annulus-") as file:
        file.write(image)
        file.flush()
        graph.loadIndex(file.name, load_data=False)
    return graph


class _Layout(NamedTuple):
    """The head of nmslib's file for a flat ("optimised") graph, as far as it is needed here.

    After the head follow `rows` objects of `object_bytes`: id, label and length (16 bytes), the row, the links of the
    lowest level; then the links of the upper levels.
    """

    flag: int
    rows: int
    object_bytes: int
    links_at: int
    object_at: int


_LAYOUT: Final = struct.Struct("<IIQQQ")
_HEAD_BYTES: Final = 68
_OBJECT_HEAD_BYTES: Final = 16


def _layout(head: bytes | memoryview, vectors: Matrix) -> _Layout:
    """Return the layout. Raises IndexDamaged if it is not that of a graph of these vectors."""
    rows, dim = vectors.shape
    if len(head) < _HEAD_BYTES:
        raise IndexDamaged("a graph without a head")
    layout = _Layout(*_LAYOUT.unpack_from(head))
    row_end = _OBJECT_HEAD_BYTES + 4 * dim
    if layout[:2] != (1, rows) or layout.links_at < row_end or layout.object_at != 0:
        raise IndexDamaged(f"a graph laid out as {layout}")
    return layout


def _without_rows(image: bytes, vectors: Matrix) -> list[bytes]:
    """Return head, objects without their rows, and tail of a saved graph. The rows are checked to be the vectors."""
    layout = _layout(image[:_HEAD_BYTES], vectors)
    objects, tail = _objects(image, layout)
    row = slice(_OBJECT_HEAD_BYTES, _OBJECT_HEAD_BYTES + 4 * vectors.shape[1])
    if not np.array_equal(objects[:, row], vectors.view(np.uint8)):
        raise IndexDamaged("the graph's rows are not those it was built of")
    return [image[:_HEAD_BYTES], np.delete(objects, row, axis=1).tobytes(), bytes(tail)]


def _with_rows(head: memoryview, links: memoryview, tail: memoryview, vectors: Matrix) -> bytes:
    """Return the saved graph that `_without_rows` took apart."""
    layout = _layout(head, vectors)
    rows, row_bytes = len(vectors), 4 * vectors.shape[1]
    if len(links) != rows * (layout.object_bytes - row_bytes):
        raise IndexDamaged(f"{len(links)} bytes of links for {rows} rows")
    kept = np.frombuffer(links, dtype=np.uint8).reshape(rows, -1)
    split = _OBJECT_HEAD_BYTES
    objects = np.concatenate([kept[:, :split], vectors.view(np.uint8), kept[:, split:]], axis=1)
    return b"".join((head, objects.tobytes(), tail))


def _objects(image: bytes, layout: _Layout) -> tuple[npt.NDArray[np.uint8], bytes]:
    end = _HEAD_BYTES + layout.rows * layout.object_bytes
    if end > len(image):
        raise IndexDamaged(f"a graph of {len(image)} bytes, its objects need {end}")
    objects = np.frombuffer(image, dtype=np.uint8, count=end - _HEAD_BYTES, offset=_HEAD_BYTES)
    return objects.reshape(layout.rows, layout.object_bytes), image[end:]
