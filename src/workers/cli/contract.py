"""What others build on: the contract's files, and the catalogue."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workers.cli.shared import OPTIONS, PROBLEMS, WELL, Json, UnusableError
from workers.cli.telling import open_console, tell, tell_json, visible, visible_lines

if TYPE_CHECKING:
    from workers.ledger.catalogue import Catalogue


commands = typer.Typer(**OPTIONS)
catalogue = typer.Typer(help="What is sold and what it costs.", **OPTIONS)
commands.add_typer(catalogue, name="catalogue")


@commands.command()
def schemas(
    check: Annotated[
        bool,
        typer.Option(help="Only tell whether schemas/ is what the code says, and promises kept."),
    ] = False,
    release: Annotated[
        bool, typer.Option(help="Also record what this release promises; refused if one is broken.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Write schemas/ from the code: JSON Schemas, AsyncAPI, OpenAPI; in a checkout also docs/: reference and pictures."""
    from workers import contract
    from workers.store.migrations import schemas_folder

    folder = schemas_folder()
    docs, pages = folder.parent / "docs", _documentation(folder.parent / "docs")
    if not check:
        contract.write_contract(folder)
        contract.write_files(docs, pages)
        broken = contract.release(folder) if release else []
        told = "\n".join([f"Written to {folder}.", *broken])
        tell({"written": str(folder), "differences": broken}, as_json, told)
        return PROBLEMS if broken else WELL
    differences = contract.check_contract(folder)
    if pages:
        differences += contract.drift(docs, pages, "reference/*", "pictures/*.svg")
    tell(
        {"differences": differences},
        as_json,
        "\n".join(differences)
        or "What is made from the code says what the code says, and every promise is kept.",
    )
    return PROBLEMS if differences else WELL


def _documentation(docs: Path) -> dict[str, str]:
    """What is made under docs/; nothing where there is none, which is everywhere but in a checkout."""
    if not docs.is_dir():
        return {}
    from workers import cli
    from workers.documentation import documentation_files

    try:
        return documentation_files(docs, cli.app)
    except ValueError as error:  # what cannot be drawn, or nobody has put into words
        raise UnusableError(str(error)) from error


@catalogue.command("check")
def catalogue_check(
    file: Annotated[Path, typer.Argument(help="A catalogue in TOML.")], as_json: Json = False
) -> int:
    """Show what a catalogue sells, or every line of it that must be mended before a worker can use it."""
    from workers.catalogue_file import UnreadableError, read_catalogue
    from workers.ledger.catalogue import CatalogueError

    try:
        found = read_catalogue(file)
    except UnreadableError as error:
        raise UnusableError(visible(error.told(str(file)))) from error
    except CatalogueError as error:
        problems = [problem._asdict() for problem in error.problems]
        told = visible_lines(error.told(str(file)))
        tell({"valid": False, "error": told, "problems": problems}, as_json, told)
        return PROBLEMS
    notes = found.notes()
    if as_json:
        tell_json({"valid": True, **found.model_dump(mode="json"), "notes": notes})
    else:
        _print_catalogue(found)
        for note in notes:
            sys.stdout.write(visible(f"note: {note}") + "\n")
        sys.stdout.write(visible(f"{file} can be used: version {found.version}.") + "\n")
    return WELL


@catalogue.command("example")
def catalogue_example(as_json: Json = False) -> int:
    """Print a catalogue with comments to begin with: credits catalogue example > catalogue.toml."""
    from workers.store.migrations import schemas_folder

    path = schemas_folder() / "catalogue.example.toml"
    text = path.read_text(encoding="utf-8")
    tell(
        {"example": text, "schema": str(path.with_name("catalogue.schema.json"))},
        as_json,
        text.rstrip(),
    )
    return WELL


def _print_catalogue(found: "Catalogue") -> None:
    """What is sold, a table for each kind of thing."""
    from rich.table import Table
    from rich.text import Text

    def days(number: int | None) -> str:
        return "never" if number is None else f"{number:,} days"

    tiers = [
        (
            name,
            f"{one.signup_credits:,}",
            "none" if one.daily_generations is None else f"{one.daily_generations:,}",
        )
        for name, one in found.tiers.items()
    ]
    plans = [
        (
            name,
            one.tier,
            f"{one.credits:,}",
            "month" if one.allocation == "monthly" else "period",
            one.rollover if isinstance(one.rollover, str) else f"at most {one.rollover:,}",
            f"{one.trial_credits:,}",
            "\n".join(one.stripe_prices) or "none",
        )
        for name, one in found.plans.items()
    ]
    packs = [
        (name, f"{one.credits:,}", days(one.expires_days), "\n".join(one.stripe_prices) or "none")
        for name, one in found.packs.items()
    ]
    generations = [
        (kind, model, f"{credits:,}", f"{one.hold_seconds:,} s")
        for kind, one in found.generations.items()
        for model, credits in (("any", one.credits), *one.models.items())
    ]
    tables: dict[tuple[str, ...], Sequence[tuple[str, ...]]] = {
        ("tier", "sign-up credits", "generations a day"): tiers,
        ("plan", "tier", "credits", "for each", "rollover", "trial", "Stripe prices"): plans,
        ("pack", "credits", "expires", "Stripe prices"): packs,
        ("generation", "model", "credits a unit", "hold"): generations,
    }
    console = open_console()
    for titles, rows in tables.items():
        if rows:
            table = Table(*titles, box=None, header_style="dim", pad_edge=False)
            for row in rows:
                table.add_row(*(Text(visible_lines(cell)) for cell in row))
            console.print(table)
            console.print()
