"""Index types and search parameters: their names, bounds and defaults, checked before anything is built or searched.

Names are Milvus's (https://milvus.io/docs/index-explained.md). Values may come as numbers or as text ("64"), as they do
in index parameters of Milvus's clients. A parameter of another index type is ignored, as Milvus does; one whose name
is a known one in other letters (`efconstruction`) is refused, because ignoring a slip of the pen is no kindness.

    SpecError                   ValueError; the request is wrong, and repeating it will not help
    +- UnsupportedIndexType
    +- UnsupportedMetric
    +- UnknownParam             a known name in other letters
    +- BadParam                 not a number, or outside its range; `param`, `value`, `allowed`
       +- EfBelowK              ef smaller than the number of hits asked for
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeAlias, cast

from index.metric import DEFAULT_METRICS, EVERYTHING, METRICS, Bounds, Metric
from index.protocol import Form


class IndexType(StrEnum):
    """The index types that can be built; the values are Milvus's names."""

    AUTOINDEX = "AUTOINDEX"
    FLAT = "FLAT"
    HNSW = "HNSW"
    HNSW_SQ = "HNSW_SQ"
    IVF_FLAT = "IVF_FLAT"
    IVF_SQ8 = "IVF_SQ8"
    IVF_PQ = "IVF_PQ"
    HNSW_PQ = "HNSW_PQ"
    SCANN = "SCANN"
    BIN_FLAT = "BIN_FLAT"
    BIN_IVF_FLAT = "BIN_IVF_FLAT"
    SPARSE_INVERTED_INDEX = "SPARSE_INVERTED_INDEX"
    SPARSE_WAND = "SPARSE_WAND"


class Engine(StrEnum):
    """The code that does the work."""

    EXACT = "exact"
    NMSLIB = "nmslib"
    FAISS = "faiss"
    BINARY = "binary"
    SPARSE = "sparse"


Number: TypeAlias = int | float

# M: Milvus's range. Graphs gain nothing above 64 or so, and a row has 2 * M links of 4 bytes; see `graph_degree`.
M_MIN, M_MAX, M_DEFAULT = 1, 2048, 16
_INT_MAX: Final = (1 << 31) - 1
EF_CONSTRUCTION_MAX, EF_CONSTRUCTION_DEFAULT = _INT_MAX, 200
NLIST_MAX, NLIST_DEFAULT = 65_536, 128
NPROBE_DEFAULT: Final = 8
EF_MAX: Final = _INT_MAX
EF_DEFAULT: Final = 80
"""With M 16 and efConstruction 200, recall@10 is 0.984 on 50,000 sentence embeddings of 384 dimensions (64: 0.977, 96:
0.988), at 3,000 searches a second on one core (3,500 and 2,700)."""
EF_PER_HIT_DEFAULT: Final = 2
"""Candidates for each hit of a large k: on the same data recall@100 is 0.978 with 2, 0.965 with 1.5, 0.934 with 1."""
LEVEL_MAX, LEVEL_DEFAULT = 10, 1

_DEGREE_MAX: Final = 512
"""Links per row that a graph really gets. M = 2048 would be 16 KiB of links a row, ten times the row itself."""

_AUTO: Final[Mapping[str, Number]] = {"M": 16, "efConstruction": 200}
"""What AUTOINDEX builds. M 24 buys 0.004 of recall for a quarter more build and a sixth fewer searches; efConstruction
120 costs 0.005 and saves a quarter of the build, 360 buys 0.002 and adds half of it."""

