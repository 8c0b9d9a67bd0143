"""A matrix packed is the matrix, and a product with it is the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels_cpu import LANES, SHARE, Form, multiply
from engine.packed_cpu import expand, lay_out, pack

ROWS, COLUMNS = 3 * LANES + 5, 3 * SHARE


def as_q4(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """As GGUF's Q4_1 makes it of random numbers, and gives it back."""
    shares = torch.randn(
        rows, columns // SHARE, SHARE, generator=torch.Generator().manual_seed(seed)
    )
    least = shares.amin(-1, keepdim=True).half().float()
    scale = ((shares.amax(-1, keepdim=True) - shares.amin(-1, keepdim=True)) / 15).half().float()
    return (((shares - least) / scale).round().clamp(0, 15) * scale + least).reshape(rows, columns)


def as_q8(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    shares = torch.randn(
        rows, columns // SHARE, SHARE, generator=torch.Generator().manual_seed(seed)
    )
    scale = (shares.abs().amax(-1, keepdim=True) / 127).half().float()
    return ((shares / scale).round() * scale).reshape(rows, columns)


def as_bf16(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).bfloat16().float()


def as_f32(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


MAKERS = {Form.Q4: as_q4, Form.Q8: as_q8, Form.BF16: as_bf16, Form.F32: as_f32}
BYTES = {Form.Q4: 0.75, Form.Q8: 1.125, Form.BF16: 2, Form.F32: 4}  # a weight


@pytest.mark.parametrize("form", Form)
def test_a_matrix_is_packed_as_what_it_was_and_expands_to_itself(form):
    weight = MAKERS[form](4 * LANES)
    packed = pack(weight)
    assert packed.form is form
    assert packed.nbytes == BYTES[form] * weight.numel()
    assert torch.equal(expand(packed), weight)


@pytest.mark.parametrize("form", [Form.Q4, Form.Q8, Form.BF16])
@pytest.mark.parametrize("at", [(0, 0), (ROWS - 1, COLUMNS - 1), (20, 40)])
def test_one_weight_that_does_not_fit_its_form_exactly_is_kept_exactly(form, at):
    """The last bit of one weight: a quantised copy of it would be a wrong answer that nobody sees."""
    weight = MAKERS[form]()
    weight[at] = torch.nextafter(weight[at], torch.tensor(torch.inf))
    packed = pack(weight)
    assert packed.form is not form
    assert torch.equal(expand(packed), weight)


@pytest.mark.parametrize("constant", [0.0, 0.5, -3.0])
def test_shares_of_one_value_have_no_scale_and_are_packed_all_the_same(constant):
    weight = as_q4()
    weight[:2, :SHARE] = constant
    assert torch.equal(expand(pack(weight)), weight)
    zeros = torch.zeros(LANES, SHARE)
    assert torch.equal(expand(pack(zeros)), zeros)


@given(st.integers(1, 70), st.integers(1, 100), st.sampled_from(Form), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_shape_expands_to_itself(rows, columns, form, seed):
    if form in (Form.Q4, Form.Q8):
        columns = -(-columns // SHARE) * SHARE
    weight = MAKERS[form](rows, columns, seed)
    assert torch.equal(expand(pack(weight)), weight)


def product(matrices, index, rows, x, threads=1):
    out = np.full((len(x), -(-rows // LANES) * LANES), np.nan, np.float32)
    multiply(matrices, index, np.ascontiguousarray(x), out, threads)
    return out[:, :rows]


@pytest.fixture(scope="module")
def laid_out():
    """Matrices of every form and some odd shapes, twice and mixed, so that none begins where a store does."""
    weights = [
        make(rows, columns)
        for rows, columns in ((ROWS, COLUMNS), (LANES, SHARE))
        for make in MAKERS.values()
    ]
    weights += [as_f32(7, 5), as_bf16(33, 1)]
    return weights, lay_out([pack(weight) for weight in weights])


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8])
def test_a_product_is_the_matrix_s_to_within_rounding(laid_out, tokens):
    weights, matrices = laid_out
    for index, weight in enumerate(weights):
        x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens))
        exact = (x.double() @ weight.double().T).numpy()
        found = product(matrices, index, len(weight), x.numpy())
        size = (x.double().abs() @ weight.double().abs().T).numpy()
        assert (np.abs(found - exact) <= 1e-6 * size).all()


def test_a_token_s_product_is_the_same_to_the_bit_whoever_it_is_multiplied_with(laid_out):
    weights, matrices = laid_out
    for index, weight in enumerate(weights):
        x = torch.randn(11, weight.shape[1], generator=torch.Generator().manual_seed(1)).numpy()
        together = product(matrices, index, len(weight), x)
        for first, last in ((0, 1), (0, 2), (3, 7), (5, 8), (1, 11)):
            assert np.array_equal(
                product(matrices, index, len(weight), x[first:last]), together[first:last]
            )
        assert np.array_equal(product(matrices, index, len(weight), x, threads=2), together)
