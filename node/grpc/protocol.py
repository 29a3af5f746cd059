"""The door to protobuf: Milvus's messages and methods, made from the compiled protocol in `proto/`.

A descriptor set instead of generated modules: it needs no certain version of the library, and it lives in a pool of its
own, so that a process may load Milvus's client, which brings the same names, beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

Message = Any
"""A message, or the class of one; its fields are Milvus's."""
DAMAGED: Final = (DecodeError, UnicodeDecodeError)
"""What parsing raises when bytes are not the message that they should be."""
SERVICE: Final = "milvus.proto.milvus.MilvusService"


@dataclass(frozen=True)
class Shape:
    """What a method takes and gives: the classes of two messages."""

    request: Message
    response: Message


@cache
def _pool() -> Any:
    compiled = (Path(__file__).parent / "proto" / "milvus.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


@cache
def message(name: str) -> Message:
    """Return the class of a message: `message("schema.FieldData")`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"milvus.proto.{name}"))


@cache
def enum(name: str) -> Mapping[str, int]:
    """Return the numbers of an enum by their names: `enum("schema.DataType")`."""
    found = _pool().FindEnumTypeByName(f"milvus.proto.{name}")
    return {value.name: value.number for value in found.values}


@cache
def enum_names(name: str) -> Mapping[int, str]:
    """Return the names of an enum by their numbers."""
    return {number: text for text, number in enum(name).items()}


@cache
def methods() -> Mapping[str, Shape]:
    """Return the methods of Milvus's service that have one request and one response, by name."""
    return {
        one.name: Shape(
            message_factory.GetMessageClass(one.input_type), message_factory.GetMessageClass(one.output_type)
        )
        for one in _pool().FindServiceByName(SERVICE).methods
        if not (one.client_streaming or one.server_streaming)
    }
