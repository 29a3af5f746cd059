"""Milvus's gRPC interface over the one service layer, for Milvus's own clients.

    server       ids, time limits, bounds, metrics, what a failure looks like
    http2        a client's connection: requests whole, answers as fast as they are taken;  frames: HTTP/2's rules
    late         all of it, imported for the first client
    methods      every method of Milvus's service, as one table: which handler serves it, or why it is refused
    calls        what a handler gets
    operations   handlers of the server itself, flushing, compaction, segments
    collections  handlers of databases, collections, partitions, indexes, aliases;  schemas: their translation
    entities     handlers of rows and searches;  columns: FieldData to columns and back
    status       errors into Milvus's Status
    protocol     the messages, made from the compiled protocol in `proto/`

A request goes server -> handler -> service and back, as in `node.api`. Handlers put it into the words of the REST API
and have it judged by what judges it there, so that both interfaces take, refuse and answer the same.

**One port.** Milvus's users expect gRPC and REST on 19530. gRPC's connections begin with HTTP/2's preface and HTTP's do
not; so the node's listener tells them apart and keeps both (`node/connections.py`), and what a connection is secured by
is the same for both. grpcio's server can only listen itself: behind a tunnel from the one port, with its own threads
waking the loop several times a call, it took 0.7 ms of CPU of a call and the tunnel 0.1 ms more. Here a call is decoded
and answered on the loop where its bytes arrive, in 0.2 ms. HTTP/2's rules are few where answers push nothing and
compress no headers, and h2, which keeps all of them, takes more of a search than these.

**Messages.** No package on the index has Milvus's protocol but its client, which brings pandas along; so the public
protocol is here, compiled to a descriptor set rather than to modules, which need no generator's version and would clash
with the client's own in one process. Numbers in a message are an array of numpy's liking: 384,000 floats of an insert
take 0.07 ms, where reading them one by one takes 26.

Only `frames` imports hpack and only `protocol` protobuf. The simulation loads neither.
"""
