import torch

from anomaly_lit.data.sampler import ShardSampler, TrainBatches, WithPartners, mixed_seed


def batches(start=0, **changes):
    arguments = {"count": 11, "batch_size": 2, "seed": 3, "position": lambda: start, **changes}
    return list(TrainBatches(**arguments))


def test_a_pass_draws_no_image_twice():
    drawn = [index for batch in batches() for index in batch]
    assert len(drawn) == len(set(drawn)) == 10


def test_passes_differ_and_repeat_under_the_seed():
    assert batches(0) != batches(5)
    assert batches(0) == batches(0)
    assert batches(0) != batches(0, seed=4)


def test_resuming_anywhere_gives_the_rest_of_the_same_sequence():
    sequence = batches(0) + batches(5) + batches(10)
    for start in range(10):
        assert batches(start) == sequence[start : start + 5]


def test_ranks_share_the_batch_of_one_process():
    alone = batches(batch_size=4)
    first, second = (batches(rank=rank, world_size=2) for rank in range(2))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [
        sorted(batch) for batch in alone
    ]


def test_weights_decide_how_often_an_image_is_drawn():
    weights = torch.tensor([1.0] * 10 + [0.0])
    drawn = [
        i for start in range(0, 100, 5) for batch in batches(start, weights=weights) for i in batch
    ]
    assert 10 not in drawn


def test_shards_cover_every_image_once():
    shards = [list(ShardSampler(7, rank, 3)) for rank in range(3)]
    assert sorted(index for shard in shards for index in shard) == list(range(7))


def test_mixed_seeds_depend_on_order():
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
    assert len({mixed_seed(0, step, rank) for step in range(1000) for rank in range(4)}) == 4000


def with_partners(start=0, groups="aaaaabbbbbc", seed=3):
    batches = TrainBatches(11, 2, seed, lambda: start)
    return list(WithPartners(batches, list(groups)))


def test_a_partner_is_drawn_from_the_list_of_the_others():
    """As defined, without building that list for each image: its cost grew with the group."""
    groups = "abacabbaaca"
    for step, batch in enumerate(with_partners(groups=groups)):
        for index, partner in batch:
            others = [i for i, g in enumerate(groups) if g == groups[index] and i != index]
            assert partner == others[mixed_seed(3, step, index) % len(others)]


def test_partners_are_others_of_the_group_and_resume_with_their_batches():
    sequence = with_partners(0) + with_partners(5) + with_partners(10)
    for index, partner in (pair for batch in sequence for pair in batch):
        assert "aaaaabbbbbc"[index] == "aaaaabbbbbc"[partner]
        assert index != partner or index == 10  # alone in its group
    assert with_partners(3) == sequence[3:8]
    assert with_partners(seed=4) != with_partners()
    drawn = {p for start in range(0, 100, 5) for b in with_partners(start) for i, p in b if i == 0}
    assert drawn == {1, 2, 3, 4}
