"""Index types and parameters: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import cbor2
import pytest

from index.metric import Metric
from index.protocol import Form
from index.spec import (
    EF_DEFAULT,
    NPROBE_DEFAULT,
    BadParam,
    EfBelowK,
    Engine,
    IndexSpec,
    IndexType,
    SearchParams,
    SpecError,
    UnknownParam,
    UnsupportedIndexType,
    UnsupportedMetric,
    index_types,
    parse_index_spec,
    parse_search_params,
)


@pytest.mark.parametrize(
    ("index_type", "params", "resolved", "engine"),
    [
        pytest.param("AUTOINDEX", {}, {"M": 16, "efConstruction": 200}, Engine.FAISS, id="auto"),
        pytest.param("AUTOINDEX", {"M": 99}, {"M": 16, "efConstruction": 200}, Engine.FAISS, id="auto chooses itself"),
        pytest.param("", {}, {"M": 16, "efConstruction": 200}, Engine.FAISS, id="no type is auto"),
        pytest.param("FLAT", {"nlist": 5}, {}, Engine.EXACT, id="others' parameters are ignored"),
        pytest.param("HNSW", {}, {"M": 16, "efConstruction": 200}, Engine.NMSLIB, id="HNSW is nmslib's"),
        pytest.param("HNSW", {"engine": "faiss"}, {"M": 16, "efConstruction": 200}, Engine.FAISS, id="unless asked"),
        pytest.param(
            "HNSW", {"M": "64", "efConstruction": 8.0}, {"M": 64, "efConstruction": 8}, Engine.NMSLIB, id="text"
        ),
        pytest.param("HNSW_SQ", {"M": 1}, {"M": 1, "efConstruction": 200}, Engine.FAISS, id="lowest M"),
        pytest.param("IVF_FLAT", {"nlist": " 65536 "}, {"nlist": 65536}, Engine.FAISS, id="highest nlist"),
        pytest.param("IVF_SQ8", {}, {"nlist": 128}, Engine.FAISS, id="default nlist"),
        pytest.param(None, {"index_type": "IVF_SQ8", "metric_type": "IP"}, {"nlist": 128}, Engine.FAISS, id="within"),
    ],
)
def test_accepted(
    index_type: str | None, params: dict[str, object], resolved: dict[str, object], engine: Engine
) -> None:
    """Each type resolves to every parameter it needs, as a number."""
    spec = parse_index_spec(index_type, None, params)
    assert dict(spec.params) == resolved
    assert spec.engine is engine
    assert all(type(value) is int for value in spec.params.values())


@pytest.mark.parametrize(
    ("index_type", "metric", "params", "error", "text"),
    [
        pytest.param(
            "ANNOY", "L2", {}, UnsupportedIndexType, "index type not supported: ANNOY, supported: [AUTOINDEX", id="type"
        ),
        pytest.param("hnsw", "L2", {}, UnsupportedIndexType, "hnsw", id="type in other letters"),
        pytest.param("HNSW", "HAMMING", {}, UnsupportedMetric, "HAMMING, supported: [L2, IP, COSINE]", id="metric"),
        pytest.param("HNSW", "L2", {"M": 0}, BadParam, "M: 0, should be an integer in range [1, 2048]", id="M low"),
        pytest.param("HNSW", "L2", {"M": "2049"}, BadParam, "M: 2049", id="M high"),
        pytest.param("HNSW", "L2", {"M": "x" * 999}, BadParam, "M: " + "x" * 64 + "...", id="long text is cut"),
        pytest.param("HNSW", "L2", {"M": True}, BadParam, "M: True", id="a bool is no number"),
        pytest.param("HNSW", "L2", {"M": 1.5}, BadParam, "M: 1.5", id="a fraction is no integer"),
        pytest.param("HNSW", "L2", {"M": float("nan")}, BadParam, "M: nan", id="nan"),
        pytest.param("HNSW", "L2", {"M": None}, BadParam, "M: None", id="null"),
        pytest.param("HNSW", "L2", {"M": "1_6"}, BadParam, "M: 1_6", id="Python's underscores"),
        pytest.param("HNSW", "L2", {"M": [16]}, BadParam, "M: [16]", id="list"),
        pytest.param("HNSW", "L2", {"efConstruction": 0}, BadParam, "efConstruction: 0", id="efConstruction"),
        pytest.param("HNSW", "L2", {"efconstruction": 9}, UnknownParam, "did you mean efConstruction", id="slip"),
        pytest.param("IVF_FLAT", "L2", {"nlist": 65537}, BadParam, "[1, 65536]", id="nlist"),
        pytest.param("HNSW_SQ", "L2", {"sq_type": "SQ5"}, BadParam, "one of [SQ6, SQ8, FP16, BF16]", id="sq_type"),
        pytest.param("HNSW", "L2", {"engine": "hnswlib"}, BadParam, "one of [nmslib, faiss]", id="engine"),
        pytest.param("AUTOINDEX", "L2", {"engine": "nmslib"}, BadParam, "one of [faiss]", id="engine of auto"),
    ],
)
def test_refused(index_type: str, metric: str, params: dict[str, object], error: type[SpecError], text: str) -> None:
    """The error names the parameter, its value and what is allowed."""
    with pytest.raises(error) as caught:
        parse_index_spec(index_type, metric, params)
    assert type(caught.value) is error
    assert text in str(caught.value)


def test_metric_defaults_and_letters() -> None:
    """The metric is COSINE unless given, and read in any letters."""
    assert parse_index_spec("FLAT", None, {}).metric is Metric.COSINE
    assert parse_index_spec("FLAT", "", {}, default_metric=Metric.IP).metric is Metric.IP
    assert parse_index_spec("FLAT", "l2", {}).metric is Metric.L2
    assert parse_index_spec(None, None, {"metric_type": "IP"}).metric is Metric.IP


@pytest.mark.parametrize(("form", "index_type"), [(form, kind) for form in Form for kind in index_types(form)])
def test_spec_survives_the_log(form: Form, index_type: IndexType) -> None:
    """to_dict is plain enough for CBOR, and from_dict gives the equal, equally hashed spec."""
    spec = parse_index_spec(index_type, None, {"M": 7, "nlist": 9}, form=form)
    assert spec.form is form
    again = IndexSpec.from_dict(cbor2.loads(cbor2.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    "change",
    [{"index_type": "X"}, {"metric": "X"}, {"engine": "exact"}, {"engine": 4}, {"params": {}}, {"params": {"M": 0}}],
)
def test_from_dict_refuses_what_to_dict_never_gave(change: dict[str, object]) -> None:
    """A log of another version is an error with a name, not a crash later."""
    with pytest.raises(SpecError):
        IndexSpec.from_dict({**parse_index_spec("HNSW", "L2", {}).to_dict(), **change})


def test_scalar_codes() -> None:
    """A spec of 8 bits is as it always was; others name their code, and survive the log."""
    assert parse_index_spec("HNSW_SQ", "L2", {"sq_type": "sq8"}) == parse_index_spec("HNSW_SQ", "L2", {})
    spec = parse_index_spec("HNSW_SQ", "L2", {"sq_type": "FP16"})
    assert spec.params["sq"] == 16 and IndexSpec.from_dict(cbor2.loads(cbor2.dumps(spec.to_dict()))) == spec


def test_spec_cannot_be_changed() -> None:
    """The parameters are read-only, also through the mapping that was given."""
    spec = parse_index_spec("HNSW", "L2", {})
    with pytest.raises(TypeError):
        spec.params["M"] = 3  # type: ignore[index]


@pytest.mark.parametrize(("m", "degree"), [(1, 2), (2, 2), (16, 16), (2048, 512)])
def test_graph_degree_is_what_a_graph_can_use(m: int, degree: int) -> None:
    """M = 1 has no levels, and thousands of links a row are only memory."""
    assert parse_index_spec("HNSW", "L2", {"M": m}).graph_degree == degree


HNSW_L2, IVF_IP = parse_index_spec("HNSW", "L2", {}), parse_index_spec("IVF_FLAT", "IP", {"nlist": 32})


def test_search_params_accepted() -> None:
    """Numbers or text, with other keys left alone."""
    given = {"ef": "128", "nprobe": 16.0, "level": 3, "radius": "-1.5e2", "range_filter": 7, "metric_type": "L2"}
    assert parse_search_params(given) == SearchParams(128, 16, 3, -150.0, 7.0)
    assert parse_search_params({"radius": None}) == SearchParams()


@pytest.mark.parametrize(
    ("spec", "given", "text"),
    [
        pytest.param(None, {"ef": 0}, "ef: 0, should be an integer in range [1, 2147483647]", id="ef"),
        pytest.param(None, {"nprobe": 65537}, "[1, 65536]", id="nprobe of any index"),
        pytest.param(IVF_IP, {"nprobe": 33}, "[1, 32]", id="nprobe of this index"),
        pytest.param(None, {"level": 11}, "[1, 10]", id="level"),
        pytest.param(None, {"radius": "inf"}, "radius: inf, should be a finite number", id="radius"),
        pytest.param(None, {"radius": 10**400}, "a finite number", id="an integer without end"),
        pytest.param(None, {"radius": "1" + "0" * 400}, "a finite number", id="text without end"),
        pytest.param(None, {"range_filter": True}, "range_filter: True", id="bool"),
        pytest.param(HNSW_L2, {"radius": 1, "range_filter": 1}, "less than radius 1.0 for metric type L2", id="L2"),
        pytest.param(IVF_IP, {"radius": 2, "range_filter": 1}, "greater than radius 2.0", id="IP"),
        pytest.param(None, {"nProbe": 3}, "did you mean nprobe", id="slip"),
    ],
)
def test_search_params_refused(spec: IndexSpec | None, given: dict[str, object], text: str) -> None:
    """The error names the parameter, its value and what is allowed."""
    with pytest.raises(SpecError) as caught:
        parse_search_params(given, spec)
    assert text in str(caught.value)


def test_ef_below_k() -> None:
    """An explicit ef smaller than k is refused where there is a graph to search."""
    with pytest.raises(EfBelowK, match="ef should be larger than k, but got ef 9 and k 10"):
        parse_search_params({"ef": 9}, HNSW_L2, k=10)
    assert parse_search_params({"ef": 10}, HNSW_L2, k=10).ef == 10
    assert parse_search_params({"ef": 9}, IVF_IP, k=10).ef == 9


def test_defaults() -> None:
    """Silence means the default, more for a large k or a filter, and level counts for AUTOINDEX only."""
    auto = parse_index_spec("AUTOINDEX", "L2", {})
    assert SearchParams().ef_for(auto, 10) == EF_DEFAULT
    assert SearchParams(level=3).ef_for(auto, 10) == 3 * EF_DEFAULT
    assert SearchParams(level=3).ef_for(HNSW_L2, 10) == EF_DEFAULT
    assert SearchParams().ef_for(auto, 1000) == 2000
    assert SearchParams(ef=5).ef_for(auto, 10) == 10
    assert SearchParams().nprobe_for(128, 1.0) == NPROBE_DEFAULT
    assert SearchParams().nprobe_for(128, 0.25) == 2 * NPROBE_DEFAULT
    assert SearchParams(nprobe=64).nprobe_for(10, 1.0) == 10
