"""Small checkpoints of further diffusion classes, one at least for each preset that tests/models.py has none for."""

import diffusers
import torch

from tests.models import HEAD_DIM, HIDDEN, N_HEADS, N_TEXT_TOKENS, ROPE_AXES, TEXT_DIM, ModelCase, seeded
from tests.models import WAN_SIZES as WAN
from tests.models import grid_ids as ids
from tests.models import random_values as random

HEADS = {"attention_head_dim": HEAD_DIM, "num_attention_heads": N_HEADS}
TEXT = {"encoder_hidden_states": (1, N_TEXT_TOKENS, TEXT_DIM)}
MASK = {"encoder_attention_mask": torch.ones(1, N_TEXT_TOKENS, dtype=torch.int64)}
HALF = torch.tensor([0.5], dtype=torch.bfloat16)
STEP = torch.tensor([500])
BF16_STEP = torch.tensor([500.0], dtype=torch.bfloat16)
VIDEO = (1, 4, 2, 8, 8)

_HUNYUAN = {
    **HEADS,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
}
_HUNYUAN_INPUTS = {**TEXT, **MASK, "timestep": BF16_STEP}
_COSMOS = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
    "adaln_lora_dim": 32,
    "max_size": (4, 8, 8),
    "concat_padding_mask": False,  # torchvision would resize it
}
_COSMOS_INPUTS = {**TEXT, "hidden_states": VIDEO, "timestep": HALF, "fps": 16}
_WAN_INPUTS = {**TEXT, "timestep": STEP}


def _case(name: str, preset: str, class_name: str, sizes: dict[str, object], inputs: dict[str, object]) -> ModelCase:
    """A case of a class of diffusers; inputs that are shapes are filled with random numbers."""

    def make_inputs() -> dict[str, object]:
        return {key: _filled(value) for key, value in inputs.items()}

    return ModelCase(name, preset, seeded(lambda: getattr(diffusers, class_name)(**sizes)), make_inputs)


def _filled(value: object) -> object:
    """A tuple of sizes becomes random values of that shape, a list of such a list of them."""
    if isinstance(value, list):
        return [_filled(part) for part in value]
    return random(*value) if isinstance(value, tuple) else value


