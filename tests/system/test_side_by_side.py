"""What one poll brings is applied as batches side by side, each in a transaction of its own."""

import itertools
import random
from typing import NamedTuple

from workers.consumer import batches_of

from .test_rebalance import check_once, gift, held_up, user_with_an_account, waiting
from .world import ACCOUNT, World

MOST = 50
WORLD = {"partitions": 2, "batch_records_max": MOST}
SEED = 7


class Polled(NamedTuple):
    """A record, as far as it matters in which batch it is."""

    partition: int
    offset: int


def test_a_poll_becomes_few_batches_and_each_partition_is_in_one() -> None:
    """Whatever a poll brings: nothing is lost or reordered, no batch is too long, and none is begun without need."""
    dice = random.Random(SEED)
    for _ in range(300):
        sizes = [dice.randint(1, MOST) for _ in range(dice.randint(1, 8))]
        polled = [
            Polled(partition, offset)
            for partition, size in enumerate(sizes)
            for offset in range(size)
        ]

        batches = batches_of(polled, MOST)

        assert list(itertools.chain(*batches)) == polled, SEED
        assert all(1 <= len(batch) <= MOST for batch in batches), SEED
        homes = [{record.partition for record in batch} for batch in batches]
        assert sum(map(len, homes)) == len(sizes), SEED
        for before, after in itertools.pairwise(batches):
            assert len(before) + sizes[after[0].partition] > MOST, SEED


async def test_a_batch_that_has_to_wait_does_not_hold_up_the_others_of_its_poll(
    world: World,
) -> None:
    """One partition's account is locked by somebody: the other partition's records are applied meanwhile."""
    world.start_worker()
    locked, free = await user_with_an_account(world), await user_with_an_account(world)
    await world.caught_up(ACCOUNT)
    await world.stop_workers()
    late, soon = [
        await world.publish_all(
            ACCOUNT, [("credits.granted", gift(user))] * MOST, partitions=[partition]
        )
        for partition, user in enumerate((locked, free))
    ]

    async with held_up(world, locked):
        worker = world.start_worker()
        await waiting(world, 1)
        await world.applied(*soon)
        assert worker.logs.of("stalled") == []
        assert [world.answers[id_] for id_ in late] == [[]] * MOST

    await check_once(world, locked, late)
    await world.check_books()
