"""Every holder of a method sees its gates, classes stay the user's, and the old code comes back."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regimewrap import RegimePolicy, at_keep_ratio, gate_of, plan, unwrap, verify, wrap
from regimewrap.errors import WrapError
from regimewrap.rewrite import exchange
from regimewrap.sites.read.code import EXCHANGED
from regimewrap.topk.op import topk_gate

RATIO = 0.1


class Base(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, width), nn.Linear(width, 8)


class Block(Base):
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class Picks(Block):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.fast

    def fast(self, x):
        return self.b(F.gelu(self.a(x)))


class Keeps(Base):
    """A list, a dictionary and a partial of its own methods."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self._first]
        self._table = {"act": functools.partial(self._act), "last": self._last}

    def _first(self, x):
        return self.a(x)

    def _act(self, x):
        return F.gelu(x)

    def _last(self, x):
        return self.b(x)

    def forward(self, x):
        return self._table["last"](self._table["act"](self.steps[0](x)))


def compiled_forward() -> nn.Module:
    model = Block()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def with_the_function_in_a_decorator() -> nn.Module:
    model = Block()
    model.forward = torch.no_grad()(model.forward)
    return model


def noted(method):
    """A decorator of the user's."""

    @functools.wraps(method)
    def noting(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return method(self, *args, **kwargs)

    return noting


class Decorated(Base):
    @noted
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class DecoratedTwice(Base):
    @noted
    @noted
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class Stars(Base):
    def forward(*args):
        self, x = args
        return self.b(F.gelu(self.a(x)))


class Rebinds(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Base()

    def forward(self, x):
        self = self.inner
        return self.b(F.gelu(self.a(x)))


class Comprehends(Base):
    def forward(self, x):
        (h,) = [F.gelu(self) for self in [self.a(x)]]
        return self.b(h)


class Inner(Base):
    def forward(self, x):
        def act(self):
            return F.gelu(self)

        return self.b(act(self.a(x)))


class Counts(Base):
    calls = 0

    def forward(self, x):
        """Count, with a declaration."""
        global COUNTED
        COUNTED += 1
        return self.b(F.gelu(self.a(x)))


COUNTED = 0


class Generates(Base):
    def _pieces(self, x):
        for piece in x.split(len(x)):  # in one piece, as layers round fewer rows another way
            yield F.gelu(self.a(piece))

    def forward(self, x):
        return self.b(torch.cat(list(self._pieces(x))))


class Above(Block):
    def forward(self, x):
        return super().forward(x) + 1


class AboveByName(Above):
    """Calls a method by its class, which in turn uses ``super()``."""

    def forward(self, x):
        return Above.forward(self, x)


def wrapped_bound_method_in_a_closure() -> nn.Module:
    model = Keeps()
    method = model._act
    model._table["act"] = lambda x: method(x)
    return model


HOLDERS = [
    Block,
    Picks,
    Keeps,
    compiled_forward,
    with_the_function_in_a_decorator,
    Decorated,
    DecoratedTwice,
    Stars,
    Rebinds,
    Comprehends,
    Inner,
    Counts,
    Generates,
    Above,
    AboveByName,
    wrapped_bound_method_in_a_closure,
]
every_holder = pytest.mark.parametrize("make", HOLDERS)


def bare(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    home = model.inner if isinstance(model, Rebinds) else model
    kept = topk_gate(F.gelu(home.a(x)), torch.tensor(RATIO, dtype=torch.float64))
    return home.b(kept) + isinstance(model, Above)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@every_holder
def test_whatever_holds_a_method_is_gated_and_unwrap_gives_it_back(make, x):
    model = bare(make)
    dense, types = model(x), [type(each) for each in model.modules()]
    wrap(model, example_inputs=x)
    assert torch.equal(model(x), dense)
    gate_of(model).set_keep_ratio(RATIO)
    assert torch.equal(model(x), by_hand(model, x))
    coverage = verify(model, x)
    assert len(coverage.gated) == 1
    assert coverage.escaped == ()
    assert [type(each) for each in model.modules()] == types
    unwrap(model)
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("make", [each for each in HOLDERS if isinstance(each, type)])
def test_copies_and_files_keep_their_gates_when_the_original_has_gone(make, x):
    model = wrap(bare(make))
    gate_of(model).set_keep_ratio(RATIO)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301  our own
    unwrap(model)
    dense = model(x)
    for each in copies:
        assert torch.equal(each(x), by_hand(each, x))
        assert torch.equal(unwrap(each)(x), dense)


def test_a_model_that_is_collected_while_another_is_wrapped_takes_no_code_away(monkeypatch):
    models, x = [wrap(Block())], torch.randn(4, 8)

    class CollectedMeanwhile(type(EXCHANGED)):
        def get(self, function):
            found = super().get(function)
            models.clear()
            gc.collect()
            return found

    ours = CollectedMeanwhile()
    ours.data = EXCHANGED.data
    monkeypatch.setattr(exchange, "EXCHANGED", ours)
    model = wrap(Block())
    assert not models
    assert verify(model, x).gated == ("forward.gelu",)


def test_the_functions_own_code_comes_back_with_the_last_of_its_users(x):
    class Own(Base):
        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    before = Own.forward.__code__
    first, second = wrap(Own()), wrap(Own())
    assert Own.forward.__code__ is not before
    unwrap(first)
    gate_of(second).set_keep_ratio(RATIO)
    assert torch.equal(second(x), by_hand(second, x))
    twin = copy.deepcopy(second)
    del second
    gc.collect()
    assert torch.equal(twin(x), by_hand(twin, x))
    del twin
    gc.collect()
    assert Own.forward.__code__ is before
    assert Own.forward not in EXCHANGED


def test_a_function_that_two_classes_share_is_gated_in_both(x):
    class Borrows(Base):
        forward = Block.forward

    first, second = wrap(bare(Block)), wrap(bare(Borrows))
    for model in (first, second):
        gate_of(model).set_keep_ratio(RATIO)
        assert torch.equal(model(x), by_hand(model, x))
    unwrap(first)
    assert torch.equal(second(x), by_hand(second, x))
    unwrap(second)


def test_a_class_and_its_models_are_freed():
    def trial() -> tuple[weakref.ref, weakref.ref]:
        held = nn.Linear(1, 1)

        class Own(Base):
            def forward(self, x):
                return self.b(F.gelu(self.a(x))) * held.weight

        model = wrap(Own())
        references = weakref.ref(model), weakref.ref(EXCHANGED[Own.forward])
        unwrap(model)
        return references

    references = trial()
    gc.collect()
    assert [each() for each in references] == [None, None]


def test_bare_models_of_the_class_do_what_they_did(x):
    other = bare(Block)
    expected = other(x)
    model = wrap(bare(Block))
    gate_of(model).set_keep_ratio(RATIO)
    assert torch.equal(other(x), expected)
    assert torch.equal(bare(type(model))(x), expected)
    assert not torch.equal(model(x), expected)


def test_two_policies_gate_two_models_of_one_class_each_at_its_own_places(x):
    class Two(Base):
        def forward(self, x):
            return F.gelu(self.b(F.gelu(self.a(x))))

    first = wrap(bare(Two), RegimePolicy(sites={"exclude": ("forward.gelu",), "include": ("forward.gelu_2",)}))
    second = wrap(bare(Two), RegimePolicy(sites={"exclude": ("forward.gelu_2",), "include": ("forward.gelu",)}))
    assert verify(first, x).gated == ("forward.gelu_2",)
    assert verify(second, x).gated == ("forward.gelu",)
    assert not torch.equal(unwrap(first)(x), 0 * first(x))
    assert verify(second, x).gated == ("forward.gelu",)


@pytest.mark.parametrize("first", ["bare", "wrapped"])
@pytest.mark.parametrize("make", [Block, lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())], ids=["method", "module"])
def test_compiled_code_of_bare_and_wrapped_models_is_not_mixed_up(make, first, x):
    torch.compiler.reset()
    models = {"bare": bare(make), "wrapped": wrap(bare(make))}
    gate_of(models["wrapped"]).set_keep_ratio(RATIO)
    for name in (first, *models):
        compiled = torch.compile(nn.Sequential(models[name]), backend="eager")
        assert torch.equal(compiled(x), models[name](x))
    third = bare(make)
    again = torch.compile(nn.Sequential(third), backend="eager")
    dense = again(x)
    unwrap(models["wrapped"])
    assert torch.equal(again(x), dense)
    wrap(third)
    gate_of(third).set_keep_ratio(RATIO)
    torch.compiler.reset()  # as wrap does where it is given the compiled module
    assert torch.equal(again(x), third(x))
    assert not torch.equal(again(x), dense)
    fourth = wrap(bare(make))
    gate_of(fourth).set_keep_ratio(RATIO)
    assert torch.equal(torch.compile(nn.Sequential(fourth), backend="eager")(x), third(x))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler, looking at inputs
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_blocks_compiled_one_by_one_share_their_graphs(act, x):
    class Residual(Base):
        def __init__(self) -> None:
            super().__init__()
            self.act = act()

        def forward(self, x):
            return x + self.b(self.act(self.a(x)))

    counts = []
    for model in (bare(lambda: nn.Sequential(*[Residual() for _ in range(10)])) for _ in range(2)):
        torch.compiler.reset()
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        if counts:
            wrap(model)
            gate_of(model).set_keep_ratio(RATIO)
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        model(x)
        counts.append(counter.frame_count)
    torch.compiler.reset()
    assert counts[0] == counts[1]


def test_new_objects_of_a_wrapped_class_are_bare_and_can_be_wrapped(x):
    model = wrap(bare(Block))
    new = type(model)(16)
    new(x)
    assert len(verify(wrap(new), x).gated) == 1


def test_making_a_class_is_not_noticed_because_none_is_made():
    registry = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, key, **options) -> None:
            super().__init_subclass__(**options)
            assert key not in registry
            registry[key] = cls

    class Net(Registered, key="net"):
        def forward(self, x):
            return F.gelu(x)

        def __setattr__(self, name, value) -> None:
            if name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

    unwrap(wrap(Net()))
    assert registry == {"net": Net}


def test_code_that_asks_for_its_own_class_gets_it(x):
    class Asks(Block):
        def forward(self, x):
            if type(self) is not Asks:
                raise TypeError(type(self))
            return self.b(F.gelu(self.a(x)))

        def train(self, mode=True):
            super(self.__class__, self).train(mode)
            return self

    wrap(Asks()).train()(x)


def test_a_bound_method_that_was_taken_after_wrap_outlives_unwrap(x):
    model = bare(Block)
    dense = model(x)
    wrap(model)
    model.forward = model.forward  # as accelerate's hooks, bf16 and torch.compile take it
    unwrap(model)
    assert torch.equal(model(x), dense)
    del model.forward
    assert torch.equal(model(x), dense)


def test_an_activation_module_of_the_users_own_is_one_operation_with_its_gate(x):
    class Relu(nn.Module):
        def forward(self, x):
            """Rectify."""
            return torch.relu(x)

    class Inherits(nn.ReLU):
        pass

    def saved(model) -> int:
        sizes = {}
        keep = lambda tensor: sizes.__setitem__(tensor.data_ptr(), tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x).sum()
        return sum(sizes.values())

    for act in (nn.ReLU, Relu, Inherits):
        model = nn.Sequential(nn.Linear(8, 64), act(), nn.Linear(64, 8))
        dense = saved(model)
        wrap(model)
        gate_of(model).set_keep_ratio(RATIO)
        assert saved(model) - dense <= 24  # the budget, which is noted while hooks pack what is saved
        assert verify(model, x).gated == ("1",)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_scripting_is_refused_by_one_error_whatever_is_in_the_model():
    for model in (Block(), nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU())):
        wrap(model)
        for part in (model, list(model.modules())[-1]) if isinstance(model, nn.Sequential) else (model,):
            with pytest.raises(WrapError, match="unwrap"):
                torch.jit.script(part)
    torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))  # a bare one, while wrapped ones live


