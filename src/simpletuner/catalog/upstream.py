"""Options that configurations written for upstream carry and that this version lacks. Standard library only.

Each is met with a warning that names it, never with silence; where leaving it out would change what is trained, the
run is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class Effect(str, Enum):
    """What a run lacks without the option."""

    RESULT = "result"
    MEMORY = "memory"
    SPEED = "speed"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class UpstreamOption:
    """`is_flag`: takes true or false. `inert`: values that ask for nothing, besides false, none, 0 and "" """

    name: str
    effect: Effect
    is_flag: bool = False
    inert: tuple[str, ...] = ()


_RESULT_FLAGS = """
    controlnet control slider_lora_target mixflow_enabled
    train_text_encoder xm_enabled nextlat_enabled irepa_enabled crepa_enabled layersync_enabled
    internal_guidance_enabled twinflow_enabled diff2flow_enabled tread_enabled lr_scale lr_scale_sqrt
"""
_RESULT_VALUES = """
    peft_lora_mode=standard singlora_ramp_up_steps distillation_method distillation_config tread_config
    diffusion_blocks_config timestep_bias_strategy prediction_type=flow_matching
"""
_MEMORY_FLAGS = """
    quantize_activations vae_enable_patch_conv offload_during_save
    optimizer_offload_gradients gradient_checkpointing_offload_attention gradient_checkpointing_offload_prefetch
    set_grads_to_none fsdp_enable fsdp_cpu_offload
"""
_MEMORY_VALUES = """
    musubi_block_swap_device=cpu quantization_config optimizer_cpu_offload_method deepspeed_config
    gradient_checkpointing_segment_stride gradient_checkpointing_backend=torch
    gradient_checkpointing_offload_pin_memory_max_buckets accelerator_cache_clear_interval
"""
_SPEED_FLAGS = """
    fuse_optimizer fuse_qkv_projections disable_tf32 dynamo_fullgraph dynamo_dynamic
    dynamo_use_regional_compilation use_xformers ramtorch_disable_sync_hooks ramtorch_disable_extensions=true
"""
_SPEED_VALUES = "attention_mechanism=diffusers sageattention_usage dynamo_backend dynamo_mode"
_OTHER_FLAGS = """
    i_know_what_i_am_doing seed_for_each_device=true trust_remote_code
    delete_model_after_load strict_epoch_limit ignore_final_epochs validation_prompt_library validation_preview
    validation_randomize validation_disable_unconditional=true validation_using_datasets
    enable_watermark vae_cache_preprocess=true
    aspect_bucket_disable_rebuild ignore_missing_files
    delete_problematic_images delete_unwanted_images print_filenames print_sampler_statistics debug_aspect_buckets
    debug_dataset_loader push_checkpoints_to_hub push_to_hub_background model_card_private
    model_card_safe_for_work checkpointing_use_tempdir delete_invalid_checkpoints same_network
    find_unused_parameters validation_torch_compile
    skip_file_discovery fsdp_reshard_after_forward fsdp_cpu_ram_efficient_loading
    fsdp_limit_all_gathers fsdp_activation_checkpointing use_soft_min_snr rescale_betas_zero_snr
"""
_OTHER_VALUES = """
    init_lora_step init_lora_ema gradient_precision mixflow_gamma
    snr_gamma snr_weight timestep_bias_begin timestep_bias_end
    timestep_bias_multiplier timestep_bias_portion sdnq_weights_dtype sdnq_quantized_matmul_dtype sdnq_group_size
    sdnq_use_quantized_matmul sdnq_compile_mode sdnq_use_hadamard sdnq_hadamard_group_size
    validation_preview_steps=1 validation_epoch_interval validate_after_step validate_after_epoch
    validation_seed_source=cpu validation_image_quality validation_noise_scheduler validation_multigpu
    validation_stitch_input_location validation_adapter_path
    validation_adapter_name validation_adapter_strength validation_adapter_mode validation_adapter_config
    validation_method=simpletuner-local validation_external_script validation_external_background
    evaluation_type pretrained_evaluation_model_name_or_path
    inference_scheduler_timestep_spacing training_scheduler_timestep_spacing
    vae_cache_scan_behaviour read_batch_size image_processing_batch_size
    aspect_bucket_worker_count torch_num_threads metadata_update_interval
    tracker_image_layout custom_tracker logging_dir
    checkpoint_epoch_interval checkpointing_rolling_steps checkpoints_rolling_total_limit disk_low_threshold
    disk_low_action disk_low_script model_card_note modelspec_comment publishing_config post_checkpoint_script
    post_upload_script webhook_reporting_interval num_machines=1 main_process_ip main_process_port machine_rank
    accelerate_config accelerate_extra_args fsdp_version fsdp_state_dict_type fsdp_auto_wrap_policy
    fsdp_transformer_layer_cls_to_wrap context_parallel_size=1 context_parallel_comm_strategy hub_token
"""

_TABLES = (
    (Effect.RESULT, True, _RESULT_FLAGS),
    (Effect.RESULT, False, _RESULT_VALUES),
    (Effect.MEMORY, True, _MEMORY_FLAGS),
    (Effect.MEMORY, False, _MEMORY_VALUES),
    (Effect.SPEED, True, _SPEED_FLAGS),
    (Effect.SPEED, False, _SPEED_VALUES),
    (Effect.OTHER, True, _OTHER_FLAGS),
    (Effect.OTHER, False, _OTHER_VALUES),
)


def _rows_of(table: str, effect: Effect, *, is_flag: bool) -> Iterator[UpstreamOption]:
    for word in table.split():
        name, _, inert = word.partition("=")
        values = tuple(inert.split(",")) if inert else ()
        yield UpstreamOption(name=name, effect=effect, is_flag=is_flag, inert=values)


UPSTREAM: Mapping[str, UpstreamOption] = MappingProxyType(
    {row.name: row for effect, is_flag, table in _TABLES for row in _rows_of(table, effect, is_flag=is_flag)}
)
"""Options that this version lacks."""

_DATASET_RESULT = """
    slider_strength conditioning mask_type
    huggingface.composite_image_config huggingface.filter_func
"""
_DATASET_OTHER = """
    metadata_update_interval
    delete_unwanted_images delete_problematic_images delete_nsfw_images disable_validation hash_filenames
    ignore_epochs memory_filesystem_path
    memory_filesystem_size memory_filesystem_sudo video audio num_frames
"""

DATASET_UPSTREAM: Mapping[str, UpstreamOption] = MappingProxyType(
    {
        row.name: row
        for effect, table in ((Effect.RESULT, _DATASET_RESULT), (Effect.OTHER, _DATASET_OTHER))
        for row in _rows_of(table, effect, is_flag=False)
    }
)
"""Keys of multidatabackend.json that this version lacks."""

IGNORED_KEYS = frozenset(("ez_model_type", "repeats"))
"""Leftovers of upstream's forms in configuration files; they never meant anything to a run."""

IGNORED_PREFIXES = ("__", "aspect_ratio_bucket")

_OFF_WORDS = frozenset(("", "false", "no", "off", "none", "null", "no_change", "0", "0.0", "default"))


def asks_for_something(option: UpstreamOption, value: object) -> bool:
    """Whether `value` turns something on that a run would then lack."""
    if value is None or value == [] or value == {}:
        return False
    word = str(value).strip().lower()
    return word not in _OFF_WORDS and word not in option.inert
