"""The catalogue's file beside a running worker: a change is taken up once it is whole, and a broken one never."""

import os
from pathlib import Path

import pytest

from workers.catalogue_file import CatalogueFile, Refused
from workers.ledger.catalogue import (
    DEFAULT_CATALOGUE,
    Alerts,
    Catalogue,
    CatalogueError,
    GenerationPrice,
    Pack,
    Plan,
    Tier,
    parse_catalogue,
)

DEARER = DEFAULT_CATALOGUE.replace("2026-11", "2026-12").replace("credits = 40", "credits = 50")
BROKEN = DEFAULT_CATALOGUE.replace("credits = 40", "credits = 0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A catalogue file that a worker has started with."""
    file = tmp_path / "shop.toml"
    file.write_text(DEFAULT_CATALOGUE)
    return file


def video(catalogue: Catalogue) -> tuple[str, int | None]:
    """The version, and what a video costs in it."""
    return catalogue.version, catalogue.generation_price("video", None, 1)


def news(file: CatalogueFile) -> Catalogue | Refused | None:
    """What two looks tell, which is enough for any change; the first must tell nothing."""
    assert file.look() is None
    return file.look()


def adopted(file: CatalogueFile) -> Catalogue:
    """The catalogue that two looks put in force."""
    found = news(file)
    assert isinstance(found, Catalogue)
    assert file.catalogue is found
    return found


def refused(file: CatalogueFile) -> str:
    """What is told of a change that two looks refuse; what was in force stays."""
    before = file.catalogue
    found = news(file)
    assert isinstance(found, Refused)
    assert file.catalogue is before
    return "\n".join(problem.told() for problem in found.problems)


def test_a_change_is_put_in_force_once(path: Path) -> None:
    """Nothing is told of a file that stays as it is; a change is told once."""
    file = CatalogueFile(path)
    assert video(file.catalogue) == ("2026-11", 40)
    assert news(file) is None

    path.write_text(DEARER)

    assert video(adopted(file)) == ("2026-12", 50)
    assert news(file) is None


def test_a_change_of_the_same_size_and_time_is_seen(path: Path) -> None:
    """The content counts: an editor or a copy may keep the file's time."""
    file, before = CatalogueFile(path), path.stat()

    path.write_text(DEFAULT_CATALOGUE.replace("credits = 40", "credits = 41"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert video(adopted(file))[1] == 41


def test_a_file_that_is_replaced_is_followed(path: Path) -> None:
    """Another file under the same name, or behind the same link, as editors and Kubernetes write it."""
    first, second = path.with_name("first"), path.with_name("second")
    first.write_text(DEFAULT_CATALOGUE)
    second.write_text(DEARER)
    path.unlink()
    path.symlink_to(first)
    file = CatalogueFile(path)

    following = path.with_name("following")
    following.symlink_to(second)
    following.replace(path)

    assert video(adopted(file)) == ("2026-12", 50)


def test_a_file_that_is_being_written_is_waited_for(path: Path) -> None:
    """A part of a catalogue may look like one: it is taken for one only when it stays."""
    file = CatalogueFile(path)
    for end in (200, 400, 600):
        path.write_text(DEARER[: DEARER.index("\n", end)])
        assert file.look() is None

    path.write_text(DEARER)

    assert video(adopted(file)) == ("2026-12", 50)


def test_a_broken_change_is_told_once_and_keeps_what_was_in_force(path: Path) -> None:
    """Until it is mended, and then the mended one is put in force."""
    file = CatalogueFile(path)
    path.write_text(BROKEN)

    assert "generations.video.credits is 0" in refused(file)
    assert news(file) is None

    path.write_text(DEARER)
    assert video(adopted(file)) == ("2026-12", 50)


def test_taking_a_broken_change_back_is_news(path: Path) -> None:
    """Whoever was told that the file is broken is told that it no longer is."""
    file = CatalogueFile(path)
    path.write_text(BROKEN)
    refused(file)

    path.write_text(DEFAULT_CATALOGUE)

    assert video(adopted(file)) == ("2026-11", 40)


def test_a_file_that_goes_away_changes_nothing(path: Path) -> None:
    """What was in force stays, and the file is found again when it is back."""
    file = CatalogueFile(path)
    path.unlink()

    assert "there is no such file" in refused(file)
    assert news(file) is None

    path.mkdir()
    assert "is a folder" in refused(file)
    path.rmdir()
    path.write_text(DEARER)
    assert video(adopted(file)) == ("2026-12", 50)


def test_no_two_catalogues_are_in_force_under_one_version(path: Path) -> None:
    """Entries name the version: who changes prices and forgets it gets a mark behind it, the same for the same prices."""
    file = CatalogueFile(path)

    path.write_text(DEFAULT_CATALOGUE.replace("credits = 40", "credits = 50"))
    marked = adopted(file).version
    path.write_text(DEFAULT_CATALOGUE.replace("credits = 40", "credits = 60"))
    again = adopted(file).version
    path.write_text("# fifty\n" + DEFAULT_CATALOGUE.replace("credits = 40", "credits = 50"))

    assert video(adopted(file)) == (marked, 50)
    assert len({"2026-11", marked, again}) == 3
    assert all(version.startswith("2026-11+") for version in (marked, again))
    path.write_text("# as it was\n" + DEFAULT_CATALOGUE)
    assert video(adopted(file)) == ("2026-11", 40)


def test_the_guide_tells_every_key_and_the_mistakes_as_they_are_told() -> None:
    """docs/catalogue.md has each key of each part, and its mistakes are those of the built-in catalogue, mistaken."""
    guide = (Path(__file__).parents[1] / "docs" / "catalogue.md").read_text()
    keys = set(Catalogue.model_fields)
    for part in (Tier, Plan, Pack, GenerationPrice, Alerts):
        keys |= set(part.model_fields)
    mistaken = DEFAULT_CATALOGUE.replace("_days = 90", "_days = 0")

    with pytest.raises(CatalogueError) as error:
        parse_catalogue(mistaken.replace("credits = 40", "credit = 40"))

    table = guide[guide.index("| part |") : guide.index("- Amounts")]
    assert {key for key in keys if key not in table} == set()
    assert error.value.told("catalogue.toml") in guide


def test_the_built_in_catalogue_never_changes() -> None:
    """Without a file there is nothing to look at."""
    file = CatalogueFile(None)

    assert (video(file.catalogue), file.look(), file.look()) == (("2026-11", 40), None, None)


def test_a_start_with_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    """There is nothing in force yet that could stay."""
    with pytest.raises(CatalogueError, match="there is no such file"):
        CatalogueFile(tmp_path / "none.toml")