def test_threads_that_wrap_and_unwrap_do_not_disturb_each_other(x):
    model = wrap(bare(Block))
    gate_of(model).set_keep_ratio(RATIO)
    expected, wrong = model(x), []

    def work() -> None:
        for _ in range(20):
            mine = wrap(Block())
            wrong.extend([] if torch.equal(model(x), expected) else [1])
            unwrap(mine)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(model(x), expected)


SAVED = """
import torch, torch.nn as nn, torch.nn.functional as F
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)
    def forward(self, x):
        return self.b(F.gelu(self.a(x)))
"""
SAVE = "import torch, saved, regimewrap; torch.save(regimewrap.wrap(saved.Net()), 'net.pt')"
LOAD = """
import torch, regimewrap, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = torch.load("net.pt", weights_only=False)
x = torch.randn(3, 4)
dense = model(x)
ratio = regimewrap.gate_of(model)
ratio.set_keep_ratio(0.1)
print("gated" if not torch.equal(model(x), dense) else "bare", [str(each.message) for each in seen])
regimewrap.wrap(regimewrap.unwrap(model))
regimewrap.gate_of(model).set_keep_ratio(0.1)
print("gated" if not torch.equal(model(x), dense) else "bare", float(dense.abs().max()) > 100)
"""


@pytest.mark.parametrize(
    ("edit", "first", "scaled"),
    [
        (lambda source: "# a note\n" + source, "gated []", False),
        (lambda source: source.replace("return self.b", "return 1e4 + self.b"), 'bare ["activations in these', True),
    ],
    ids=["lines that moved", "another forward"],
)
def test_a_saved_model_runs_the_code_of_today(edit, first, scaled, tmp_path):
    def run(code: str) -> list[str]:
        arguments = [sys.executable, "-B", "-c", code]
        return subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.splitlines()

    file = Path(tmp_path / "saved.py")
    file.write_text(SAVED)
    run(SAVE)
    file.write_text(edit(SAVED))
    before, after = run(LOAD)
    assert before.startswith(first)
    assert after == f"gated {scaled}"


