"""What an index is to be: a request held against the schema, with its defaults."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cluster.catalog import IndexDef
from index.metric import Metric
from index.protocol import Form
from index.spec import IndexSpec, SpecError, UnsupportedIndexType, UnsupportedMetric, parse_index_spec
from node.service import IndexRequest
from storage.errors import InvalidParameter, MissingParameter
from storage.scalar_index import SPEC_KEY, parse_scalar_index
from storage.schema import CollectionSchema, FieldSchema, check_name
from storage.types import IndexId


def index_def(schema: CollectionSchema, request: IndexRequest) -> IndexDef:
    """Return the index that is asked for, if the schema can have it. Raises BadRequest."""
    target: FieldSchema | None = schema.by_name.get(request.field_name)
    if target is None and schema.dynamic is not None and "json_cast_type" in request.params:
        target = schema.dynamic  # of which the name is a key
        request = replace(request, params={"json_path": request.field_name, **request.params})
    if target is None:
        raise MissingParameter(f"missing required parameters, error: `{request.field_name}` hasn't defined in schema")
    if not target.type.is_vector:
        scalar = parse_scalar_index(request.index_type, target, request.params)
        return IndexDef(
            IndexId(0), _index_name(request), target.id, target.name, scalar[SPEC_KEY], "", scalar, _shown(request)
        )
    try:
        form = target.type.form
        default = Metric.BM25 if target.id in schema.computed else None
        spec: IndexSpec = parse_index_spec(
            request.index_type, request.metric_type, request.params, default_metric=default, form=form
        )
    except UnsupportedMetric as error:
        words = f"{form} vector index does not support metric type"
        if form is Form.SPARSE:
            words = "only IP&BM25 is the supported metric type for sparse index"
        raise InvalidParameter(f"{words}: {error}, field {target.name}") from error
    except UnsupportedIndexType as error:
        raise InvalidParameter(f"field {target.name} of type {target.type}: {error}") from error
    except SpecError as error:
        raise InvalidParameter(f"invalid index params: {error}") from error
    if (spec.metric is Metric.BM25) != (target.id in schema.computed):
        raise InvalidParameter(
            f"index metric type {spec.metric} does not go with field {target.name}: only BM25 metric type is "
            "supported for BM25 function output field, and for no other"
        )
    if target.dim % int(spec.params.get("m", 1)):
        raise InvalidParameter(
            f"dimension must be able to be divided by `m`, dimension: {target.dim}, m: {spec.params['m']}, "
            f"field {target.name}: invalid parameter"
        )
    name = _index_name(request)
    params = _shown(request)
    return IndexDef(
        IndexId(0), name, target.id, target.name, str(spec.index_type), str(spec.metric), spec.to_dict(), params
    )


def plain_index(index: IndexDef) -> dict[str, Any]:
    """Return the index as a change of the catalogue carries it: its number comes later."""
    plain = asdict(index)
    del plain["index_id"]
    return plain


def _shown(request: IndexRequest) -> dict[str, str]:
    """Return the parameters as they were given, for who asks about the index."""
    return {key: str(value) for key, value in request.params.items() if key not in ("index_type", "metric_type")}


def _index_name(request: IndexRequest) -> str:
    name = request.index_name or request.field_name
    check_name(name, "index")
    return name
