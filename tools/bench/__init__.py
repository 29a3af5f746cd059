"""How fast a node is, how right, and how large: measured from outside, beside the engine alone, on real vectors.

    python -m tools.bench --data vectors.npy --rows 50000 --out run.bench.json
    python -m tools.bench --data base.npy --only insert,search --peer chroma --peer-python /tmp/peers/venv/bin/python

How the numbers are made
  * Requests are serialised before the clock starts and replies are parsed after it has stopped; in between one process
    (`load`) moves bytes for all connections. On two cores a client that parses would measure itself.
  * Closed loop for throughput: each connection sends when its reply has come. At a fixed rate (`rate`), latency counts
    from the moment a request was due, so a stalled node cannot hide the requests that it kept from being sent.
  * Truth is computed here, with plain numpy (`truth`), over exactly the rows that may be seen. A hit counts when its
    true score reaches that of the true k-th row, so equal vectors cost no recall.
  * What a figure is compared with is measured in the same run on the same cores: the engine alone in a process of its
    own (`engine`), exact search in numpy, and other databases' servers (`peers`).
  * Ratios are held against `goals`; absolute figures are orientation, because machines differ and this one is noisy.

Who does what: `data` rows and queries; `truth` exact answers and recall; `wire` requests as bytes; `load` the
generator, `loading` its reader; `node` the process under test; `engine` the index room by itself; `run` one run,
`scenarios` what is measured in it (`writes`, `reads`, `rest`); `freshness` whether reads beside writes were right;
`peers` the others; `goals` what is wanted; `report` table and JSON.
"""
