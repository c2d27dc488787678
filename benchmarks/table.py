"""Results as Markdown for people and as JSON for programs. Losses are printed with the same words as wins.

On a page a table stands between `<!-- table: NAME -->` and `<!-- /table -->`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .cell import GIB, MIB, Cell, Goal, cpus
from .contender import Place, spelled
from .load import BenchmarkError
from .series import Result

END = "<!-- /table -->"

HEAD = (
    "| contender | version | GiB/s (min to max) | CPU-s/GiB (min to max) | start-up CPU-s "
    "| CPU-s/GiB without start-up | peak RSS MiB | relay's GiB/s by this | relay's CPU by this |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|",
)


def markdown(cell: Cell, size: int, runs: int, results: list[Result]) -> str:
    """One cell: a heading, how it was run, the table, and what it says of relay."""
    pinned = cpus(cell.pinned)[0] is not None
    took = {"discard": "dropped in the kernel", "read": "copied to user memory"}[cell.receivers]
    how = "contender on one CPU, load and receivers on another" if pinned else "nothing pinned"
    lines = [
        f"### {cell.title} (`{cell.name}`)",
        "",
        f"{_size(size)} a run, {runs} runs each in turn after one warm-up; {how}"
        + (f"; sinks' bytes are {took}." if cell.sink != "file" else "."),
        "",
        *HEAD,
    ]
    relay = next((r for r in results if r.contender.is_relay and r.measured), None)
    lines += [_row(result, relay) for result in results]
    lines.append("")
    lines += [f"- {sentence}" for sentence in _sentences(cell, results, relay)]
    return "\n".join(lines) + "\n"


def raw(cell: Cell, size: int, runs: int, results: list[Result]) -> dict[str, Any]:
    """One cell with every single run, for a JSON file."""
    return {
        "cell": cell.name,
        "title": cell.title,
        "pinned": cpus(cell.pinned)[0] is not None,
        "pipe_bytes": cell.pipe,
        "receivers": cell.receivers,
        "sinks": cell.sinks,
        "chunk": cell.chunk,
        "feed": cell.feed,
        "goal": None if cell.goal is None else {"cpu": cell.goal.cpu, "gib_s": cell.goal.speed},
        "size": size,
        "runs": runs,
        "contenders": [
            {
                "name": result.contender.name,
                "command": spelled(result.contender.parts(_sample(cell))),
                "version": result.version,
                "absent": result.absent,
                "failure": result.failure,
                "runs": [asdict(run) for run in result.runs],
                "empty": [asdict(run) for run in result.empty],
                **(_figures(result) if result.measured else {}),
            }
            for result in results
        ],
    }


def _figures(result: Result) -> dict[str, Any]:
    return {
        "gib_s": asdict(result.rate()),
        "cpu_s_gib": asdict(result.cpu()),
        "startup_cpu_s": result.startup(),
        "net_cpu_s_gib": result.net_cpu(),
    }


def _row(result: Result, relay: Result | None) -> str:
    name = f"`{result.contender.name}`".replace("|", "\\|")
    if result.absent:
        return f"| {name} | not here | | | | | | | |"
    if not result.measured:
        return f"| {name} | {result.version} | failed | failed | | | | | |"
    rate, cpu = result.rate(), result.cpu()
    cells = [
        f"**{name}**" if result.contender.is_relay else name,
        result.version,
        f"{rate.median:.2f} ({rate.least:.2f} to {rate.greatest:.2f})",
        f"{cpu.median:.3f} ({cpu.least:.3f} to {cpu.greatest:.3f})",
        f"{result.startup():.3f}",
        f"{result.net_cpu():.3f}",
        f"{result.rss_mib():.0f}",
    ]
    if relay is None or result is relay:
        cells += ["", ""]
    else:
        cells += [f"{relay.rate().median / rate.median:.2f}", f"{relay.cpu().median / cpu.median:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _sentences(cell: Cell, results: list[Result], relay: Result | None) -> list[str]:
    said = []
    peers = [r for r in results if not r.contender.is_relay and r.measured]
    if relay is not None and peers:
        fastest = max(peers, key=lambda r: r.rate().median)
        cheapest = min(peers, key=lambda r: r.cpu().median)
        ratio = relay.rate().median / fastest.rate().median
        overlap = ", spreads overlap" if relay.rate().overlaps(fastest.rate()) else ""
        verdict = "win" if ratio > 1 else "loss"
        said.append(
            f"Speed: relay moves {ratio:.2f} times the GiB/s of the fastest peer, `{fastest.contender.name}` "
            f"({verdict}{overlap})."
        )
        ratio = relay.cpu().median / cheapest.cpu().median
        overlap = ", spreads overlap" if relay.cpu().overlaps(cheapest.cpu()) else ""
        verdict = "win" if ratio < 1 else "loss"
        said.append(
            f"CPU: relay costs {ratio:.2f} times the CPU of the cheapest peer, `{cheapest.contender.name}` "
            f"({verdict}{overlap})."
        )
    if cell.goal is not None and relay is not None and peers:
        said.append(f"Goal, {_goal(cell.goal, relay, peers)}.")
        named = [peer for peer in peers if cell.goal.concerns(peer.contender)]
        if named and len(named) < len(peers):
            there = {tool for peer in named for tool in peer.contender.tools}
            tools = ", ".join(tool.name for tool in cell.goal.tools if tool in there)
            said.append(f"Beside {tools} alone, for which it was set, {_goal(cell.goal, relay, named)}.")
    if cell.target is not None and relay is not None:
        name, bound = cell.target
        peer = next((r for r in peers if r.contender.name == name), None)
        if peer is not None:
            ratio = relay.cpu().median / peer.cpu().median
            verdict = "met" if ratio <= bound else "missed"
            said.append(
                f"Target, at most {bound:g} of the CPU of `{name}`: {verdict}, {ratio:.3f} with start-up."
            )
    for result in results:
        reason = result.absent or result.failure
        if reason:
            word = "not here" if result.absent else "failed"
            said.append(f"`{result.contender.name}`: {word}: {reason}")
    measured = [r for r in results if r.measured]
    if measured:
        worst = max(measured, key=Result.foreign)
        said.append(
            f"Other work on the machine took at most {worst.foreign():.2f} CPUs during a run "
            f"(`{worst.contender.name}`)."
        )
    return said


def _goal(goal: Goal, relay: Result, peers: list[Result]) -> str:
    """How relay stands to what it is to reach, beside the cheapest and the fastest of these peers."""
    cpu = relay.cpu().median / min(peer.cpu().median for peer in peers)
    speed = relay.rate().median / max(peer.rate().median for peer in peers)
    words = {True: "met", False: "missed"}
    least = min(peer.net_cpu() for peer in peers)
    net = f" ({relay.net_cpu() / least:.2f} without start-up)" if least > 0 else ""
    return (
        f"at most {goal.cpu:g} of the CPU: {words[cpu <= goal.cpu]}, {_beyond(cpu, goal.cpu)}{net}; "
        f"at least {goal.speed:g} times the GiB/s: {words[speed >= goal.speed]}, {_beyond(speed, goal.speed)}"
    )


def _beyond(figure: float, bound: float) -> str:
    """In two digits, or in as many as tell it from the bound."""
    return next(said for n in range(2, 17) if float(said := f"{figure:.{n}f}") != bound or figure == bound)


def _sample(cell: Cell) -> Place:
    """A place that only serves to print commands with."""
    names = tuple(Place().output.parent / f"sink-{n}" for n in range(cell.sinks))
    source = names[0].with_name("source")
    return Place(9000, source, tuple(range(9001, 9001 + cell.sinks)), names, names[0], source, names)


def _size(size: int) -> str:
    return f"{size / GIB:g} GiB" if size >= GIB else f"{size / MIB:g} MiB"


def aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table: the first column to the left, figures to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def put(page: str, name: str, made: str) -> str:
    """The page with that table in its place. BenchmarkError where it has none."""
    begin = f"<!-- table: {name} -->"
    before, found, rest = page.partition(begin)
    _old, ended, after = rest.partition(END)
    if not found or not ended or "<!-- table:" in _old:
        raise BenchmarkError(f"the page has no place for it: write {begin} and {END} where '{name}' belongs")
    return f"{before}{begin}\n\n{made.strip()}\n\n{END}{after}"
