import torch

from anomaly_lit.data.sampler import ShardSampler, TrainBatches, WithSteps, mixed_seed


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


def test_the_rest_of_a_pass_is_a_smaller_batch_if_asked():
    found = batches(drop_last=False)
    assert [len(batch) for batch in found] == [2] * 5 + [1]
    assert sorted(index for batch in found for index in batch) == list(range(11))
    whole = found + batches(6, drop_last=False)
    for start in range(6):
        assert batches(start, drop_last=False) == whole[start : start + 6]


def test_every_rank_gets_as_many_of_the_rest():
    ranks = [batches(rank=rank, world_size=2, batch_size=3, drop_last=False) for rank in range(2)]
    assert [[len(batch) for batch in own] for own in ranks] == [[3, 2], [3, 2]]


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


def test_every_index_comes_with_the_number_of_its_batch():
    plain = TrainBatches(11, 2, 3, lambda: 7)
    steps = list(WithSteps(plain))
    assert len(WithSteps(plain)) == len(steps) == 5
    assert [[index for index, _ in batch] for batch in steps] == list(plain)
    assert [{step for _, step in batch} for batch in steps] == [{7 + n} for n in range(5)]
