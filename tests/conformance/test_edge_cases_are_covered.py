"""Where each edge case of wrapping has its test; the test below checks that the named tests exist.

conformance/test_checkpointing.py
    timm checkpointing: test_timms_checkpointing_gives_the_same_gradients
    torch checkpointing: test_gradients_equal_those_without_checkpointing
    ratio between forward and backward: test_a_ratio_that_changes_between_forward_and_backward_does_not_alter_gradients
    ratio before recomputation: test_a_ratio_that_changes_before_the_recomputation_is_deferred_or_refused
    statistics under recomputation: test_statistics_are_not_doubled_by_recomputation
    checkpoints inside checkpoints: test_blocks_inside_a_checkpoint_are_repeated_at_their_own_ratios
    two ratios in one backward pass: test_a_graph_that_is_kept_is_refused_at_another_ratio_and_recomputed_at_its_own
    compiled checkpoints: test_in_a_compiled_model_a_recomputation_is_part_of_the_one_graph
conformance/test_compiled_exported_and_functional.py
    ScriptModule child: test_a_scripted_child_is_reported
    OptimizedModule: test_wrapped_after_compile_it_is_compiled_anew_and_again_when_unwrapped
    compiled after wrap, fullgraph: test_wrapped_before_compile_it_is_one_graph_that_follows_the_ratio
    torch.export: test_an_exported_program_gates_as_the_model_does
    functional_call: test_functional_call_uses_the_weights_that_it_is_given
    m.compile(): test_wrapped_after_compile_it_is_compiled_anew_and_again_when_unwrapped
    fullgraph with changing ratio: test_a_changing_ratio_compiles_one_frame
    jit.script: test_scripting_a_wrapped_model_is_a_clear_error
    jit.trace: test_a_legacy_trace_gates_as_the_model_does
conformance/test_copies_files_and_weights.py
    state_dict of copies, strict both ways: test_state_dicts_load_strictly_in_both_directions_and_into_copies
    unwrapped after a file: test_a_fresh_process_can_unwrap_what_it_read
    pickle and save into a fresh process: test_a_fresh_process_computes_the_same_from_a_file
    EMA copy: test_an_averaged_copy_keeps_the_ratio_it_was_made_at_until_it_is_bound
    wrapped in eval, then trained: test_wrapping_in_eval_mode_and_training_afterwards_updates_batchnorm
    half and bfloat16: test_a_wrapped_model_changes_its_dtype
    channels_last: test_channels_last_goes_through_every_image_site
    meta device, then load: test_a_model_on_the_meta_device_is_wrapped_and_then_loaded
conformance/test_failed_wraps_leave_no_trace.py
    a failure at each step: test_a_failure_at_any_step_leaves_everything_as_it_was
    a failure after wrapping: test_a_failure_after_wrapping_with_example_inputs_leaves_everything_as_it_was
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
    FSDP2, unwrap, wrap: test_under_fsdp2_a_model_is_unwrapped_and_wrapped_again
    DDP outside: test_ddp_around_a_wrapped_model
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
    fuse_modules after wrap: test_fusing_convolutions_keeps_the_gate_behind_the_activation
    fuse_modules before wrap: test_a_block_that_was_fused_before_is_gated
    SyncBN after wrap: test_sync_batchnorm_conversion_after_wrap
    SyncBN before wrap: test_sync_batchnorm_conversion_before_wrap
    parametrizations: test_parametrizations_before_and_after_wrap
    parametrized and rewritten: test_a_parametrization_and_a_wrap_come_off_in_any_order
    forward called directly: test_a_gated_module_called_by_its_forward_alone_is_flagged
conformance/test_transformers_models_conform.py
    HF's shared activations: test_activations_that_models_share_are_gated_in_one_only
    RoBERTa's head: test_the_function_in_robertas_head_is_gated
    ESM's gelu: test_the_local_gelu_of_esm_is_gated_or_reported
    pooler tanh and softmax: test_the_tanh_of_a_pooler_and_attention_weights_are_left_alone
    SwiGLU: test_swiglu_gates_the_activation_and_not_the_product
    MoE experts: test_the_activation_of_experts_is_gated_once_for_each_token_and_expert
    device_map: test_a_device_map_keeps_the_gates
    offload: test_offloading_to_the_cpu_keeps_the_gates
    accelerate hooks: test_accelerates_hooks_and_ours_live_together
    accelerate hooks come off: test_accelerates_hooks_come_off_in_the_other_order
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
    contradictory policies: test_unknown_kinds_and_contradictions_are_refused
wrap/test_awkward_models.py
    activations that models share: test_an_activation_that_models_share_is_gated_in_one_only
    TransformerEncoderLayer in eval, padding mask: test_torchs_encoder_is_gated_in_eval_too_and_bit_exact_when_dense
    nn.LSTM and nn.RNN: test_activations_inside_recurrent_layers_are_reported
    frozen garbage collector: test_an_activation_that_is_shared_is_found_after_a_garbage_collector_was_frozen
wrap/test_parts_of_a_wrapped_model.py
    unwrap of a part: test_a_part_cannot_be_unwrapped_or_wrapped_by_itself_and_the_error_names_the_whole
    a part that is left: test_what_is_left_of_a_model_can_be_unwrapped
measure/test_verify_finds_what_escaped.py
    replaced child: test_a_replaced_child_is_named
    added child: test_a_replaced_activation_is_told_from_one_that_was_added
    scripted later: test_activations_in_a_part_that_was_scripted_later_are_named
    fused kernel: test_a_module_that_fuses_its_activation_is_named
    replaced forward: test_a_replaced_forward_that_goes_around_a_site_is_an_escape
    replaced part: test_a_module_in_the_place_of_one_with_sites_is_named
    rebound buffers: test_a_buffer_that_forward_puts_another_in_place_of_is_put_back
wrap/test_wrap_changes_nothing_else.py
    keep ratio 1 is bitwise the bare model: test_full_budget_is_bit_exact_forward_and_backward
    state_dict keys, strict load both ways: test_state_dicts_load_strictly_both_ways
    isinstance, name and str of the class: test_wrap_keeps_identity_keys_modes_and_randomness
    wrapped twice: test_wrapping_twice_is_refused_and_harmless
    not a module: test_what_is_not_a_module_is_refused
    scripted as a whole: test_scripted_modules_are_refused
    a pattern that matches nothing: test_a_pattern_that_matches_nothing_names_the_nearest
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
