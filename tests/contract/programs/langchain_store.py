"""A program that uses LangChain's Milvus store: `langchain_store.py ADDRESS ADDRESS`, of any two nodes."""

from __future__ import annotations

import asyncio
import sys
from zlib import crc32

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_milvus import BM25BuiltInFunction, Milvus

TEXTS = {"the cat sat on the mat": "a", "dogs chase cats": "b", "stock prices fell": "news", "rain is expected": "news"}
DOCUMENTS = [
    Document(page_content=text, metadata={"source": source, "n": n}) for n, (text, source) in enumerate(TEXTS.items())
]


class Words(Embeddings):  # type: ignore[misc]
    """A component for each word, by its hash."""

    def embed_query(self, text: str) -> list[float]:
        vector = np.zeros(64, np.float32)
        for word in text.split():
            vector[crc32(word.encode()) % 64] += 1
        found: list[float] = (vector / np.linalg.norm(vector)).tolist()
        return found

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def store(address: str, name: str) -> Milvus:
    return Milvus(
        Words(), collection_name=name, connection_args={"uri": address}, auto_id=True, consistency_level="Strong"
    )


def main(addresses: list[str]) -> None:
    first = store(addresses[0], "texts")
    first.add_documents(DOCUMENTS)
    seen = store(addresses[-1], "texts")
    assert [one.page_content for one in seen.similarity_search("cat mat", k=1)] == ["the cat sat on the mat"]
    ((best, score),) = seen.similarity_search_with_score("stock rain", k=1, expr='source == "news" and n == 3')
    assert best.page_content == "rain is expected" and best.metadata["n"] == 3 and score > 0
    ids = seen.add_texts(["something new about cats"], metadatas=[{"source": "c", "n": 9}])
    assert len(seen.similarity_search("cats", k=10)) == 5
    assert len(seen.max_marginal_relevance_search("cats", k=2)) == 2
    seen.upsert(ids=ids, documents=[Document(page_content="changed", metadata={"source": "c", "n": 10})])
    assert [one.metadata["n"] for one in first.similarity_search("changed", k=1)] == [10]
    first.delete(expr="n == 10")
    assert len(seen.similarity_search("cats", k=10)) == 4
    assert [one.page_content for one in seen.as_retriever(search_kwargs={"k": 1}).invoke("rain")] == [
        "rain is expected"
    ]

    both = Milvus.from_documents(
        DOCUMENTS,
        Words(),
        builtin_function=BM25BuiltInFunction(),
        vector_field=["dense", "sparse"],
        collection_name="both",
        connection_args={"uri": addresses[0]},
        consistency_level="Strong",
    )
    found = both.similarity_search("dogs chase", k=1, ranker_type="rrf", ranker_params={"k": 60})
    assert [one.page_content for one in found] == ["dogs chase cats"]

    async def later() -> list[str]:
        made = store(addresses[-1], "later")
        await made.aadd_texts(["one two", "three four"])
        return [one.page_content for one in await made.asimilarity_search("four", k=1)]

    assert asyncio.run(later()) == ["three four"]


if __name__ == "__main__":
    main(sys.argv[1:])
