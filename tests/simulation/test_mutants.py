"""The checker can fail: each of fourteen planted breaks is caught, by the invariant that is meant for it.

The same story without the break must end with no finding, or it would prove nothing. The table of all breaks is printed
at the end of the run.
"""

from collections.abc import Iterator

import pytest

from .conftest import Worlds
from .mutants import MUTANTS, Mutant, Stage


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """One line for each mutant, printed when all are judged."""
    lines: list[str] = []
    yield lines
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        reporter.write_line("")
        reporter.write_line(
            "| mutant | also taken away | meant for it | caught by | first finding |"
        )
        reporter.write_line("|---|---|---|---|---|")
        for line in lines:
            reporter.write_line(line)
        reporter.write_line(f"{len(lines)} of {len(MUTANTS)} mutants caught")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
async def test_a_planted_break_is_caught_by_its_invariant(
    worlds: Worlds, table: list[str], mutant: Mutant
) -> None:
    """The story is harmless as the code is; with the break its invariant, perhaps among others, finds it."""
    async with worlds() as world:
        assert await mutant.story(Stage(world)) == []
    async with worlds() as world:
        with pytest.MonkeyPatch.context() as patch:
            await mutant.plant(patch, world)
            found = await mutant.story(Stage(world))

    caught = sorted({one.invariant for one in found}, key=lambda name: int(name[1:]))
    assert mutant.invariants & set(caught), found
    meant = next(one for one in found if one.invariant in mutant.invariants)
    wanted = "/".join(sorted(mutant.invariants))
    table.append(
        f"| {mutant.name} | {mutant.also or '–'} | {wanted} | {', '.join(caught)} | {meant} |"
    )
