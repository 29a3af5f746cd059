"""What both interfaces share: ids, the bound on running requests, mutations that outlive their client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from node.edge import LEFT, Edge, Operation
from storage.errors import Overloaded, RequestTimeout
from tests.node.api.fake import Inline, edge_of

OVER_HTTP = Operation("/collections/list", "/v2/vectordb/collections/list", "-")
OVER_GRPC = Operation("Search", "Search", "Search", is_rows=True)


def run(script: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(script(), 20)

    asyncio.run(main())


def test_the_bound_is_the_nodes() -> None:
    """What runs by one interface leaves less for the other; a sixteenth is kept for what is not about rows."""
    edge = edge_of(Inline(), requests_running_max=16)
    passing = [edge.request(OVER_GRPC, "", None) for _ in range(15)]
    for one in passing:
        with one:
            one.take_place()
    entered = [one.__enter__() for one in passing]
    with edge.request(OVER_GRPC, "", None) as rows, pytest.raises(Overloaded, match="15 at most may"):
        rows.take_place()
    with edge.request(OVER_HTTP, "", None) as other:
        other.take_place()
        with edge.request(OVER_HTTP, "", None) as more, pytest.raises(Overloaded, match="16 at most may"):
            more.take_place()
    for one in reversed(entered):
        one.__exit__(None, None, None)
    assert edge.running == 0


@pytest.mark.parametrize("given", ["mine", "", None, "x" * 129, "two\nlines", "hé"])
def test_ids(given: str | None) -> None:
    """A client's id is kept if it is short and printable; all others are different."""
    edge = edge_of(Inline())
    first, second = (edge.request(OVER_HTTP, "", given).identity for _ in range(2))
    assert (first == given == second) if given == "mine" else first != second


class Slow:
    """A mutation that takes until it is told."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.is_done = False

    async def work(self) -> str:
        await self.go.wait()
        self.is_done = True
        return "done"


async def end_and_drain(edge: Edge, slow: Slow) -> None:
    draining = asyncio.ensure_future(edge.drain())
    await asyncio.sleep(0)
    assert not draining.done() and not slow.is_done
    slow.go.set()
    await draining
    assert slow.is_done


def test_a_mutation_outlives_its_time() -> None:
    """The client is told that the change may still be made, it is made, and stopping waits for it."""

    async def script() -> None:
        edge, slow = edge_of(Inline()), Slow()
        with (
            edge.request(OVER_HTTP, "", None) as passing,
            pytest.raises(RequestTimeout, match="may still be made"),
            passing.within(0.01),
        ):
            await passing.carry_out(slow.work())
        await end_and_drain(edge, slow)

    run(script)


def test_a_mutation_outlives_its_client() -> None:
    """A request that is cancelled counts as left, and its mutation goes on."""

    async def script() -> None:
        edge, slow, codes = edge_of(Inline()), Slow(), []

        async def serve() -> None:
            passing = edge.request(OVER_GRPC, "", None)
            try:
                with passing, passing.within(10):
                    await passing.carry_out(slow.work())
            finally:
                codes.append(passing.code)

        serving = asyncio.ensure_future(serve())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert codes == [LEFT]
        await end_and_drain(edge, slow)

    run(script)


def test_a_read_ends_with_its_time() -> None:
    """What changes nothing is cancelled, and nobody waits for it."""

    async def script() -> None:
        edge, slow = edge_of(Inline()), Slow()
        with (
            edge.request(OVER_GRPC, "", None) as passing,
            pytest.raises(RequestTimeout, match=r"^request timeout$"),
            passing.within(0.01),
        ):
            await slow.work()
        await edge.drain()
        assert not slow.is_done

    run(script)
