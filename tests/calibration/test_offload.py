"""Parked activations: their storage is emptied and filled again; nobody holding them notices.

The CPU stands for the accelerator here: what is done is the same for every kind of device.
"""

import pytest
import torch

from hf_sparse.calibration.offload import Parked


def park(value, keep=frozenset()) -> Parked:
    return Parked(value, keep, devices=("cpu",))


def bytes_held(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_a_parked_tensor_takes_no_memory_and_comes_back_unchanged():
    tensor = torch.arange(6.0).view(2, 3)
    parked = park((tensor,))
    parked.away()
    assert bytes_held(tensor) == 0
    parked.back()
    assert bytes_held(tensor) == 24
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3))


def test_tensors_are_found_in_nested_tuples_lists_and_dicts():
    found = [torch.full((2,), float(i)) for i in range(4)]
    value = ((found[0], None, "text"), {"mask": [found[1], 7], "rope": (found[2], found[3])})
    parked = park(value)
    parked.away()
    assert [bytes_held(tensor) for tensor in found] == [0] * 4
    parked.back()
    assert [tensor.tolist() for tensor in found] == [[i, i] for i in (0.0, 1.0, 2.0, 3.0)]


def test_views_and_other_references_of_a_parked_tensor_see_the_contents_again():
    base = torch.arange(12.0)
    row, column = base.view(3, 4)[1], base.view(3, 4)[:, 2]
    elsewhere = base.detach()
    parked = park(([row, column],))
    parked.away()
    assert bytes_held(elsewhere) == 0
    parked.back()
    assert row.tolist() == [4, 5, 6, 7]
    assert column.tolist() == [2, 6, 10]
    assert torch.equal(elsewhere, torch.arange(12.0))


def test_a_storage_that_appears_twice_is_parked_once():
    tensor = torch.arange(4.0)
    parked = park((tensor, tensor, tensor[1:]))
    parked.away()
    parked.back()
    assert tensor.tolist() == [0, 1, 2, 3]


def test_storages_of_others_stay_where_they_are():
    weight, hidden = torch.ones(3), torch.ones(3)
    parked = park((weight, hidden), frozenset({weight.untyped_storage().data_ptr()}))
    parked.away()
    assert weight.tolist() == [1, 1, 1]
    assert bytes_held(hidden) == 0


def test_bringing_back_what_is_there_changes_nothing():
    tensor = torch.ones(3)
    parked = park((tensor,))
    parked.back()
    parked.away()
    parked.back()
    tensor.add_(1)
    parked.back()
    assert tensor.tolist() == [2, 2, 2]


def test_changes_made_between_two_stays_are_kept():
    tensor = torch.zeros(2)
    parked = park((tensor,))
    for expected in (1.0, 2.0):
        parked.away()
        parked.back()
        tensor.add_(1)
        assert tensor.tolist() == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype):
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    before = tensor.clone()
    parked = park((tensor,))
    parked.away()
    parked.back()
    assert torch.equal(tensor, before)


def test_empty_tensors_and_values_without_tensors_are_no_trouble():
    empty = torch.empty(0)
    parked = park((empty, torch.empty(0, 3), None, {"a": 1}))
    parked.away()
    parked.back()
    assert empty.shape == (0,)


def test_nothing_is_parked_from_the_cpu_by_default():
    tensor = torch.ones(3)
    Parked((tensor,), frozenset()).away()
    assert tensor.tolist() == [1, 1, 1]


def test_with_a_folder_what_waits_is_in_files_that_go_when_it_is_back(tmp_path):
    hidden = torch.arange(40_000.0)
    small, ids = torch.ones(3), torch.arange(40_000)
    parked = Parked((hidden, small, ids), frozenset(), folder=tmp_path)
    parked.away()
    assert [bytes_held(tensor) for tensor in (hidden, small, ids)] == [0, 12, 320_000]
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [160_000]
    parked.back()
    assert torch.equal(hidden, torch.arange(40_000.0))
    assert not list(tmp_path.iterdir())
