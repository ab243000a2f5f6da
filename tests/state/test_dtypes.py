from __future__ import annotations

import warnings

import pytest
import torch

from aiockpt.errors import UnsupportedValueError
from aiockpt.format.dtypes import BITS, nbytes_of
from aiockpt.state.collect import collect
from aiockpt.state.dtypes import code_of, live_form, stored_form, torch_dtype

ALL_DTYPES = [dtype for name, dtype in sorted(vars(torch).items()) if isinstance(dtype, torch.dtype)]
KEPT = {torch_dtype(code) for code in BITS} | {torch.complex128}


def test_every_code_of_the_format_has_one_dtype():
    """Codes and dtypes stand in a one-to-one relation over the whole table of the format."""
    assert [code_of(torch_dtype(code)) for code in BITS] == list(BITS)
    assert code_of(torch.complex128) is None


@pytest.mark.parametrize("dtype", sorted(KEPT, key=str), ids=str)
def test_stored_form_keeps_the_bytes_and_goes_back(dtype: torch.dtype):
    """Code and shape in the file take as many bytes as the tensor, and give its dtype and shape again."""
    for shape in [(3, 4), (0, 2), (5,)] + ([()] if dtype is not torch.float4_e2m1fn_x2 else []):
        form = stored_form(dtype, shape)
        assert form is not None
        code, stored, mark = form
        assert nbytes_of(code, stored) == torch.empty(shape, dtype=dtype).nbytes
        assert live_form(code, stored, mark) == (dtype, shape)


@pytest.mark.parametrize("dtype", sorted(KEPT, key=str), ids=str)
def test_a_tensor_of_every_kept_dtype_is_collected_without_a_copy(dtype: torch.dtype):
    """Each dtype of the format is taken as the live memory."""
    live = torch.arange(24, dtype=torch.uint8).repeat(4).view(dtype) if dtype is not torch.bool else torch.ones(5) > 0
    collected = collect({"t": live})
    assert collected.tensors[0].data_ptr() == live.data_ptr()
    assert collected.entries[0][1:4] == stored_form(dtype, tuple(live.shape))


@pytest.mark.parametrize("dtype", sorted(set(ALL_DTYPES) - KEPT, key=str), ids=str)
def test_any_other_dtype_is_refused_by_key_and_name(dtype: torch.dtype):
    """complex32, quantized and sub-byte dtypes are refused; the error has the key and the dtype."""
    name = str(dtype).removeprefix("torch.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized tensors, and calls complex32 experimental
        if name.startswith("q"):
            live = torch._empty_affine_quantized([8], scale=1.0, zero_point=0, dtype=dtype)
        else:
            live = torch.empty(4, dtype=dtype)
    with pytest.raises(UnsupportedValueError) as caught:
        collect({"a": {"b.c": live}})
    assert caught.value.key == "a.b.c"
    assert caught.value.type_name == f"Tensor[{name}]"
    assert name in str(caught.value)
    assert caught.value.why
    assert caught.value.next


def test_a_packed_float4_without_dimensions_is_refused():
    """The file doubles the last dimension of float4, so there has to be one."""
    with pytest.raises(UnsupportedValueError, match="float4_e2m1fn_x2"):
        collect({"t": torch.empty((), dtype=torch.float4_e2m1fn_x2)})
