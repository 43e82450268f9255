"""The pages and pictures under `docs/` that are made, not written: each from the one place that says it already.

They are written and checked for drift together with the contract (`credits schemas`), in a checkout alone: an installed
package has no `docs/`.
"""

from pathlib import Path

import typer

from workers.documentation.pages import reference_pages
from workers.documentation.pictures import draw


def documentation_files(docs: Path, program: typer.Typer) -> dict[str, str]:
    """Every generated file's text, by its path under `docs/`. Raises ValueError, with a sentence for whoever writes them, for a
    picture that cannot be drawn and for what nobody has put into words.
    """
    pictures = {
        f"pictures/{path.stem}.svg": draw(path.read_text(encoding="utf-8"), name=path.name)
        for path in sorted((docs / "pictures").glob("*.txt"))
    }
    pages = reference_pages(docs.parent, program)
    return pictures | {f"reference/{name}": text for name, text in pages.items()}