_GRAPH: Final = {"M": (M_MIN, M_MAX, M_DEFAULT), "efConstruction": (1, EF_CONSTRUCTION_MAX, EF_CONSTRUCTION_DEFAULT)}
_LISTS: Final = {"nlist": (1, NLIST_MAX, NLIST_DEFAULT)}
SQ: Final = "sq"
"""In a spec of HNSW_SQ: how a component is kept, where that is not in 8 bits."""
SQ_CODES: Final[Mapping[str, int]] = {"SQ6": 6, "SQ8": 8, "FP16": 16, "BF16": 17}
SQ_DEFAULT: Final = SQ_CODES["SQ8"]
_CODES: Final = {"m": (1, 65_536, 4), "nbits": (1, 12, 8)}
"""Parts that a vector is cut in, of which the dimension is a multiple, and bits of the code of each."""
_PARAMS: Final[Mapping[IndexType, Mapping[str, tuple[int, int, int]]]] = {
    IndexType.AUTOINDEX: {},
    IndexType.FLAT: {},
    IndexType.HNSW: _GRAPH,
    IndexType.HNSW_SQ: _GRAPH,
    IndexType.IVF_FLAT: _LISTS,
    IndexType.IVF_SQ8: _LISTS,
    IndexType.IVF_PQ: {**_LISTS, **_CODES},
    IndexType.HNSW_PQ: {**_GRAPH, **_CODES},
    IndexType.SCANN: _LISTS,
    IndexType.BIN_FLAT: {},
    IndexType.BIN_IVF_FLAT: _LISTS,
    IndexType.SPARSE_INVERTED_INDEX: {},
    IndexType.SPARSE_WAND: {},
}
_BM25: Final[Mapping[str, tuple[float, float]]] = {"bm25_k1": (3.0, 1.2), "bm25_b": (1.0, 0.75)}
"""Parameters of the metric BM25, which are from 0: (the greatest value, the default)."""
_ENGINES: Final[Mapping[IndexType, tuple[Engine, ...]]] = {  # the first is the default
    IndexType.AUTOINDEX: (Engine.FAISS,),  # of dense vectors
    IndexType.FLAT: (Engine.EXACT,),
    IndexType.HNSW: (Engine.NMSLIB, Engine.FAISS),
    IndexType.HNSW_SQ: (Engine.FAISS,),
    IndexType.IVF_FLAT: (Engine.FAISS,),
    IndexType.IVF_SQ8: (Engine.FAISS,),
    IndexType.IVF_PQ: (Engine.FAISS,),
    IndexType.HNSW_PQ: (Engine.FAISS,),
    IndexType.SCANN: (Engine.FAISS,),
    IndexType.BIN_FLAT: (Engine.BINARY,),
    IndexType.BIN_IVF_FLAT: (Engine.BINARY,),
    IndexType.SPARSE_INVERTED_INDEX: (Engine.SPARSE,),
    IndexType.SPARSE_WAND: (Engine.SPARSE,),
}
_OWN_ENGINES: Final = {Form.BINARY: Engine.BINARY, Form.SPARSE: Engine.SPARSE}
_FORMS: Final = {engine: form for form, engine in _OWN_ENGINES.items()}
_BUILD_NAMES: Final = ("M", "efConstruction", "nlist", "engine", "m", "nbits", "sq_type", "index_type", "metric_type")
_SEARCH_NAMES: Final = ("ef", "nprobe", "level", "radius", "range_filter")


class SpecError(ValueError):
    """An index or a search is described in a way that cannot be served; the text names the offending part."""


class UnsupportedIndexType(SpecError):
    """No engine builds this index type, of vectors of this form."""

    def __init__(self, index_type: str, form: Form = Form.DENSE) -> None:
        what = "" if form is Form.DENSE else f" of {form} vectors"
        super().__init__(f"index type not supported: {index_type}{what}, supported: [{', '.join(index_types(form))}]")
        self.index_type = index_type


class UnsupportedMetric(SpecError):
    """Vectors of this form cannot be compared this way."""

    def __init__(self, metric_type: str, form: Form = Form.DENSE) -> None:
        super().__init__(
            f"metric type not found or not supported: {metric_type}, supported: [{', '.join(METRICS[form])}]"
        )
        self.metric_type = metric_type


class UnknownParam(SpecError):
    """A parameter's name differs only in its letters' case from one that exists."""

    def __init__(self, param: str, meant: str) -> None:
        super().__init__(f"unknown parameter {param}, did you mean {meant}?")
        self.param = param
        self.meant = meant


