"""One YAML document as plain data, with the place of every key and value in the text.

Facts:

- PyYAML reads YAML 1.1: `on`, `off`, `yes`, `12:30`, `0o17`, `1_000` become booleans and numbers.
- Of two equal keys it keeps the second and says nothing.
- An alias repeats a whole tree in a few bytes: ten lines can stand for 10^9 nodes, or for themselves.
- The composer written in C recurses on the C stack: a hundred thousand brackets kill the process.

What they mean here: events come from the C parser, which is fast and flat; nodes are composed in Python,
where depth is bounded; scalars are resolved by rules of our own, those of YAML 1.2; keys are compared; and
the data that aliases stand for is counted as it is laid out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.resolver import BaseResolver

from relay.journal import secrets
from relay.settings import Place, Problem

# PyYAML built without libyaml has the second only: slower, with the same events.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DEEPEST = 100  # levels of nesting: thirty tees within tees
MOST = 100_000  # values after aliases are laid out; a thousand routes are some 20,000

Spot = tuple[int, int]
"""Line and column, both from 1."""

_CORE = "tag:yaml.org,2002:"
_PLAIN: tuple[tuple[re.Pattern[str], Callable[[str], Any]], ...] = (
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[0] in "tT"),
    (re.compile(r"[-+]?(0|[1-9][0-9]{0,39})"), int),  # 0660 stays text: it is nobody's decimal number
    (re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"null|Null|NULL|~|"), lambda _: None),
)
_TAGGED = {
    f"{_CORE}bool": _PLAIN[0],
    f"{_CORE}int": _PLAIN[1],
    f"{_CORE}float": _PLAIN[2],
    f"{_CORE}null": _PLAIN[3],
}
_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_INSIDE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(:-(.*))?", re.DOTALL)


class _Broken:
    """Stands where a value could not be read: no model takes it, so it is refused right where it stands."""


BROKEN = _Broken()


@dataclass
class Document:
    """What a text says: `data` of dicts, lists and scalars, and where each part of it stands.

    `values` and `keys` map a place (keys and indices from the root) to the spot of the value there and of
    its key. `problems` are those of the text itself, with their spots; at the places in `broken` they left
    `BROKEN` instead of data, or a mapping without some of its keys, so whatever else is found wrong there
    says nothing.
    """

    data: Any = None
    values: dict[Place, Spot] = field(default_factory=dict)
    keys: dict[Place, Spot] = field(default_factory=dict)
    problems: list[tuple[Spot, Problem]] = field(default_factory=list)
    broken: set[Place] = field(default_factory=set)

    def spot(self, problem: Problem) -> Spot:
        """Where to point for `problem`: at its key or value, or at the nearest thing around it.

        A problem with a whole mapping is shown at the key that the mapping belongs to.
        """
        place = problem.place
        while place and place not in self.values:
            place = place[:-1]
        if problem.at_key and place in self.keys:
            return self.keys[place]
        return self.values.get(place, (1, 1))

    def written(self, place: Place) -> Place:
        """The part of `place` that is in the text: a short form has no places inside it."""
        while place and place not in self.values:
            place = place[:-1]
        return place


class Unreadable(Exception):
    """The text is not one YAML document, for the reason `message` at `spot`."""

    def __init__(self, message: str, spot: Spot) -> None:
        super().__init__(message)
        self.message = message
        self.spot = spot


class _Composer(Composer, BaseResolver):
    """PyYAML's composer over the events of the C parser, with a limit on depth and no implicit types."""

    def __init__(self, text: str) -> None:
        self._parser = _Parser(text)
        self._depth = 0
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def check_event(self, *choices: Any) -> Any:
        return self._parser.check_event(*choices)

    def peek_event(self) -> Any:
        return self._parser.peek_event()

    def get_event(self) -> Any:
        return self._parser.get_event()

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """No tag for a plain scalar without one: `_resolved` decides; PyYAML's usual tag for the rest."""
        if kind is yaml.ScalarNode and implicit[0]:
            return None
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call] # PyYAML has no types

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise Unreadable(f"nested deeper than {DEEPEST} levels", (mark.line + 1, mark.column + 1))
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def parse(text: str, environment: Mapping[str, str] | None = None) -> Document:
    """The document in `text`, its variables taken from `environment` (the process's own by default).

    Raises Unreadable if there is no data to speak of; duplicate keys, unset variables and the like are in
    `problems` of the result, with as much data as there is.
    """
    try:
        root = _Composer(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        raise Unreadable(_in_words(error, text), _spot(error.problem_mark or error.context_mark)) from error
    except yaml.reader.ReaderError as error:
        # The C reader counts bytes, the Python one characters: find the place anew.
        refused = yaml.reader.Reader.NON_PRINTABLE.search(text)
        before = text[: refused.start()] if refused else ""
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        character = f"U+{ord(refused[0]):04X}" if refused else "somewhere in it"
        raise Unreadable(
            f"not valid YAML: the character {character} is not allowed", (line, column)
        ) from error
    except yaml.YAMLError as error:
        raise Unreadable(f"not valid YAML: {error}", (1, 1)) from error
    document = Document()
    if root is not None:
        document.data = _Layout(document, os.environ if environment is None else environment).lay(root, ())
    return document


class _Layout:
    """Lays nodes out as data, aliases expanded, and notes where everything stands."""

    def __init__(self, document: Document, environment: Mapping[str, str]) -> None:
        self._document = document
        self._environment = environment
        self._count = 0
        self._open: set[int] = set()  # ids of the nodes that the present one is inside of

    def lay(self, node: yaml.Node, place: Place) -> Any:
        """The data of `node`, which stands at `place`."""
        spot = _spot(node.start_mark)
        self._count += 1
        if self._count > MOST:
            message = f"more than {MOST} values once aliases are written out; use fewer aliases of aliases"
            raise Unreadable(message, self._document.values.get(place[:1], spot))
        if id(node) in self._open:
            raise Unreadable("an alias stands for something that it is inside of, which has no end", spot)
        if len(place) > DEEPEST:
            raise Unreadable(f"nested deeper than {DEEPEST} levels once its aliases are written out", spot)
        self._document.values[place] = spot
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, place, spot)
        allowed = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag not in (None, "!", _CORE + allowed):
            self._refuse(spot, place, f"tags are not supported, here is '{_tag(node.tag)}'")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, place)
            return [self.lay(item, (*place, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        data: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key, value in node.value:
            spot = _spot(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(spot, place, "a key must be a word, this one is a list or a mapping")
                continue
            name = key.value
            inner = (*place, name)
            if name == "<<" and not key.style:
                said = "merge keys (<<) are not supported; write its keys out, or alias a whole mapping"
                self._refuse(spot, inner, said)
                self._document.broken.add(place)
                continue
            if name in first:
                said = f"duplicate key '{name}'; it is given in line {first[name]} already"
                self._refuse(spot, inner, said)
                continue
            first[name] = spot[0]
            self._document.keys[inner] = spot
            data[name] = self.lay(value, inner)
        return data

    def _scalar(self, node: yaml.ScalarNode, place: Place, spot: Spot) -> Any:
        text: str = node.value
        plain = not node.style
        if node.tag not in (None, "!", _CORE + "str"):
            found = _TAGGED.get(node.tag)
            if found and found[0].fullmatch(text):
                return found[1](text)
            tag = _tag(node.tag)
            said = (
                f"{text!r} is not what its tag '{tag}' says"
                if found
                else f"tags are not supported, here is '{tag}'"
            )
            return self._break(spot, place, said)
        typed = plain and node.tag is None
        if "${" not in text:
            return _resolved(text) if typed else text
        try:
            filled = _VARIABLE.sub(self._variable, text)
        except ValueError as error:
            return self._break(spot, place, str(error))
        whole = _VARIABLE.fullmatch(text)
        return _resolved(filled) if typed and whole and whole[1] is not None else filled

    def _variable(self, found: re.Match[str]) -> str:
        if found[0] == "$${":
            return "${"
        if found[1] is None:
            raise ValueError(
                "'${' without '}', or with braces inside; write $${ for the two characters themselves"
            )
        inside = _INSIDE.fullmatch(found[1])
        if inside is None:
            raise ValueError(f"{found[0]!r} is not a variable; write ${{NAME}} or ${{NAME:-default}}")
        name, default = inside[1], inside[3]
        value = self._environment.get(name)
        secrets.note(name, value or "")
        if default is not None:
            return value or default
        if value is None:
            raise ValueError(
                f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            )
        return value

    def _break(self, spot: Spot, place: Place, message: str) -> _Broken:
        self._refuse(spot, place, message)
        self._document.broken.add(place)
        return BROKEN

    def _refuse(self, spot: Spot, place: Place, message: str) -> None:
        self._document.problems.append((spot, Problem(message, place)))


def _resolved(text: str) -> Any:
    """A plain scalar's value by YAML 1.2's core rules, the odd spellings of numbers left as text."""
    for pattern, make in _PLAIN:
        if pattern.fullmatch(text):
            return make(text)
    return text


def _spot(mark: Any) -> Spot:
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _tag(tag: str) -> str:
    return tag.replace(_CORE, "!!")


def _in_words(error: yaml.MarkedYAMLError, text: str) -> str:
    """What the parser found, and what is usually the reason."""
    problem = error.problem or error.context or "unreadable"
    lines = text.split("\n")
    mark = error.problem_mark or error.context_mark
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    hint = ""
    if "but found another document" in problem:
        return "more than one YAML document; keep one and drop what follows '---'"
    if "undefined alias" in problem:
        return problem
    if line[: mark.column + 1 if mark else 0].strip(" ").startswith("\t"):
        hint = "; indent with spaces, not tabs"
    elif re.search(r"[{\[,][^'\"#]*\$\{", line):
        hint = "; inside { } and [ ] a value with ${...} needs quotes"
    elif "mapping values are not allowed" in problem:
        hint = "; a value that holds ': ' needs quotes, and keys of one mapping the same indentation"
    context = f" {error.context}" if error.context and error.problem else ""
    return f"not valid YAML: {problem}{context}{hint}"