_CASES = (
    _case(
        "chroma",
        "chroma",
        "ChromaTransformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": TEXT_DIM,
            "axes_dims_rope": ROPE_AXES,
            "approximator_hidden_dim": 256,
            "approximator_layers": 1,
        },
        {
            **TEXT,
            "hidden_states": (1, 16, 16),
            "timestep": HALF,
            "img_ids": ids(4, 4, n_axes=3),
            "txt_ids": torch.zeros(N_TEXT_TOKENS, 3),
        },
    ),
    _case(
        "sd3.5",
        "sd3",
        "SD3Transformer2DModel",
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": TEXT_DIM,
            "caption_projection_dim": HIDDEN,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        {**TEXT, "hidden_states": (1, 4, 8, 8), "pooled_projections": (1, 32), "timestep": STEP},
    ),
    _case(
        "hidream",
        "hidream",
        "HiDreamImageTransformer2DModel",
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [TEXT_DIM, TEXT_DIM],
            "text_emb_dim": 32,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (32, 16, 16),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1],
        },
        {
            "hidden_states": (1, 4, 8, 8),
            "timesteps": STEP,
            "encoder_hidden_states_t5": (1, N_TEXT_TOKENS, TEXT_DIM),
            "encoder_hidden_states_llama3": [(1, N_TEXT_TOKENS, TEXT_DIM)] * 2,
            "pooled_embeds": (1, 32),
        },
    ),
    _case(
        "lumina2",
        "lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": HIDDEN,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": N_HEADS,
            "num_kv_heads": N_HEADS,
            "axes_dim_rope": (16, 24, 24),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": TEXT_DIM,
        },
        {
            **TEXT,
            "hidden_states": (1, 4, 8, 8),
            "timestep": HALF,
            "encoder_attention_mask": torch.ones(1, N_TEXT_TOKENS, dtype=torch.bool),
        },
    ),
    _case(
        "cogvideox",
        "cogvideox",
        "CogVideoXTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 32,
            "text_embed_dim": TEXT_DIM,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": N_TEXT_TOKENS,
        },
        {**TEXT, "hidden_states": (1, 2, 4, 8, 8), "timestep": STEP},
    ),
    _case(
        "cosmos",
        "cosmos",
        "CosmosTransformer3DModel",
        _COSMOS,
        _COSMOS_INPUTS,
    ),
    _case(
        "anima",
        "cosmos",
        "CosmosTransformer3DModel",
        {**_COSMOS, "extra_pos_embed_type": None},
        _COSMOS_INPUTS,
    ),
    _case(
        "ltx",
        "ltx",
        "LTXVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "cross_attention_dim": HIDDEN,
            "num_layers": 1,
            "caption_channels": TEXT_DIM,
        },
        {**TEXT, **MASK, "hidden_states": (1, 32, 16), "timestep": STEP, "num_frames": 2, "height": 4, "width": 4},
    ),
    _case(
        "hunyuan-image",
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        {**_HUNYUAN, "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "rope_axes_dim": (32, 32)},
        {**_HUNYUAN_INPUTS, "hidden_states": (1, 4, 4, 4)},
    ),
    _case(
        "hunyuan-video-1.5",
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        {
            **_HUNYUAN,
            "in_channels": 9,
            "out_channels": 4,
            "text_embed_2_dim": TEXT_DIM,
            "image_embed_dim": 32,
            "rope_axes_dim": ROPE_AXES,
        },
        {
            **_HUNYUAN_INPUTS,
            "hidden_states": (1, 9, 2, 4, 4),
            "encoder_hidden_states_2": (1, 3, TEXT_DIM),
            "encoder_attention_mask_2": torch.ones(1, 3, dtype=torch.int64),
            "image_embeds": (1, 4, 32),
        },
    ),
    _case(
        "kandinsky5",
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": TEXT_DIM,
            "in_text_dim2": 32,
            "time_dim": 64,
            "model_dim": HIDDEN,
            "ff_dim": 512,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": ROPE_AXES,
        },
        {
            **TEXT,
            "hidden_states": (1, 2, 8, 8, 4),
            "timestep": STEP,
            "pooled_projections": (1, 32),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(N_TEXT_TOKENS),
        },
    ),
    _case(
        "wan-vace",
        "wan-vace",
        "WanVACETransformer3DModel",
        {**WAN, "num_layers": 1, "vace_layers": [0], "vace_in_channels": 4},
        {**_WAN_INPUTS, "hidden_states": VIDEO, "control_hidden_states": VIDEO},
    ),
    _case(
        "wan-animate",
        "wan-animate",
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "num_layers": 1,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 8,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        {
            **_WAN_INPUTS,
            "hidden_states": (1, 12, 3, 8, 8),
            "pose_hidden_states": (1, 4, 2, 8, 8),
            "face_pixel_values": (1, 3, 5, 16, 16),
        },
    ),
    _case(
        "sana",
        "generic",
        "SanaTransformer2DModel",
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": N_HEADS,
            "cross_attention_head_dim": HEAD_DIM,
            "cross_attention_dim": HIDDEN,
            "caption_channels": TEXT_DIM,
        },
        {**TEXT, "hidden_states": (1, 4, 8, 8), "timestep": STEP},
    ),
    _case(
        "qwen-image-layered",
        "qwen-image",
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "joint_attention_dim": TEXT_DIM,
            "axes_dims_rope": ROPE_AXES,
            "use_additional_t_cond": True,
            "use_layer3d_rope": True,
        },
        {
            **TEXT,
            "hidden_states": (1, 48, 16),  # three layers of 4 x 4
            "encoder_hidden_states_mask": torch.ones(1, N_TEXT_TOKENS, dtype=torch.bool),
            "timestep": HALF,
            "img_shapes": [[[1, 4, 4]] * 3],
            "additional_t_cond": torch.tensor([0]),
        },
    ),
    _case(
        "minimax-h3",
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        {
            **HEADS,
            "hidden_size": HIDDEN,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 512,
            "in_channels": 4,
            "audio_in_channels": 16,
            "text_dim": TEXT_DIM,
            "time_embed_hidden_dim": 64,
            "time_embed_dim": 32,
            "rope_freq_dim": 8,
        },
        {
            **TEXT,
            "hidden_states": (1, 4, 16),
            "audio_hidden_states": (1, 3, 16),
            "timestep": torch.tensor([0.5]),
            "timestep_indices": torch.zeros(12, dtype=torch.int64),
            "token_tags": torch.tensor([1] * N_TEXT_TOKENS + [0] * 4 + [2] * 3),
            "position_ids": torch.arange(12)[:, None].expand(12, 3),
            "video_indices": torch.arange(5, 9),
            "audio_indices": torch.arange(9, 12),
            "text_indices": torch.arange(5),
        },
    ),
)
CLASSES: dict[str, ModelCase] = {case.name: case for case in _CASES}