class BadParam(SpecError):
    """A parameter's value is not of its kind, or outside its range."""

    def __init__(self, param: str, value: object, allowed: str, *, text: str | None = None) -> None:
        super().__init__(text or f"invalid parameter {param}: {_short(value)}, should be {allowed}")
        self.param = param
        self.value = value
        self.allowed = allowed


class EfBelowK(BadParam):
    """The graph search keeps ef candidates, so it cannot return more than ef hits."""

    def __init__(self, ef: int, k: int) -> None:
        super().__init__("ef", ef, f"at least {k}", text=f"ef should be larger than k, but got ef {ef} and k {k}")
        self.k = k


@dataclass(frozen=True)
class IndexSpec:
    """What to build: every parameter resolved, so that replicas with other defaults still build the same."""

    index_type: IndexType
    metric: Metric
    params: Mapping[str, Number]
    """M and efConstruction for graphs, nlist for inverted lists, m and nbits for product codes; read-only."""
    engine: Engine

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))

    def __hash__(self) -> int:
        return hash((self.index_type, self.metric, frozenset(self.params.items()), self.engine))

    @property
    def form(self) -> Form:
        """What it is built of."""
        return _FORMS.get(self.engine, Form.DENSE)

    @property
    def has_product_codes(self) -> bool:
        """True where parts of each vector are kept as the number of a centroid."""
        return "m" in self.params or self.index_type is IndexType.SCANN

    @property
    def is_graph(self) -> bool:
        """True for the HNSW family, AUTOINDEX included."""
        return "M" in self.params

    @property
    def graph_degree(self) -> int:
        """The links per row and upper level that the graph is built with (twice as many on the lowest level).

        At least 2: level probabilities come from 1 / ln(M), which M = 1 makes infinite. At most 512, see above.
        """
        return min(max(int(self.params["M"]), 2), _DEGREE_MAX)

    def to_dict(self) -> dict[str, object]:
        """Return plain text and numbers, for the log."""
        return {
            "index_type": self.index_type.value,
            "metric": self.metric.value,
            "params": dict(self.params),
            "engine": self.engine.value,
        }

    @staticmethod
    def from_dict(plain: Mapping[str, object]) -> IndexSpec:
        """Return the spec that `to_dict` gave. Raises SpecError for anything else, unknown engines included."""
        try:
            index_type, engine = IndexType(cast(str, plain["index_type"])), Engine(cast(str, plain["engine"]))
            metric, params = Metric(cast(str, plain["metric"])), cast(Mapping[str, Number], plain["params"])
            is_auto = index_type is IndexType.AUTOINDEX
            ranges = _GRAPH if is_auto and engine is Engine.FAISS else _PARAMS[index_type]
            if engine not in _ENGINES[index_type] and not (is_auto and engine in _FORMS):
                raise SpecError(f"engine {engine} does not build {index_type}")
            if metric not in METRICS[_FORMS.get(engine, Form.DENSE)]:
                raise SpecError(f"engine {engine} does not measure by {metric}")
            resolved: dict[str, Number] = {
                name: _integer(name, params[name], low, high) for name, (low, high, _) in ranges.items()
            }
            if index_type is IndexType.HNSW_SQ and SQ in params:
                resolved[SQ] = _integer(SQ, params[SQ], min(SQ_CODES.values()), max(SQ_CODES.values()))
            if metric is Metric.BM25:
                resolved |= {name: _share(name, params[name], high) for name, (high, _) in _BM25.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"not an index spec: {error}") from error
        return IndexSpec(index_type, metric, resolved, engine)


