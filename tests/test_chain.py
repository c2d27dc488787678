"""The chain: what its nodes own."""

from __future__ import annotations

import pytest

from relay.endpoints.options import OnSlow
from relay.engine import Engine
from relay.pipeline.node import Node, guard


@pytest.mark.parametrize("copies_first", [False, True])
def test_a_dropping_node_has_room_for_the_piece_under_way(copies_first: bool) -> None:
    """Behind what a node copies through lie `align` bytes for the piece before a gap, in either order."""
    engine = Engine("test")
    node = Node(engine, 65536)
    slow = OnSlow(policy="drop", align=100_000).effective(listening=False)
    if copies_first:
        node.copies("the kernel refuses tee")
    guard(node, slow)
    node.copies("the kernel refuses tee")
    assert node.c.stash == node._stash
    assert len(node._stash) >= node.c.stash_size + 100_000
    node.close()
    engine.close()
