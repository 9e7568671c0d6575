"""Every private name of torch is in one file, and still there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import regimewrap
from regimewrap import torch_private

PACKAGE = Path(regimewrap.__file__).parent
#: Attributes of modules and of autograd that torch documents by name although they begin with an underscore.
PRIVATE = re.compile(
    r"\b(torch|nn|fx|F)\.([a-z_.]+\.)?_[a-zA-Z]|from torch[a-z_.]*\._|from torch\.utils import _"
    r"|\._(version|orig_mod|compiled_call_impl)\b|\b_(forward|backward)_(pre_)?hooks"
)


def test_no_other_file_names_a_private_name_of_torch():
    lines = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_private.py"
        for line in path.read_text().splitlines()
        if PRIVATE.search(line) and "``" not in line
    ]
    assert lines == []


def test_questions_about_what_is_running_are_answered():
    assert not torch_private.in_backward()
    assert not torch_private.is_jit_tracing()
    assert not torch_private.has_dispatch_modes()
    assert not torch_private.has_functorch_transforms()
    assert not torch_private.has_forward_gradients()
    assert torch_private.recomputing_function() is None
    assert not torch_private.has_saved_tensor_hooks()


def test_a_backward_pass_is_noticed():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(torch_private.in_backward()))
    x.sum().backward()
    assert seen == [True]


def test_forward_mode_is_noticed():
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.has_forward_gradients()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_function_that_recomputes_is_known_by_the_number_it_got_in_the_forward_pass(use_reentrant):
    seen = []

    def function(x):
        seen.append(torch_private.recomputing_function())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    before = torch_private.functions_so_far()
    y = checkpoint(function, x, use_reentrant=use_reentrant)
    after = torch_private.functions_so_far()
    y.sum().backward()
    assert seen[0] is None
    assert seen[1] is None if not use_reentrant else before <= seen[1] < after


def test_what_grads_are_batched_over_is_noticed():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: seen.append(torch_private.is_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]


def test_saved_tensor_hooks_are_noticed():
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert torch_private.has_saved_tensor_hooks()


def test_hooks_are_found_and_one_without_its_handle_comes_off():
    layer = nn.ReLU()
    assert not torch_private.has_hooks(layer)
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        handle = getattr(layer, f"register_{kind}_hook")(lambda *_: None)
        assert torch_private.has_hooks(layer)
        handle.remove()
    handle = layer.register_forward_hook(print, with_kwargs=True, always_call=True)
    assert torch_private.forward_hooks(layer) == {handle.id: print}
    torch_private.remove_forward_hook(layer, handle.id)
    assert not torch_private.has_hooks(layer)
    layer(torch.ones(1))


def test_operators_are_known_with_one_signature_and_with_all():
    assert isinstance(torch.ops.aten.relu, torch_private.OPERATORS)
    assert isinstance(torch.ops.aten.relu.default, torch_private.OPERATORS)


def test_what_vmap_maps_over_is_noticed():
    seen = []

    def function(x):
        seen.extend([torch_private.is_batched(x), torch_private.has_functorch_transforms()])
        return x

    torch.vmap(function)(torch.zeros(2))
    assert seen == [True, True]


def test_leaves_of_nested_values_are_found():
    assert torch_private.tree_leaves({"a": [1, (2,)]}) == [1, 2]


def test_a_mode_can_be_left():
    with torch.device("meta"), torch_private.no_dispatch_modes():
        assert not torch_private.has_dispatch_modes()


def test_compiled_models_are_looked_through():
    code = (
        "import torch\n"
        "from regimewrap import torch_private as private\n"
        "model = torch.nn.Linear(2, 2)\n"
        "assert not private.is_compiled_module(model) and not private.compiles_itself(model)\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "assert private.is_compiled_module(compiled) and private.original_of(compiled) is model\n"
        "assert not private.has_compiled_code()\n"
        "compiled(torch.ones(1, 2))\n"
        "assert private.has_compiled_code()\n"
        "import importlib; config = importlib.import_module(private.COMPILER_CONFIG)\n"
        "assert hasattr(config, 'skip_nnmodule_hook_guards')\n"
        "model.compile(backend='eager'); assert private.compiles_itself(model)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plain_module_is_not_compiled():
    assert not torch_private.is_compiled_module(nn.Linear(1, 1))


def test_batch_normalisation_is_known_in_any_number_of_dimensions():
    assert all(
        isinstance(layer(3), torch_private.BatchNorm) for layer in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    )


def test_layers_whose_channels_come_second_are_known_in_any_number_of_dimensions():
    layers = (nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3))
    assert all(isinstance(each, torch_private.BatchOrInstanceNorm) for each in layers)
    convolutions = (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1))
    assert all(isinstance(each, torch_private.Convolution) for each in convolutions)


def test_a_change_in_place_is_counted():
    x = torch.zeros(1)
    before = torch_private.version_of(x)
    x.add_(1)
    assert torch_private.version_of(x) == before + 1
