"""The checks that run along with all other tests."""

from __future__ import annotations

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from hf_compress.methods.pruning.mathematics import cubic_sparsity, keep_best_of_rows, snip_magnitude


def test_types_and_shapes_are_checked(request: pytest.FixtureRequest) -> None:
    same = torch.ones(2, 3)
    snip_magnitude(same, same, 1, False)  # an int is a float
    with pytest.raises(BeartypeCallHintViolation):
        snip_magnitude(same, torch.ones(3), 1.0, False)
    with pytest.raises(BeartypeCallHintViolation):
        keep_best_of_rows(torch.ones(2, 3, 4), 1)
    with pytest.raises(BeartypeCallHintViolation):
        cubic_sparsity("1", 0, 2, 0.5)  # type: ignore[arg-type]
    request.getfixturevalue("unchecked_types")
    assert snip_magnitude(same, torch.ones(3), 1.0, False)[1] == 6  # torch itself broadcasts
