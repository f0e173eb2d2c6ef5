"""Random streams of our own."""

import torch

from dyntune.numerics.random import normal_like, stream_seed

CPU = torch.device("cpu")


def test_streams_are_fixed_by_their_key_and_differ_between_keys():
    keys = [
        (),
        (0,),
        (1,),
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 0, 0),
        (2**32,),
        (2**32, 0),
        (0, 2**32),
        (2**40,),
        (0, 256),
        (-1,),
    ]
    seeds = [stream_seed(*key) for key in keys]
    assert seeds == [stream_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_both_precisions_get_the_same_numbers():
    single = normal_like(torch.Size([9]), torch.float32, CPU, key=(1, 2))
    double = normal_like(torch.Size([9]), torch.float64, CPU, key=(1, 2))
    assert torch.equal(single.double(), double)
