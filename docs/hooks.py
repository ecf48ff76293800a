"""For `make docs`: README.md and its like are pages of the site, and links lead to pages or are only text.

On GitHub the pages of docs/ link to sources (`../grpo_kernels/...`). The site does not have them: there the text stays.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=path.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    generated = {name: path for path, name in PAGES.items()}
    source = generated.get(page.file.src_uri, DOCS / page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        text, target, part = match.groups(default="")
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            raise FileNotFoundError(f"{source}: there is no {target}")
        if path not in PAGES and not path.is_relative_to(DOCS):
            return text.strip("[]")
        goal = PAGES.get(path) or str(path.relative_to(DOCS))
        return f"{text}({os.path.relpath(goal, Path(page.file.src_uri).parent)}{part})"

    return re.sub(r"(!?\[[^\]]+\])\((?!http|#)([^)#]+)(#[^)]*)?\)", rewritten, markdown)


class OurDocstrings(griffe.Extension):
    """Google's style has `Examples:`, ours `Example:`; options of a command line have their text in their metadata."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        value = str(attr.value)
        if attr.docstring is None and value.startswith("field(") and "metadata=" in value:
            [text] = [k.value for k in ast.parse(value, mode="eval").body.keywords if k.arg == "metadata"]
            attr.docstring = griffe.Docstring(ast.literal_eval(text)["help"], parent=attr)
