"""Hugging Face's models, with PEFT and Accelerate around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from specimens import assert_same, gradients
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, at_keep_ratio, gate_of, plan, unwrap, verify, wrap

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # noqa: E402

# PEFT asks for the attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

POLICY = RegimePolicy(gate=GatePolicy(scope="position", eval_keep_ratio="current"))
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
TOKENS = torch.arange(2, 14).reshape(2, 6)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))


def esm() -> nn.Module:
    return transformers.EsmForMaskedLM(
        transformers.EsmConfig(**SMALL, pad_token_id=1, position_embedding_type="rotary")
    )


def xlm() -> nn.Module:
    config = transformers.XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2, gelu_activation=True)
    return transformers.XLMWithLMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config)


every_model = pytest.mark.parametrize("make", [bert, roberta, esm, xlm, llama, mixtral, gpt2])
causal = pytest.mark.parametrize("make", [llama, mixtral, gpt2, mamba])


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def wrapped(make, keep_ratio=0.3):
    model = wrap(made(make), POLICY)
    gate_of(model).set_keep_ratio(keep_ratio)
    return model


def logits(model, **kwargs):
    return model(input_ids=TOKENS, **kwargs).logits


@every_model
def test_nothing_escapes_and_the_dense_model_comes_back(make):
    model, plain = wrapped(make, 1.0), made(make)
    expected = logits(plain)
    assert torch.equal(logits(model), expected)
    coverage = verify(model, input_ids=TOKENS)
    assert not coverage.escaped, coverage
    assert not coverage.idle, coverage
    gate_of(model).set_keep_ratio(0.2)
    assert not torch.equal(logits(model), expected)
    unwrap(model)
    assert torch.equal(logits(model), expected)
    assert [type(each) for each in model.modules()] == [type(each) for each in plain.modules()]


@pytest.mark.parametrize("make", [bert, roberta, xlm])
def test_activations_that_models_share_are_gated_in_one_only(make):
    other = made(make)
    expected = logits(other)
    model = wrapped(make, 0.1)
    later = made(make)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(later), expected)
    assert not torch.equal(logits(model), expected)


def test_the_function_in_robertas_head_is_gated():
    names = [row.name for row in plan(made(roberta), POLICY).gated]
    assert any(name.startswith("lm_head.") for name in names), names


def test_the_local_gelu_of_esm_is_gated_or_reported():
    model = wrapped(esm, 0.1)
    coverage = verify(model, input_ids=TOKENS)
    assert not coverage.escaped
    assert sum("gelu" in name or "intermediate" in name for name in coverage.gated) >= 2


def test_the_convolution_of_mamba_is_gated_in_a_copy_of_its_function():
    model, plain = wrapped(mamba), made(mamba)
    coverage = verify(model, input_ids=TOKENS)
    assert not coverage.escaped, coverage
    assert set(coverage.gated) == {f"backbone.layers.{i}.mixer.forward.causal_conv1d_fn.ACT2FN" for i in range(2)}
    dense, sparse = logits(plain), logits(model)
    assert not torch.equal(sparse, dense)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(logits(other), sparse)
    assert torch.equal(logits(plain), dense)
    assert torch.equal(logits(unwrap(model)), dense)


def test_the_tanh_of_a_pooler_and_attention_weights_are_left_alone():
    model = transformers.BertModel(transformers.BertConfig(**SMALL))
    rows = {row.name: row for row in plan(model, POLICY)}
    assert not rows["pooler.activation"].gated
    assert all("intermediate" in row.name for row in rows.values() if row.gated)


def test_swiglu_gates_the_activation_and_not_the_product():
    model, seen = wrapped(llama, 0.25), {}
    gate_of(model).observers.append(lambda site, before, after: seen.update({site.name: (before, after)}))
    inputs = []
    mlp = model.model.layers[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))  # noqa: ARG005
    mlp.up_proj.register_forward_hook(lambda module, args, output: inputs.append(output))  # noqa: ARG005
    logits(model)
    before, after = seen["model.layers.0.mlp.act_fn"]
    up, product = inputs
    assert (after != 0).sum(-1).unique().tolist() == [8]
    assert torch.equal(after[after != 0], before[after != 0])
    assert torch.equal(product, after * up)


def test_the_activation_of_experts_is_gated_once_for_each_token_and_expert():
    model, seen = wrapped(mixtral, 0.25), []
    gate_of(model).observers.append(lambda site, before, after: seen.append((site.name, before, after)))
    logits(model)
    first = [(before, after) for name, before, after in seen if ".0." in name]
    assert sum(before[..., 0].numel() for before, _ in first) == TOKENS.numel() * 2
    assert all((after != 0).sum(-1).unique().tolist() == [8] for _, after in first)


@pytest.mark.parametrize("way", ["plain", "mask", "embeds", "tuple"])
def test_every_way_of_calling_bert_is_bit_exact_at_full_budget(way):
    model, plain = wrapped(bert, 1.0), made(bert)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    embeds = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    kwargs = {
        "plain": {"input_ids": TOKENS},
        "mask": {"input_ids": TOKENS, "attention_mask": mask},
        "embeds": {"inputs_embeds": embeds, "attention_mask": None},
        "tuple": {"input_ids": TOKENS, "return_dict": False},
    }[way]
    mine, theirs = model(**kwargs), plain(**kwargs)
    assert type(mine) is type(theirs)
    assert torch.equal(mine[0], theirs[0])
    gate_of(model).set_keep_ratio(0.2)
    assert not torch.equal(model(**kwargs)[0], theirs[0])


@every_model
def test_hidden_states_are_still_collected(make):
    expected = made(make)(input_ids=TOKENS, output_hidden_states=True).hidden_states
    found = wrapped(make, 1.0)(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@causal
def test_generation_with_a_cache_is_generation_without(make):
    model = wrapped(make)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    cached, uncached = (model.generate(TOKENS, attention_mask=mask, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached, uncached)


@causal
def test_later_tokens_do_not_change_the_logits_of_earlier_ones(make):
    model = wrapped(make)
    whole = model(input_ids=TOKENS).logits[:, :4]
    torch.testing.assert_close(model(input_ids=TOKENS[:, :4]).logits, whole)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("first", ["wrap", "enable"])
def test_gradient_checkpointing_gives_the_same_gradients(make, use_reentrant, first):
    plain, model = wrapped(make), made(make)
    options = {"use_reentrant": use_reentrant}
    if first == "enable":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    if first == "wrap":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for each in (plain, model):
        each.enable_input_require_grads()
        for dropout in (module for module in each.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        each.train()
    recomputed = []
    gate_of(model).observers.append(lambda *_: recomputed.append(torch._C._current_graph_task_id() >= 0))
    found = gradients(model, logits(model, use_cache=False) if make is not bert else logits(model))
    assert any(recomputed), "nothing was checkpointed"
    assert_same(found, gradients(plain, logits(plain)))


@pytest.mark.parametrize("make", [bert, llama])
def test_a_saved_model_comes_back_bare_with_the_same_weights(make, tmp_path):
    model = wrapped(make)
    model.save_pretrained(tmp_path)
    loaded = type(made(make)).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(made(make)))
    wrap(loaded, POLICY)
    gate_of(loaded).set_keep_ratio(0.3)
    assert torch.equal(logits(loaded), logits(model))


def test_kernels_swapped_in_later_leave_their_site_idle():
    model = wrapped(llama)
    mlp = model.model.layers[0].mlp

    def fused(gate):
        return gate * torch.special.expit(gate)  # a SiLU that has no name

    mlp.forward = lambda x: mlp.down_proj(fused(mlp.gate_proj(x)) * mlp.up_proj(x))
    coverage = verify(model, input_ids=TOKENS)
    assert coverage.idle == ("model.layers.0.mlp.act_fn",)
    assert "model.layers.0.mlp.act_fn" in str(coverage)


# PEFT

LORA = {"r": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"], "init_lora_weights": False}


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()


def test_lora_after_wrap_and_merge_and_unload_keep_the_gates():
    model = adapted(wrapped(llama))
    found = logits(model)
    assert gate_of(model).keep_ratio == 0.3
    gate_of(model).set_keep_ratio(1.0)
    torch.testing.assert_close(logits(model), logits(adapted(made(llama))))
    gate_of(model).set_keep_ratio(0.3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), found)
    assert not verify(merged, input_ids=TOKENS).escaped
    assert not hasattr(unwrap(merged).model.layers[0].mlp.gate_proj, "lora_A")


def test_lora_before_wrap_is_gated_the_same():
    model = wrap(adapted(made(llama)), POLICY)
    gate_of(model).set_keep_ratio(0.3)
    torch.testing.assert_close(logits(model), logits(adapted(wrapped(llama))))
    dense = unwrap(model)
    torch.testing.assert_close(logits(dense), logits(adapted(made(llama))))


def test_lora_trains_its_adapters_through_the_gates():
    model = adapted(wrapped(llama))
    found = gradients(model, logits(model))
    trained = {name for name, value in found.items() if value is not None and value.any()}
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_module_that_peft_copies_to_train_stays_under_the_models_gate():
    model = wrapped(bert)
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["cls"])
    model = peft.get_peft_model(model, config).eval()
    assert not verify(model, input_ids=TOKENS).escaped
    gate_of(model).set_keep_ratio(0.1)
    with at_keep_ratio(model, 0.1):
        low = logits(model)
    with at_keep_ratio(model, 1.0):
        assert not torch.equal(logits(model), low)


# Accelerate


class Counts(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):  # noqa: ARG002
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("first", ["wrap", "hook"])
def test_accelerates_hooks_and_ours_live_together(make, first):
    model, counts = made(make), Counts()
    expected, dense = logits(wrapped(make)), logits(made(make))

    def add(model):
        for module in model.modules():
            if module is not model:
                add_hook_to_module(module, counts)

    steps = [lambda: wrap(model, POLICY), lambda: add(model)]
    for step in steps if first == "wrap" else reversed(steps):
        step()
    gate_of(model).set_keep_ratio(0.3)
    assert torch.equal(logits(model), expected)
    assert counts.calls
    assert not verify(model, input_ids=TOKENS).escaped
    if first == "wrap":
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), expected)
        unwrap(model)
    else:
        unwrap(model)
        assert torch.equal(logits(model), dense)
        remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("order", ["wrap_hook_unwrap", "hook_wrap_remove"])
def test_accelerates_hooks_come_off_in_the_other_order(make, order):
    model, counts, dense = made(make), Counts(), logits(made(make))

    def add(model):
        for module in list(model.modules())[1:]:
            add_hook_to_module(module, counts)

    if order == "wrap_hook_unwrap":
        wrap(model, POLICY)
        add(model)
        unwrap(model)
        gated = model
    else:
        add(model)
        gated = wrap(model, POLICY)
        gate_of(gated).set_keep_ratio(0.3)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), logits(wrapped(make)))
        unwrap(model)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("first", ["wrap", "offload"])
def test_offloading_to_the_cpu_keeps_the_gates(make, first):
    model, expected = made(make), logits(wrapped(make))
    steps = [lambda: wrap(model, POLICY), lambda: accelerate.cpu_offload(model, execution_device=torch.device("cpu"))]
    for step in steps if first == "wrap" else reversed(steps):
        step()
    gate_of(model).set_keep_ratio(0.3)
    assert torch.equal(logits(model), expected)
    assert {each.device.type for each in model.parameters()} == {"meta"}


@pytest.mark.parametrize("first", ["wrap", "dispatch"])
def test_a_device_map_keeps_the_gates(first, tmp_path):
    model, expected = made(llama), logits(wrapped(llama))
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}

    def dispatch():
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    steps = [lambda: wrap(model, POLICY), dispatch]
    for step in steps if first == "wrap" else reversed(steps):
        step()
    gate_of(model).set_keep_ratio(0.3)
    assert torch.equal(logits(model), expected)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta


def test_a_copy_of_a_wrapped_language_model_has_a_gate_of_its_own():
    model = wrapped(llama)
    twin = copy.deepcopy(model)
    gate_of(twin).set_keep_ratio(0.1)
    assert torch.equal(logits(model), logits(wrapped(llama)))
    assert torch.equal(logits(twin), logits(wrapped(llama, 0.1)))
