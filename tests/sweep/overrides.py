"""What the generic rules of `tiny` can't know, by model type. Nested dicts are sub-configs.

`default` are arguments without which a type's default configuration can't be made.
"""

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
MROPE = {"rope_parameters": ROPE}
COMPASS = {"rope_parameters": {"full_attention": None, "sliding_attention": ROPE}}
IMAGE_CODES = {"<image>": 100, **{f"IMGIMG{'ABCDEFGH'[i]}Z": 101 + i for i in range(8)}}
VISUAL_TOKENS = {f"<|visual token {i:06}|>": 101 + i for i in range(8)}
TINY_CODEBOOK = {"num_embeddings": 8, "codebook_size": 8, "base_channels": 32}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {
        "max_value_projector_patch_to_query_dict": 16,
        "projector_patch_to_query_dict": {16: 8},
    },
    "bailing_hybrid": {"num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},
    "blip-2": {"image_token_index": 150},
    "chameleon": {"vocabulary_map": IMAGE_CODES, "vq_config": TINY_CODEBOOK},
    "cohere_compass": {"text_config": COMPASS},
    "cohere_compass_text": COMPASS,
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"layer_types": ["indexed_attention"] * 2}},
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 2},
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 110, **VISUAL_TOKENS},
        "vq_config": {**TINY_CODEBOOK, "hidden_size": 128},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}}},
    "efficientnet": {
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "num_block_repeats": [1] * 7,
    },
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4_assistant": {
        "default": {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        },
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gemma4": {  # its default has no vision tower
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "global_head_dim": 16,
            "patch_size": 8,
            "position_embedding_size": 32,
            "pooling_kernel_size": 2,
        }
    },
    "glm46v": {"text_config": MROPE},
    "glm4v": {"text_config": MROPE},
    "glm4v_moe": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "glmasr": {"audio_config": {"intermediate_size": 256}},
    "glm_ocr": {"text_config": MROPE},
    "glmga": {"text_config": MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite4_vision": {
        "image_grid_pinpoints": [[32, 32]],
        "deepstack_layer_map": [[-1, 0]],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hgnet_v2": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 16, 32, 32],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [16, 32, 32, 64],
        "hidden_sizes": [16, 32, 32, 64],
    },
    "hunyuan_vl": {"text_config": MROPE},
    "inkling_mm_model": {"vision_config": {"num_hidden_layers": 2}},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 8},
    "kosmos-2.5": {"latent_query_num": 8},
    "levit": {"as it is": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32},
    "mamba2": {"head_dim": 32},
    "mllama": {"vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192}},
    "molmo2": {"vision_config": {"image_size": [32, 32], "num_position_embeddings": 16}},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "image_token_id": 150,
        "video_token_id": 151,
        "audio_token_id": 152,
    },
    "mobilevitv2": {"image_size": 64},
    "paddleocr_vl": {"text_config": MROPE},
    "qwen2_5_omni_thinker": {"text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (4, 4)},
    "shieldgemma2": {
        "default": {"yes_token_index": 7, "no_token_index": 8},
        "yes_token_index": 7,
        "no_token_index": 8,
    },
    "step3p7": {"text_config": {"sliding_window": 8}},
    "swin": {"image_size": 64, "window_size": 2, "num_heads": [1, 2, 4, 4]},
    "swinv2": {"image_size": 64, "window_size": 2, "num_heads": [1, 2, 4, 4]},
    "donut-swin": {"image_size": 64, "window_size": 2, "num_heads": [1, 2, 4, 4]},
    "textnet": {"stem_out_channels": 8, "image_size": [64, 64]},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral": {"audio_token_id": 150, "audio_config": {"intermediate_size": 256}},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
