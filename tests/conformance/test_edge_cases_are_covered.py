"""Where each edge case of wrapping has its test; the test below checks that the named tests exist.

conformance/test_checkpointing.py
    timm checkpointing: test_timms_checkpointing_gives_the_same_gradients
    torch checkpointing: test_gradients_equal_those_without_checkpointing
    ratio between forward and backward: test_a_ratio_that_changes_between_forward_and_backward_does_not_alter_gradients
    ratio before recomputation: test_a_ratio_that_changes_before_the_recomputation_is_deferred_or_refused
    statistics under recomputation: test_statistics_are_not_doubled_by_recomputation
conformance/test_compiled_exported_and_functional.py
    ScriptModule child: test_a_scripted_child_is_reported
    OptimizedModule: test_wrapped_after_compile_it_is_compiled_anew_and_again_when_unwrapped
    m.compile(): test_a_module_compiled_in_place_is_compiled_anew
    fullgraph with changing ratio: test_a_changing_ratio_compiles_one_frame
    jit.script: test_scripting_a_wrapped_model_is_a_clear_error
    jit.trace: test_a_legacy_trace_gates_as_the_model_does
conformance/test_copies_files_and_weights.py
    pickle and save into a fresh process: test_a_fresh_process_computes_the_same_from_a_file
    EMA copy: test_an_averaged_copy_keeps_the_ratio_it_was_made_at_until_it_is_bound
    wrapped in eval, then trained: test_wrapping_in_eval_mode_and_training_afterwards_updates_batchnorm
    half and bfloat16: test_a_wrapped_model_changes_its_dtype
    channels_last: test_channels_last_goes_through_every_image_site
    meta device, then load: test_a_model_on_the_meta_device_is_wrapped_and_then_loaded
conformance/test_numbers_and_calls.py
    requires_grad: test_wrap_changes_no_requires_grad_and_adds_no_graph
    GoogLeNet's heads: test_googlenets_heads_for_training_come_and_go_with_the_mode
    F.relu(inplace=True) backward: test_backward_works_behind_in_place_activations
    aliased in-place residual: test_a_residual_that_aliases_an_in_place_activation_is_bit_exact_at_full_budget
    optional mask: test_an_optional_argument_may_be_given_or_not
    kwargs only, dicts, dataclasses: test_keywords_dicts_and_dataclasses_go_in_and_out
    empty batch: test_an_empty_batch_passes
    NaN: test_nan_passes_through_and_is_not_hidden
conformance/test_parallel_wrappers.py
    DDP inside and outside: test_wrap_through_ddp_and_back
    DDP gradients are zero, not None: test_under_ddp_parameters_behind_closed_gates_get_zeros_not_none
    FSDP1: test_fsdp1_around_a_wrapped_model
    FSDP1 before wrap: test_wrap_inside_fsdp1
    FSDP2: test_fsdp2_after_wrap
    FSDP2 before wrap: test_fsdp2_before_wrap
    DataParallel replicas: test_data_parallel_replicas_use_their_own_parameters_and_the_shared_gate
conformance/test_timm_models_conform.py
    InplaceAbn: test_the_output_of_inplace_abn_is_gated_once
    EvoNorm: test_the_output_of_evonorm_is_gated
    forward_features: test_features_asked_for_directly_are_gated
    forward_intermediates: test_intermediate_features_asked_for_directly_are_gated
    reset_classifier: test_a_head_with_an_activation_that_reset_classifier_brings_is_flagged
conformance/test_torch_transformations.py
    quantized ConvReLU: test_a_fused_quantized_activation_is_reported
    user hooks of every kind: test_user_hooks_of_every_kind_run_and_come_off_whatever_the_order
conformance/test_transformers_models_conform.py
    HF's shared activations: test_activations_that_models_share_are_gated_in_one_only
    RoBERTa's head: test_the_function_in_robertas_head_is_gated
    ESM's gelu: test_the_local_gelu_of_esm_is_gated_or_reported
    pooler tanh and softmax: test_the_tanh_of_a_pooler_and_attention_weights_are_left_alone
    SwiGLU: test_swiglu_gates_the_activation_and_not_the_product
    MoE experts: test_the_activation_of_experts_is_gated_once_for_each_token_and_expert
    device_map: test_a_device_map_keeps_the_gates
    offload: test_offloading_to_the_cpu_keeps_the_gates
    kernels swapped in: test_kernels_swapped_in_later_leave_their_site_idle
    LoRA after wrap, merge_and_unload: test_lora_after_wrap_and_merge_and_unload_keep_the_gates
    LoRA before wrap: test_lora_before_wrap_is_gated_the_same
    HF checkpointing: test_gradient_checkpointing_gives_the_same_gradients
    generate cached and uncached: test_generation_with_a_cache_is_generation_without
    prefix logits: test_later_tokens_do_not_change_the_logits_of_earlier_ones
    HF masks: test_every_way_of_calling_bert_is_bit_exact_at_full_budget
rewrite/test_source_mechanism.py
    held functions, partials, lists, dicts: test_nothing_escapes_and_unwrap_leaves_nothing
    dropped x.relu_(): test_a_gated_model_is_what_its_reference_computes
    self.step += 1: test_a_counter_in_forward_keeps_counting
    decorated, super(), mangled: test_full_budget_is_bit_exact_and_a_small_one_gates
    no source: test_methods_without_source_are_reported
sites/test_which_activations_are_chosen.py
    squeeze-excite: test_squeeze_excite_in_timm_is_left_alone
wrap/test_awkward_models.py
    activations that models share: test_an_activation_that_models_share_is_gated_in_one_only
    TransformerEncoderLayer in eval, padding mask: test_torchs_encoder_is_gated_in_eval_too_and_bit_exact_when_dense
    nn.LSTM and nn.RNN: test_activations_inside_recurrent_layers_are_reported
wrap/test_verify_finds_what_escaped.py
    replaced child: test_a_replaced_child_is_named
wrap/test_wrap_changes_nothing_else.py
    keep ratio 1 is bitwise the bare model: test_full_budget_is_bit_exact_forward_and_backward
    state_dict keys, strict load both ways: test_state_dicts_load_strictly_both_ways
    isinstance, name and str of the class: test_wrap_keeps_identity_keys_modes_and_randomness
    wrapped twice: test_wrapping_twice_is_refused_and_harmless
    unwrap restores everything: test_unwrap_leaves_nothing_behind
    no buffer, RNG or mode changes: test_wrap_keeps_identity_keys_modes_and_randomness
    deepcopy has one gate of its own: test_a_deep_copy_has_a_gate_of_its_own
    one ReLU called thrice: test_one_activation_called_often_is_one_hook_and_many_gates
    user hooks see gated output: test_user_hooks_see_the_gated_output_and_stay_removable
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


def listed() -> Iterator[tuple[str, str, str]]:
    """Yield the file, the edge case and the test of each line of the list above."""
    path = ""
    for line in (__doc__ or "").partition("\n\n")[2].splitlines():
        if line.startswith(" "):
            case, _, test = line.strip().rpartition(": ")
            yield path, case, test
        else:
            path = line


@pytest.mark.parametrize(("path", "case", "test"), [*listed()])
def test_every_edge_case_has_its_test(path, case, test):
    tree = ast.parse((Path(__file__).parents[1] / path).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert test in tests, f"{case}: {path} has no {test}"
