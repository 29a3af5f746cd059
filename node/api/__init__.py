"""The HTTP surface: Milvus's RESTful API v2, in JSON and CBOR, over the one service layer.

    server       the application; ids, time limits, body limits, metrics, what a failure looks like
    routes       every route and its request's shape, as one table
    requests     a body, by its shape, into checked values
    exact        JSON read without loss
    rows         the rows of an insert into a batch of columns;  values: one field of them
    collections  handlers of databases, collections, partitions, indexes, aliases;  schemas: their translation
    entities     handlers of insert, upsert, delete, get, query, search
    replies      results into bodies
    faults       errors into codes and statuses
    openapi      the table of routes as a description

A request goes server -> requests -> handler -> service and back through replies or faults. Handlers are thin: they
translate, the service decides. Nothing here holds state but counters of what is running.
"""
