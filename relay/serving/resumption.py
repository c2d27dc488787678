"""What an earlier run left in a route's logs on disk: it goes on before any new source connects."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from relay.config.models import Route
from relay.engine import Engine
from relay.serving.spilling import spilling
from relay.spill.sink import Resumed
from relay.spill.spills import Spills
from relay.stages.stage import Turn
from relay.ways import Ways

ids = itertools.count(1)  # of streams and sessions, for as long as this process lives


class Resumption:
    """The deliveries of one route's logs that are under way; `on_over()` is called when one is. On its home engine."""

    def __init__(
        self, home: Engine, name: str, route: Route, spills: Spills, ways: Ways, on_over: Callable[[], None]
    ) -> None:
        self._home = home
        self._name = name
        self._route = route
        self._spills = spills
        self._ways = ways
        self._on_over = on_over
        self._resumed: set[Resumed] = set()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._resumed)

    @property
    def left(self) -> int:
        """Bytes in these logs."""
        return sum(resumed.left for resumed in self._resumed)

    def begin(self, *, standing: bool) -> None:
        """Claims the logs and starts their delivery; where a sink is `standing`, its own log has what is left."""
        for _place, _settings, slow, _stages in spilling(self._route):
            if slow.directory is not None:
                self._spills.claim(slow.directory)
        if standing:
            return
        for _place, settings, slow, stages in spilling(self._route):
            self._resumed.update(
                self._spills.resume(
                    self._home, self._name, stages, settings, slow, self._ways, self._turn, self._over
                )
            )

    def _turn(self) -> Turn:
        return Turn(self._name, str(next(ids)), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), "log")

    def _over(self, resumed: Resumed) -> None:
        self._resumed.discard(resumed)
        self._on_over()

    def stop(self, reason: str) -> None:
        """Ends them now; what is left stays in the logs."""
        for resumed in self._resumed:
            resumed.stop(reason)
