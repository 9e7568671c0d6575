"""Decoders: gated linear units skip rows of ``up`` and columns of ``down``; tokens are those of the gated model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, at_keep_ratio, gate_of, serve, unwrap, wrap

transformers = pytest.importorskip("transformers")
pytest.importorskip("numba")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Gemma": {"head_dim": 8},
}
IDS = torch.tensor([[3, 14, 15, 9, 26]])


def decoder(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **MODELS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return wrap(model, RegimePolicy(gate=GatePolicy(scope="position")))


def quiet(*args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        return serve(*args, **kwargs)


def tokens(model):
    return model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", MODELS)
def test_generate_gives_the_tokens_of_the_gated_model(kind):
    model = decoder(kind)
    with at_keep_ratio(model, 0.2):
        logits, expected = model(IDS).logits, tokens(model)
    with quiet(model, 0.2, example_inputs={"input_ids": IDS[:, :1]}) as served:
        skipping = {layer.name.rpartition(".")[2] for layer in served.layers if not layer.why}
        assert skipping == {"up_proj", "down_proj"}
        for way in ("sparse", "dense", None):
            served._kind = way
            assert torch.allclose(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(tokens(model), expected)
    assert not gate_of(model).observers
    assert not any(module._forward_pre_hooks for module in model.modules())
    unwrap(model)


class Glu(nn.Module):
    def __init__(self, order="gate first", again=False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 64), nn.Linear(8, 64), nn.Linear(64, 8)
        self.act, self.order, self.again = nn.SiLU(), order, again

    def forward(self, x):
        if self.order == "up first":
            up = self.up(x)
            return self.down(self.act(self.gate(x)) * up)
        active = self.act(self.gate(x))
        up = self.up(x)
        y = self.down(active * up)
        return y + up[..., :8] if self.again else y


@pytest.mark.parametrize(
    ("model", "skips"),
    [(Glu(), True), (Glu("up first"), False), (Glu(again=True), False)],
    ids=["gate first", "up first", "up is used again"],
)
def test_up_skips_only_where_that_is_sound(model, skips):
    model = wrap(nn.Sequential(Glu(model.order, model.again)).eval(), RegimePolicy(gate=GatePolicy(scope="position")))
    x = torch.randn(1, 3, 8)
    with at_keep_ratio(model, 0.1):
        expected = model(x)
    with quiet(model, 0.1, example_inputs=x) as served:
        assert ("0.up" in {layer.name for layer in served.layers if not layer.why}) == skips
        served._kind = "sparse"
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_an_activation_that_was_not_taken_is_forgotten():
    model = wrap(nn.Sequential(Glu()).eval(), RegimePolicy(gate=GatePolicy(scope="position")))
    x = torch.randn(1, 3, 8)
    with quiet(model, 0.1, example_inputs=x) as served:
        served._kind = "sparse"
        glu = model[0]
        glu.act(glu.gate(x))  # an activation without its product
        glu.register_forward_pre_hook(lambda *_: glu.__dict__.update(order="up first"))
        y = model(x)
        served._kind = "dense"
        assert torch.allclose(y, model(x), atol=1e-5)


def test_gpt2_needs_no_copy_where_its_weight_lies_right():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval().to(torch.bfloat16)
    model = wrap(model, RegimePolicy(gate=GatePolicy(scope="position")))
    with at_keep_ratio(model, 0.2):
        expected = model(IDS).logits
    with quiet(model, 0.2, example_inputs={"input_ids": IDS}) as served:
        assert any("mlp.c_proj" in layer.name for layer in served.layers if not layer.why)
        served._kind = "sparse"
        assert torch.allclose(model(IDS).logits, expected, rtol=0.05, atol=0.05)
        assert served.copied_bytes == 0