@dataclass(frozen=True, slots=True)
class SearchParams:
    """How hard to look, and how near; None where the request is silent."""

    ef: int | None = None
    """Candidates kept by a graph search: more is slower and finds more."""
    nprobe: int | None = None
    """Inverted lists looked into."""
    level: int | None = None
    """AUTOINDEX's effort from 1 (fast) to 10 (thorough); an explicit ef goes before it."""
    radius: float | None = None
    """The outer limit of scores, exclusive."""
    range_filter: float | None = None
    """The inner limit of scores, inclusive."""
    damping: float | None = None
    """Of a BM25 search, k1 * (1 - b): see `index.sparse`. Not for clients to give, as the next one."""
    damping_per_term: float | None = None
    """k1 * b / the average length of a row."""

    def ef_for(self, spec: IndexSpec, k: int) -> int:
        """Return the candidates to keep for k hits: as asked, never fewer than k; else by k and (AUTOINDEX) level."""
        if self.ef is not None:
            return max(k, self.ef)
        level = self.level or LEVEL_DEFAULT if spec.index_type is IndexType.AUTOINDEX else LEVEL_DEFAULT
        return max(EF_DEFAULT * level, EF_PER_HIT_DEFAULT * k)

    def nprobe_for(self, lists: int, share: float) -> int:
        """Return how many of an index's lists to look into if this share of the rows passes the filter.

        A filter thins every list, so the k nearest that pass lie in more of them. The root is what measures well: at a
        fiftieth, recall@10 falls from 0.83 to 0.65 with the lists unchanged.
        """
        return min(lists, math.ceil((NPROBE_DEFAULT if self.nprobe is None else self.nprobe) / math.sqrt(share)))

    def bounds(self, metric: Metric) -> Bounds:
        """Return the interval of internal distances that may appear."""
        if self.radius is None and self.range_filter is None:
            return EVERYTHING
        return metric.distance_bounds(self.radius, self.range_filter)


def parse_index_spec(
    index_type: str | None,
    metric_type: str | None,
    params: Mapping[str, object],
    *,
    default_metric: Metric | None = None,
    form: Form = Form.DENSE,
) -> IndexSpec:
    """Return the checked spec of a request to create an index.

    index_type, metric_type  as given; if empty or None, `params` may hold them under these names (the REST API allows
                             both), else AUTOINDEX and `default_metric`, or else what Milvus takes for the form
    form                     of the vectors to index
    params                   build parameters, numbers or text; those of other index types are ignored. AUTOINDEX
                             ignores them all: it means that Annulus chooses

    Raises UnsupportedIndexType, UnsupportedMetric, UnknownParam or BadParam, in this order.
    """
    kind = _index_type(index_type or params.get("index_type") or IndexType.AUTOINDEX, form)
    metric = parse_metric(metric_type or params.get("metric_type") or default_metric or DEFAULT_METRICS[form], form)
    _refuse_slips(params, _BUILD_NAMES)
    resolved = dict(_AUTO) if kind is IndexType.AUTOINDEX and form is Form.DENSE else {}
    for name, (low, high, default) in _PARAMS[kind].items():
        resolved[name] = _integer(name, params.get(name, default), low, high)
    if metric is Metric.BM25:
        resolved |= {name: _share(name, params.get(name, default), high) for name, (high, default) in _BM25.items()}
    if kind is IndexType.HNSW_SQ and (code := _scalar_code(params.get("sq_type"))) != SQ_DEFAULT:
        resolved[SQ] = code
    engine = _OWN_ENGINES.get(form) or _engine(kind, params.get("engine"))
    return IndexSpec(kind, metric, resolved, engine)


def parse_metric(metric_type: object, form: Form = Form.DENSE) -> Metric:
    """Return the metric of this name, in any letters, as Milvus reads it. Raises UnsupportedMetric."""
    name = str(metric_type).upper()
    for metric in METRICS[form]:
        if metric == name:
            return metric
    raise UnsupportedMetric(_short(metric_type), form)


def index_types(form: Form) -> list[IndexType]:
    """Return the types of index that vectors of this form can have."""
    own = _OWN_ENGINES.get(form)
    return [
        kind
        for kind, engines in _ENGINES.items()
        if kind is IndexType.AUTOINDEX or (own in engines if own else engines[0] not in _FORMS)
    ]


