"""What the documents say of relay is what relay is: reference pages, quoted messages, the site they are built into."""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from documents import DOCUMENTS, ROOT

from relay.config.load import loads
from relay.config.models import Config, Route
from relay.errors import ConfigErrors

GAP = "\0"  # in a message of the source: something that is filled in
FILLED = re.compile(r"%(?:\([a-z_]+\))?[-+ #0]*[\d.]*[sdrgfxi]")


@cache
def generator() -> ModuleType:
    """docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "commands.md", "record.md"])
def test_a_reference_page_is_what_the_models_say(page: str) -> None:
    """The page that is committed is the one that docs/generate.py makes; `python docs/generate.py` writes it anew."""
    made = generator().PAGES[page]()
    assert (ROOT / "docs" / "reference" / page).read_text() == made


def test_every_reference_page_is_made() -> None:
    """Nothing lies in docs/reference that is not made from relay, and nothing that is made is missing."""
    assert {path.name for path in (ROOT / "docs" / "reference").iterdir()} == set(generator().PAGES)


def test_a_field_of_the_record_without_words_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that the record has and the page has no words for is named, and so are words for a field that is none."""
    monkeypatch.delitem(generator().SESSION, "ended_by")
    with pytest.raises(KeyError, match="ended_by"):
        generator().record()


@cache
def messages() -> frozenset[str]:
    """Every text in relay's source, with a GAP for what is filled in; in what is joined from several, as one."""
    found = set()
    for path in (ROOT / "relay").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(FILLED.sub(GAP, node.value))
    return frozenset(found)


def quoted() -> Iterator[str]:
    """The messages that docs/troubleshooting.md quotes: the first column of its tables."""
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if match := re.match(r"\| `([^`]+)` \|", line):
            yield match[1]


def is_said(message: str) -> bool:
    """Whether a text of relay's has all parts of `message` between its `...`, in that order."""
    parts = [re.escape(part) for part in re.split(r"\s*\.\.\.\s*", message) if part]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("message", list(quoted()))
def test_a_message_in_troubleshooting_is_one_of_relays(message: str) -> None:
    """Each message that the page explains still stands in relay's source, so nobody looks for one that is gone."""
    assert is_said(message)


def test_a_message_that_relay_does_not_say_is_found() -> None:
    """The check that quotes are messages refuses what no text of relay's has."""
    assert is_said("sink ... is slow: dropping for it alone")
    assert not is_said("sink ... is slow: it is ignored")
    assert not is_said("dropping for it alone ... sink")


def parts(document: Path) -> Iterator[tuple[str, str]]:
    """What a document consists of: fences with their language ("sh", or "" for none), and the text between, "prose"."""
    kind, lines = "prose", list[str]()
    for line in document.read_text().splitlines():
        if fence := re.match(r" *```(\w*)", line):
            yield kind, "\n".join(lines)
            kind, lines = (fence[1] if kind == "prose" else "prose"), []
        else:
            lines.append(line)
    yield kind, "\n".join(lines)


def told(document: Path) -> Iterator[list[str]]:
    """Every relay command that a document names, in fences and in the text, as words up to the next of the shell's."""
    said: list[str] = []
    for kind, text in parts(document):
        if kind in ("sh", ""):
            said += text.replace("\\\n", " ").splitlines()
        elif kind == "prose":
            for paragraph in text.split("\n\n"):
                said += re.findall(r"`([^`]+)`", paragraph)
    for line in said:
        for command in re.findall(r"(?:^|[|;&(] *|exec camera )relay ([a-z].*)", line.strip()):
            yield re.split(r"[|;&<>#)]", command)[0].split()


def known_options() -> dict[str, set[str]]:
    """The options of every command, as docs/reference/commands.md, which is made from them, has them."""
    found: dict[str, set[str]] = {}
    for part in generator().commands().split("\n## relay ")[1:]:
        found[part.split("\n")[0]] = {"--help", *re.findall(r"^\| `(--[a-z-]+)`", part, re.MULTILINE)}
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_commands_and_options_that_there_are(document: Path) -> None:
    """Each `relay COMMAND --option` in a document, run or not, is one that relay knows."""
    options = known_options()
    for name, *words in told(document):
        assert name in options, (name, words)
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options[name], (name, words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_documents_configurations_are_ones_that_relay_takes(
    document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every configuration in a document, and every part of one, is right."""
    monkeypatch.setenv("REDIS_PASSWORD", "as one that is set")
    keys, top = set(Route.keys()), set(Config.keys())
    for kind, text in parts(document):
        data = yaml.safe_load(text) if kind == "yaml" else None
        if not isinstance(data, dict) or not data.keys() & (keys | top):
            continue  # of something else, such as Prometheus
        if data.keys() <= keys:  # a part of a route, one way or both ways
            part = {"source": "tcp://127.0.0.1:1", "sink": "tcp://127.0.0.1:2", **data}
            ways = [{"routes": {"part": part | {"duplex": duplex}}} for duplex in (False, True)]
        else:
            ways = [{"routes": {"part": {"source": "-", "sink": "null:"}}, **data}]
        wrong = []
        for way in ways:
            try:
                loads(yaml.safe_dump(way), str(document), to_run=True)
            except ConfigErrors as error:
                wrong.append(str(error))
        assert len(wrong) < len(ways), "\n".join(wrong)


def exit_codes(document: Path) -> list[str]:
    """The codes in the table under "Exit codes"."""
    table = document.read_text().partition("## Exit codes\n")[2].partition("\n## ")[0]
    return [code for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(", ")]


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    """README and Operating relay list the same exit codes, and every one that the console entry gives."""
    listed = exit_codes(ROOT / "README.md")
    assert listed == exit_codes(ROOT / "docs" / "operations.md")
    given = re.findall(r"sys\.exit\((\d+)\)", (ROOT / "relay" / "cli" / "__init__.py").read_text())
    assert {"0", "2", "3"} <= set(given) <= set(listed)


@pytest.mark.parametrize(
    "code", ["ECONNREFUSED", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ECONNRESET", "EPIPE"]
)
def test_the_errors_of_connections_are_worded_as_the_system_does(code: str) -> None:
    """docs/connections.md lists the errors of a connection in the words that relay, and the system, have for them."""
    words = f"`{os.strerror(getattr(errno, code))} ({code})`"
    assert words in (ROOT / "docs" / "connections.md").read_text()


@pytest.mark.timeout(120)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """`mkdocs build --strict` has nothing to say: every page is in the navigation, every link and anchor leads
    somewhere."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is missing: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # an advertisement
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    for page in ("tutorial", "how-to/many-receivers", "reference/configuration", "troubleshooting"):
        text = (tmp_path / "site" / page / "index.html").read_text()
        assert "<table>" in text or "<pre" in text, page
    assert "&lt;!-- " not in (tmp_path / "site" / "tutorial" / "index.html").read_text()
    home = (tmp_path / "site" / "index.html").read_text()
    assert "<code>README.md</code>" in home  # a link that leads out of docs/
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)[^"]*\.(?:js|css|woff2?)"', home)
