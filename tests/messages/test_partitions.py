"""On which partition a message of ours is put."""

import random

from aiokafka.partitioner import DefaultPartitioner

from workers.producer import Partitioner

SEED = 5


def test_a_key_is_where_every_client_puts_it() -> None:
    """Whatever key, and whatever its neighbours: the same partition as Kafka's own partitioner, every time."""
    dice = random.Random(SEED)
    keys = [dice.randbytes(dice.randint(0, 40)) for _ in range(500)] * 2
    for key in keys:
        partitions = list(range(dice.randint(1, 50)))

        assert Partitioner()(key, partitions, []) == DefaultPartitioner()(key, partitions, []), SEED


def test_what_has_no_key_is_put_where_somebody_answers() -> None:
    """A message without a key goes to a partition that is available."""
    assert Partitioner()(None, [0, 1, 2], [1]) == 1
