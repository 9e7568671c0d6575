from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from regimewrap.errors import MissingExtraError, WrapError
from regimewrap.recipes.models import load_model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a user's module in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    (tmp_path / "users_models.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.Linear(2, 2), nn.ReLU())\n"
        "def needs(width): return nn.Linear(width, width)\n"
        "def number(): return 3\n"
        "def leaves(): raise SystemExit('bye')\n"
        "class Zoo:\n    small = staticmethod(build)\n"
        "ready = build()\n"
        "text = 'x'\n"
    )
    return tmp_path


def test_torchvision_models_are_built_without_memory_for_their_parameters():
    model = load_model("torchvision:resnet18")

    assert type(model).__name__ == "ResNet"
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", ["googlenet", "fasterrcnn_resnet50_fpn"])
def test_no_torchvision_model_fetches_weights_or_warns(name, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_a, **_k: pytest.fail("fetched"))

    assert isinstance(load_model(f"torchvision:{name}"), nn.Module)


def test_timm_models_are_built():
    pytest.importorskip("timm")

    assert type(load_model("timm:resnet10t")).__name__ == "ResNet"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["build", "Zoo.small", "ready"])
def test_a_callable_or_a_module_of_the_current_folder_is_found(name):
    assert isinstance(load_model(f"users_models:{name}"), nn.Sequential)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("resnet18", r"named as torchvision:NAME, timm:NAME or PACKAGE\.MODULE:CALLABLE; got 'resnet18'"),
        ("torchvision:", "named as torchvision:NAME"),
        (":resnet18", "named as torchvision:NAME"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'. Did you mean 'resnet18'"),
        ("torchvison:resnet18", "there is no module 'torchvison'. Did you mean 'torchvision'"),
        ("torch.n:Linear", r"there is no module 'torch\.n'"),
        ("torch.nn.modul:Linear", r"there is no module 'torch\.nn\.modul'. Did you mean 'torch\.nn\.modules'"),
        ("torch.nn:Linaer", r"torch\.nn has no 'Linaer'. Did you mean 'Linear'"),
        ("../evil:x", r"'\.\./evil' is not a module's name"),
        ("users_models:biuld", "users_models has no 'biuld'. Did you mean 'build'"),
        ("users_models:needs", r"users_models:needs\(\) failed: TypeError: .*width.* It is called without arguments"),
        ("users_models:number", r"users_models:number\(\) gave int; expected a torch\.nn\.Module"),
        ("users_models:leaves", r"users_models:leaves\(\) failed: SystemExit: bye"),
        ("users_models:text", "users_models:text is str; expected a torch.nn.Module or a callable"),
    ],
)
def test_what_names_no_model_is_refused_with_what_was_meant(target, message):
    with pytest.raises(WrapError, match=message) as caught:
        load_model(target)

    assert "\n" not in str(caught.value)


def test_timm_names_the_nearest_model():
    pytest.importorskip("timm")

    with pytest.raises(WrapError, match=r"timm has no model 'resnet5O'. Did you mean 'resnet50"):
        load_model("timm:resnet5O")


def test_a_module_that_fails_to_import_says_why_on_one_line(here):
    (here / "users_models.py").write_text("import no_such_package_here\n")

    with pytest.raises(WrapError, match="importing users_models failed: ModuleNotFoundError: No module named 'no_such"):
        load_model("users_models:build")


@pytest.mark.parametrize(("package", "extra"), [("torchvision", "cli"), ("timm", "timm")])
def test_a_missing_package_names_its_extra(monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MissingExtraError, match=rf"\.\[{extra}\]"):
        load_model(f"{package}:resnet18")