def test_the_compilers_settings_are_as_they_were_after_the_last_unwrap():
    code = (
        "import sys, torch, regimewrap\n"
        "make = lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU())\n"
        "finders = list(sys.meta_path)\n"
        "regimewrap.unwrap(regimewrap.wrap(make()))\n"
        "assert sys.meta_path == finders\n"
        "first, second = regimewrap.wrap(make()), regimewrap.wrap(make())\n"
        "import torch._dynamo.config as config\n"
        "assert sys.meta_path == finders and not config.skip_nnmodule_hook_guards\n"
        "regimewrap.unwrap(first)\n"
        "assert not config.skip_nnmodule_hook_guards\n"
        "regimewrap.unwrap(second)\n"
        "assert config.skip_nnmodule_hook_guards\n"
        "regimewrap.wrap(second)\n"
        "assert not config.skip_nnmodule_hook_guards\n"
        "regimewrap.unwrap(second)\n"
        "assert config.skip_nnmodule_hook_guards and sys.meta_path == finders\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_shallow_copy_of_a_relu_has_the_mode_of_its_own(x):
    model = wrap(nn.Sequential(nn.Linear(8, 32), nn.ReLU()))
    twin = copy.copy(model[1])
    gate_of(model).set_keep_ratio(RATIO)
    twin.eval()
    assert torch.equal(twin(x), F.relu(x))
    assert not torch.equal(model[1](x), F.relu(x))


class AsksForLocals(Base):
    def forward(self, x, scale=1.0):
        h = F.gelu(self.a(x)) * scale
        self.seen = sorted(locals()), sorted(vars()), dir()
        return self.b(next(F.relu(each) for each in [h]))


def test_a_function_that_asks_for_its_locals_finds_its_own_only(x):
    model = AsksForLocals()
    model(x)
    bare = model.seen
    wrap(model, example_inputs=x)
    assert verify(model, x).gated == ("forward.gelu", "forward.relu")
    assert model.seen == bare


def test_a_function_that_asks_for_its_locals_after_losing_its_module_is_named():
    class Asks(Base):
        def forward(self, x):
            self = self.eval()
            return self.b(F.gelu(self.a(x))) if locals() else x

    (row,) = plan(Asks()).rows
    assert "locals(), which would show" in row.why


def test_methods_with_type_parameters_are_gated(x):
    if sys.version_info < (3, 12):
        pytest.skip("Python 3.12 has them")
    space: dict = {}
    source = "class Typed(Base):\n    def forward[T](self, x: T) -> T:\n        return self.b(F.gelu(self.a(x)))\n"
    import linecache

    linecache.cache["<typed>"] = (len(source), None, source.splitlines(keepends=True), "<typed>")
    exec(compile(source, "<typed>", "exec"), {"Base": Base, "F": F, "__name__": "typed"}, space)  # noqa: S102
    model = wrap(space["Typed"]())
    with at_keep_ratio(model, RATIO):
        assert torch.equal(model(x), by_hand(model, x))
