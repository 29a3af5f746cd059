"""Milvus's gRPC interface over the one service layer, for Milvus's own clients.

    server       the gRPC server; ids, time limits, bounds, metrics, what a failure looks like
    methods      every method of Milvus's service, as one table: which handler serves it, or why it is refused
    calls        what a handler gets
    operations   handlers of the server itself, flushing, compaction, segments
    collections  handlers of databases, collections, partitions, indexes, aliases;  schemas: their translation
    entities     handlers of rows and searches;  columns: FieldData to columns and back
    status       errors into Milvus's Status
    protocol     the messages, made from the compiled protocol in `proto/`

A request goes server -> handler -> service and back, as in `node.api`. Handlers put it into the words of the REST API
and have it judged by what judges it there, so that both interfaces take, refuse and answer the same.

**One port.** Milvus's users expect gRPC and REST on 19530. The gRPC server owns its connections and cannot be handed
one, so it listens on a socket in the file system, and the node's listener passes on to it the connections that begin
with HTTP/2's preface (`node/tunnel.py`). Measured on two cores with an empty method: 60 to 80 us of CPU and 0.08 ms for
a small request, 0.5 ms of CPU for each megabyte, which is a tenth of what the call costs without it. What a
connection is secured by ends at the listener, so gRPC is never less secure than HTTP.

**Messages.** No package on the index has Milvus's protocol but its client, which brings pandas along; so the public
protocol is here, compiled to a descriptor set rather than to modules, which need no generator's version and would clash
with the client's own in one process. Numbers in a message are an array of numpy's liking: 384,000 floats of an insert
take 0.07 ms, where reading them one by one takes 26.

Only `server` imports grpcio and only `protocol` protobuf. The simulation loads neither.
"""
