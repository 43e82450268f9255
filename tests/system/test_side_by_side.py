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


async def test_both_batches_of_a_poll_are_in_the_databases_hands_at_once(world: World) -> None:
    """Each partition's records want an account that somebody has locked: both batches wait for it, none for the other."""
    world.start_worker()
    users = [await user_with_an_account(world) for _ in range(2)]
    await world.caught_up(ACCOUNT)
    await world.stop_workers()
    sent = [
        await world.publish_all(
            ACCOUNT, [("credits.granted", gift(user))] * MOST, partitions=[partition]
        )
        for partition, user in enumerate(users)
    ]

    async with held_up(world, users[0]):
        async with held_up(world, users[1]):
            world.start_worker()
            await waiting(world, 2)
        await world.applied(*sent[1])
        assert [world.answers[id_] for id_ in sent[0]] == [[]] * MOST

    for user, ids in zip(users, sent, strict=True):
        await check_once(world, user, ids)
    await world.check_books()
