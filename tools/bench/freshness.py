"""Were the searches right that ran while rows were being inserted? Judged afterwards, from the two loads' clocks.

A search that was sent after an insert's reply must see the insert's rows; one that was answered before the insert was
sent must not; in between both is right. Both loads read CLOCK_MONOTONIC, which is one clock for all processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.bench.data import Dataset, Mask
from tools.bench.loading import Replies
from tools.bench.truth import SCORE_SLACK, Scores, scores_of
from tools.bench.wire import Codec, Refused, search_hits

SCORE_ERROR_MAX = 1e-3
"""A returned score may be this far from the true one, relative to 1."""


@dataclass(frozen=True)
class Freshness:
    """What the searches during an insert were worth."""

    recall: float
    """Mean over the searches, against the rows that they had to see."""
    wrong: int
    """Searches that failed, fell short, repeated a row, showed one that was not sent yet, or scored one wrongly."""
    searches: int


def judge(
    searches: Replies, inserts: Replies, data: Dataset, *, queries: int, batch_rows: int, codec: Codec, k: int
) -> Freshness:
    """Return how right the searches were; search number i asked query i modulo `queries`."""
    all_scores = scores_of(data.queries[:queries], data.vectors, data.metric)
    batch_of_row = np.arange(data.rows) // batch_rows
    sent_ns = np.full(int(batch_of_row[-1]) + 1, np.iinfo(np.int64).max, dtype=np.int64)
    done_ns = sent_ns.copy()
    sent_ns[inserts.numbers], done_ns[inserts.numbers] = inserts.sent_ns, inserts.done_ns
    recalls, wrong = [], 0
    for i in range(len(searches)):
        acknowledged = done_ns[batch_of_row] < searches.sent_ns[i]
        possible = sent_ns[batch_of_row] < searches.done_ns[i]
        scores = all_scores[searches.numbers[i] % queries]
        try:
            ids, shown = search_hits(searches.bodies[i], codec)
        except (Refused, ValueError, KeyError, TypeError):
            wrong += 1
            continue
        wrong += not _sound(ids, shown, scores, data.metric, acknowledged, possible, k)
        if acknowledged.any():
            recalls.append(_recall(ids, scores, acknowledged, k))
    return Freshness(float(np.mean(recalls)) if recalls else float("nan"), wrong, len(searches))


def _sound(
    ids: list[int], shown: list[float], scores: Scores, metric: str, acknowledged: Mask, possible: Mask, k: int
) -> bool:
    if len(set(ids)) != len(ids) or len(ids) > k or len(ids) < min(k, int(acknowledged.sum())):
        return False
    if any(not 0 <= i < len(scores) or not possible[i] for i in ids):
        return False
    true = scores[ids] if metric != "L2" else -scores[ids]
    return bool(np.all(np.abs(true - np.array(shown)) <= SCORE_ERROR_MAX * np.maximum(1.0, np.abs(true))))


def _recall(ids: list[int], scores: Scores, acknowledged: Mask, k: int) -> float:
    """Return the share of the k best acknowledged rows that the answer has, or has better ones than."""
    candidates = scores[acknowledged]
    wanted = min(k, len(candidates))
    floor = float(np.partition(candidates, len(candidates) - wanted)[len(candidates) - wanted])
    known = [i for i in dict.fromkeys(ids) if 0 <= i < len(scores)]
    good = int((scores[known] >= floor - SCORE_SLACK * max(1.0, abs(floor))).sum())
    return min(good, wanted) / wanted
