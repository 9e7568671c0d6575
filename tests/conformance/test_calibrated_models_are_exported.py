"""A model that cuts at calibrated thresholds leaves PyTorch's Python behind: export, ONNX, compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from specimens import WRITINGS, Hooked, Rewritten, Traced, bare
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, calibrate, gate_of, insert_gates, unwrap, wrap

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def inserted():
    return insert_gates(bare(Traced), RegimePolicy())


inserted.__name__ = "insert_gates"
MODELS = [*(lambda make=make: wrap(bare(make), RegimePolicy()) for make in WRITINGS), inserted]
every_model = pytest.mark.parametrize("make", MODELS, ids=["hook", "graph", "source", "insert_gates"])
every_scope = pytest.mark.parametrize("scope", ["sample", "position"])


def cut(make, keep_ratio=0.2):
    model = make().eval()
    calibrate(model, [X], (0.5, 0.2)).apply(model, keep_ratio)
    return model


def exported(model, strict=False):
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (X,), dynamic_shapes=({0: batch},), strict=strict)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@every_model
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_holds_standard_operators_and_takes_any_batch(make, strict):
    model = cut(make)
    program = exported(model, strict)

    assert all(name.startswith("aten.") for name in operators(program))
    for x in (X, OTHER, OTHER[:1]):
        torch.testing.assert_close(program.module()(x), model(x))
    assert not torch.allclose(program.module()(X), unwrap(model)(X))


@every_model
@pytest.mark.usefixtures("fresh_compiler")
def test_exported_at_keep_ratio_one_it_is_the_dense_model(make):
    dense = exported(bare(Hooked))
    program = exported(cut(make, 1.0))

    assert operators(program) == operators(dense)
    assert torch.equal(program.module()(X), dense.module()(X))


@every_scope
@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_goes_to_a_file_and_back(scope, tmp_path):
    model = cut(lambda: wrap(bare(Rewritten), RegimePolicy(gate=GatePolicy(scope=scope, channel_dim=1))))
    torch.export.save(exported(model), tmp_path / "model.pt2")

    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(OTHER), model(OTHER))


@every_model
@pytest.mark.filterwarnings("ignore")  # the exporter warns of what it deprecates itself
@pytest.mark.usefixtures("fresh_compiler")
def test_an_onnx_model_computes_the_same(make):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model = cut(make)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(model, (X,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)

    assert {node.domain for node in program.model.graph} == {""}
    run = reference.ReferenceEvaluator(program.model_proto)
    for x in (X, OTHER):
        (y,) = run.run(None, {program.model.graph.inputs[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach())


@every_model
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_it_is_one_graph_that_follows_the_thresholds(make):
    model = make().eval()
    calibration = calibrate(model, [X])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ratio in (0.5, 0.2, 0.1, 0.3, 1.0, 0.05):
        with calibration.apply(model, ratio):
            with torch.compiler.set_stance("force_eager"):
                expected = model(OTHER)
            torch.testing.assert_close(compiled(OTHER), expected)
    assert torch.equal(compiled(OTHER), model(OTHER))


@every_model
def test_copies_and_files_go_on_cutting(make):
    model = cut(make)
    twins = [copy.deepcopy(model)]
    if not isinstance(model, torch.fx.GraphModule):
        twins.append(pickle.loads(pickle.dumps(model)))  # noqa: S301  our own bytes
    for twin in twins:
        assert torch.equal(twin(OTHER), model(OTHER))
        gate_of(twin).set_thresholds(None)
        assert not torch.equal(twin(OTHER), model(OTHER))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


@pytest.mark.usefixtures("fresh_compiler")
def test_an_encoder_is_exported_with_its_thresholds():
    torch.manual_seed(0)
    model = wrap(Encoder(), RegimePolicy(gate=GatePolicy(scope="position"))).eval()
    x = torch.randn(8, 5, 16)
    dense = model(x)
    calibrate(model, [x], (0.2,)).apply(model, 0.2)
    program = torch.export.export(model, (x,))

    assert not torch.allclose(model(x), dense)
    torch.testing.assert_close(program.module()(x), model(x))