def parse_search_params(
    mapping: Mapping[str, object], spec: IndexSpec | None = None, *, k: int | None = None
) -> SearchParams:
    """Return the checked parameters of a search; other keys of the mapping are not ours and are left alone.

    spec  of the index to be searched; with it nprobe is held to nlist, and the two limits to each other
    k     hits wanted; with it an explicit ef below k is refused, as Milvus does

    Raises BadParam, EfBelowK or UnknownParam.
    """
    _refuse_slips(mapping, _SEARCH_NAMES)
    ef = _optional_integer(mapping, "ef", EF_MAX)
    if ef is not None and k is not None and ef < k and (spec is None or spec.is_graph):
        raise EfBelowK(ef, k)
    nlist = int(spec.params.get("nlist", NLIST_MAX)) if spec is not None else NLIST_MAX
    params = SearchParams(
        ef=ef,
        nprobe=_optional_integer(mapping, "nprobe", nlist),
        level=_optional_integer(mapping, "level", LEVEL_MAX),
        radius=_optional_float(mapping, "radius"),
        range_filter=_optional_float(mapping, "range_filter"),
    )
    if spec is not None:
        _check_range(params, spec.metric)
    return params


def _check_range(params: SearchParams, metric: Metric) -> None:
    radius, inner = params.radius, params.range_filter
    if radius is None or inner is None:
        return
    if metric.is_similarity and inner <= radius:
        raise BadParam("range_filter", inner, f"greater than radius {radius} for metric type {metric}")
    if not metric.is_similarity and inner >= radius:
        raise BadParam("range_filter", inner, f"less than radius {radius} for metric type {metric}")


def _index_type(name: object, form: Form) -> IndexType:
    for kind in index_types(form):
        if kind == str(name):
            return kind
    raise UnsupportedIndexType(_short(name), form)


def _scalar_code(given: object) -> int:
    """Return what stands in a spec for Milvus's name of a scalar code."""
    code = SQ_DEFAULT if given is None else SQ_CODES.get(str(given).upper())
    if code is None:
        raise BadParam("sq_type", given, f"one of [{', '.join(SQ_CODES)}]")
    return code


def _engine(kind: IndexType, given: object) -> Engine:
    engines = _ENGINES[kind]
    if given is None:
        return engines[0]
    for engine in engines:
        if engine == given:
            return engine
    raise BadParam("engine", given, f"one of [{', '.join(engines)}] for index type {kind}")


def _refuse_slips(params: Mapping[str, object], names: tuple[str, ...]) -> None:
    folded = {name.casefold(): name for name in names}
    for param in params:
        meant = folded.get(param.casefold())
        if meant is not None and param not in names:
            raise UnknownParam(param, meant)


_INTEGER_TEXT: Final = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT_TEXT: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _integer(param: str, value: object, low: int, high: int) -> int:
    allowed = f"an integer in range [{low}, {high}]"
    match value:
        case bool():
            raise BadParam(param, value, allowed)
        case int():
            number = value
        case float() if value.is_integer():
            number = int(value)
        case str() if _INTEGER_TEXT.fullmatch(value.strip()):
            number = int(value)
        case _:
            raise BadParam(param, value, allowed)
    if not low <= number <= high:
        raise BadParam(param, value, allowed)
    return number


def _share(param: str, value: object, high: float) -> float:
    number = _optional_float({param: value}, param)
    if number is None or not 0.0 <= number <= high:
        raise BadParam(param, value, f"a number in range [0, {high:g}]")
    return number


def _optional_integer(mapping: Mapping[str, object], param: str, high: int) -> int | None:
    value = mapping.get(param)
    return None if value is None else _integer(param, value, 1, high)


def _optional_float(mapping: Mapping[str, object], param: str) -> float | None:
    value = mapping.get(param)
    match value:
        case None:
            return None
        case bool():
            pass
        case float() if math.isfinite(value):
            return value
        case int() if abs(value) < 1 << 63:  # an int of any length is an OverflowError away from a float
            return float(value)
        case str() if _FLOAT_TEXT.fullmatch(value.strip()) and math.isfinite(float(value)):
            return float(value)
    raise BadParam(param, value, "a finite number")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 64 else text[:64] + "..."
