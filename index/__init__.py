"""Vectors only: matrices in, offsets and distances out.

This room knows nothing of schemas, segments, primary keys or time. It is given a matrix and answers which of its rows
are nearest to a query. Whoever calls it has checked the numbers, and turned deletes, visibility and filters into one
mask.

**Words.** A *row* is a line of the matrix and an *offset* its number. A *distance* is smaller for the nearer row under
every metric: L2 is the squared Euclidean distance, IP is the negated inner product, COSINE the negated inner product of
unit vectors (the caller normalises both sides, `Metric.normalise`). A *score* is what the API shows; `Metric.scores`
is the only bridge. *Hits* are q lines of k offsets and distances, nearest first, padded with -1 and +inf.

**Ties** go to the lower offset, and merged parts to the earlier part. Exact search keeps this to the last bit on every
processor, because it computes the distances of its candidates row by row in float64 (`flat.py` says how): equal rows
are equally far. Replicas therefore agree on every exact answer. Approximate engines order what they found the same way,
and agree on everything but what one of them overlooked.

**Always min(k, survivors).** A search never returns fewer rows than asked for while there are any that the mask lets
through. Graphs do lose their way when few rows pass, so each engine counts, and what is missing is searched exactly
(`complete.py`).

**Engines**, one door for each library:

| index type | engine (module)                          | holds                    | a filter is      | at once        |
|------------|------------------------------------------|--------------------------|------------------|----------------|
| FLAT       | numpy (`flat.py`)                        | the given matrix         | in the search    | any            |
| HNSW       | nmslib (`hnsw.py`), or faiss by `engine` | graph, rows, given rows  | fetch and drop   | of the same ef |
| AUTOINDEX  | faiss HNSW (`faiss_engine.py`)           | graph, rows              | in the search    | any            |
| HNSW_SQ    | faiss HNSW over 8-bit rows               | graph, codes, given rows | in the search    | any            |
| IVF_FLAT   | faiss inverted lists                     | lists, given rows        | in the search    | any            |
| IVF_SQ8    | faiss inverted lists of 8-bit rows       | codes, given rows        | in the search    | any            |

No index writes the rows to disk a second time: `dump` leaves them out and `load` is handed them.

Flow: `spec.py` turns names and parameters into an `IndexSpec`, `engines.py` builds or loads it, the result is a
`VectorIndex` (`protocol.py`); `topk.py` merges the hits of several.

**Threads.** An index is immutable: build and load return a new one, any number of threads search it. All engines
release the GIL while they search and build.
"""
