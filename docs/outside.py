"""What mkdocs must know of these documents: links that lead out of docs/ lead to files of the repository.

On their own such links work. On the site there is nothing for them to lead to, so it shows where the file is: as a link
if mkdocs.yml has a `repo_url`, else as its path.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for every page."""
    del files
    base = (config.repo_url or "").rstrip("/")
    folder = posixpath.dirname(page.file.src_uri)

    def outside(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if "://" in target or path == "docs" or path.startswith("docs/"):
            return link[0]
        if base:
            return f"[{text}]({base}/blob/HEAD/{path}{anchor or ''})"
        return f"`{path}`" if text.strip("`/") in path else f"{text} (`{path}`)"

    return LINK.sub(outside, markdown)
