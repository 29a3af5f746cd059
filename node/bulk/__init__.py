"""Bulk: files into collections and back, on the command line and as jobs of a node.

    sources    a file -> chunks of rows as columns, each at its place in the file, in bounded memory
    parquet    the same of Parquet, and its writing; the door to pyarrow's files
    schemas    a description of a collection -> the request that makes it again; a sample of rows -> a schema
    fitting    columns -> the columns of an insert; rows that do not fit, each with its reason
    partitions the column that names each row's partition, and making those that are missing
    remote     a node or cluster as a client sees it
    importing  files into a collection: batches in flight, what was rejected, and where to go on after a break
    exporting  a collection into a file, by primary key
    jobs       imports that a node does by itself
    jobs_anywhere  the same, told by any node of a cluster
    demo       the sample that ships with the project, loaded, searched and shown
    commands   the command line

Nothing is there twice after a break because each batch goes under a key (`node/keyed.py`) that follows from the import
and the place of its rows. So a batch may be sent as often as one likes, also by another process, while the shards
remember it; one that comes later than that is looked up by its primary keys before it is written.
"""
