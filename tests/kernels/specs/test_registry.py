"""The registry: loads without triton, and is all that backends and tools know of a kernel."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
from torch import Tensor
from trimtab.kernels.ops import TORCH_OPS, Ops
from trimtab.kernels.specs.layers import LAYER_OPS, RMS_NORM, SWIGLU
from trimtab.kernels.specs.registry import SPECS


def test_names_are_unique() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_the_registry_and_the_torch_backend_load_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; "
        "import trimtab.kernels.specs.registry, trimtab.kernels.backend, trimtab.models.decoder"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_layer_operation_is_an_attribute_of_the_torch_operations() -> None:
    assert {RMS_NORM, SWIGLU} <= {*LAYER_OPS} < {*SPECS}
    for spec in LAYER_OPS:
        assert vars(TORCH_OPS)[spec.name] is spec.reference
    with pytest.raises(AttributeError, match="rms_nrm"):
        _ = TORCH_OPS.rms_nrm


def test_every_layer_operation_is_an_attribute_of_the_triton_operations() -> None:
    pytest.importorskip("triton")
    from trimtab.kernels.triton.backend import INVARIANT, TRITON  # noqa: PLC0415

    for spec in LAYER_OPS:
        assert vars(TRITON.ops)[spec.name] is vars(INVARIANT.ops)[spec.name] is spec.launch
        assert spec.launch.__module__.startswith("trimtab.kernels.triton.")


def test_no_layer_operation_has_the_name_of_a_field() -> None:
    assert {spec.name for spec in LAYER_OPS}.isdisjoint(field.name for field in fields(Ops))


def test_operations_can_be_replaced() -> None:
    def identity(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        return x

    ops = replace(TORCH_OPS, layer_ops={**TORCH_OPS.layer_ops, "rms_norm": identity})
    assert ops.rms_norm is identity
    assert ops.swiglu is TORCH_OPS.swiglu
    assert ops != TORCH_OPS


def test_a_launcher_is_given_by_its_path_or_as_a_function() -> None:
    assert replace(SWIGLU, triton=SWIGLU.reference).launch is SWIGLU.reference
    with pytest.raises(ImportError):
        _ = replace(SWIGLU, triton="no_such_module.swiglu").launch
