"""config.json of a checkpoint that came without one: from the shapes of its tensors, under diffusers' names."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from run_ckpt.contract.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

# Wan's and LTX-2's norms of q and k are as wide as all heads, so that no shape tells these; all published models have
# them.
_WAN_HEAD_DIM = 128
_LTX2_N_HEADS = 32


def config_of(class_name: str, shapes: Shapes) -> dict[str, Any]:
    """Return config.json. What no shape tells is what all published models of the class have.

    shapes: of tensors that have no place in the class too. Raises CheckpointError where tensors of the class are
    missing or have other shapes.
    """
    try:
        return {"_class_name": class_name, **_CONFIGS[class_name](shapes)}
    except KeyError as error:
        raise CheckpointError(
            f"nothing in it is the {error.args[0]} of a {class_name}, which the rest is of. Give the folder with all"
            " shards, or fetch the file again."
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"its tensors are named as a {class_name}'s, but have other shapes. Give a checkpoint in diffusers' form."
        ) from error


def _flux(shapes: Shapes) -> dict[str, Any]:
    """What FLUX.1 and FLUX.2 share."""
    hidden, in_channels = shapes["x_embedder.weight"]
    out_channels = shapes["proj_out.weight"][0]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def _flux1(shapes: Shapes) -> dict[str, Any]:
    config = _flux(shapes)
    return {
        **config,
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": _axes_16(config["attention_head_dim"]),
    }


def _flux2(shapes: Shapes) -> dict[str, Any]:
    config = _flux(shapes)
    head_dim = config["attention_head_dim"]
    return {
        **config,
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / shapes["x_embedder.weight"][0],
        "axes_dims_rope": [head_dim // 4] * 4,
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _z_image(shapes: Shapes) -> dict[str, Any]:
    dim, patch_dim = shapes["all_x_embedder.2-1.weight"]
    (head_dim,) = shapes["layers.0.attention.norm_q.weight"]
    return {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": patch_dim // 4,
        "dim": dim,
        "n_layers": _count(shapes, "layers"),
        "n_refiner_layers": _count(shapes, "noise_refiner"),
        "n_heads": dim // head_dim,
        "n_kv_heads": dim // head_dim,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8],
        "axes_lens": [1536, 512, 512],
    }


def _qwen_image(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    is_layered = "time_text_embed.addition_t_embedding.weight" in shapes
    return {
        "patch_size": 2,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": _count(shapes, "transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "guidance_embeds": False,
        "axes_dims_rope": _axes_16(head_dim),
        "zero_cond_t": "__index_timestep_zero__" in shapes,  # ComfyUI's mark of Edit-2511, which no shape tells
        "use_additional_t_cond": is_layered,
        "use_layer3d_rope": is_layered,
    }


def _wan(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, *patch = shapes["patch_embedding.weight"]
    image_norm = shapes.get("condition_embedder.image_embedder.norm1.weight")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")  # first and last frame to video
    return {
        "patch_size": patch,
        "num_attention_heads": hidden // _WAN_HEAD_DIM,
        "attention_head_dim": _WAN_HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": image_norm and image_norm[0],
        "added_kv_proj_dim": added and added[1],
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": positions and positions[1],
    }


def _wan_vace(shapes: Shapes) -> dict[str, Any]:
    config = _wan(shapes)
    # No shape tells which blocks read them: in all published models they lie evenly.
    step = config["num_layers"] // _count(shapes, "vace_blocks")
    return {
        **config,
        "vace_layers": list(range(0, config["num_layers"], step)),
        "vace_in_channels": shapes["vace_patch_embedding.weight"][1],
    }


def _wan_animate(shapes: Shapes) -> dict[str, Any]:
    config = _wan(shapes)
    encoder, n_blocks = "motion_encoder", _count(shapes, "motion_encoder.res_blocks")
    widths = [shapes[f"{encoder}.res_blocks.{i}.conv2.weight"][0] for i in range(n_blocks)]
    widths = [shapes[f"{encoder}.conv_in.weight"][0], *widths]  # of 2 ** (n_blocks + 2) pixels, ..., 8, 4
    n_linears = _count(shapes, f"{encoder}.motion_network")
    face_hidden = shapes["face_encoder.conv2.weight"][0]
    return {
        **config,
        "latent_channels": shapes["pose_patch_embedding.weight"][1],
        "motion_encoder_channel_sizes": {str(2 ** (n_blocks + 2 - i)): width for i, width in enumerate(widths)},
        "motion_encoder_size": 2 ** (n_blocks + 2),
        "motion_style_dim": shapes[f"{encoder}.conv_out.weight"][0],
        "motion_dim": shapes[f"{encoder}.motion_network.{n_linears - 1}.weight"][0],
        "motion_encoder_dim": shapes[f"{encoder}.motion_synthesis_weight"][0],
        "face_encoder_hidden_dim": face_hidden,
        "face_encoder_num_heads": shapes["face_encoder.conv1_local.weight"][0] // face_hidden,
        # No shape tells which blocks they follow: in the published model they lie evenly.
        "inject_face_latents_blocks": config["num_layers"] // _count(shapes, "face_adapter"),
    }


def _hunyuan_video(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels, patch_size_t, patch_size, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["proj_out.weight"][0] // (patch_size_t * patch_size**2)
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": _count(shapes, "context_embedder.token_refiner.refiner_blocks"),
        "mlp_ratio": shapes["transformer_blocks.0.ff.net.2.weight"][1] / hidden,
        "patch_size": patch_size,
        "patch_size_t": patch_size_t,
        "qk_norm": "rms_norm",
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_theta": 256.0,
        "rope_axes_dim": _axes_16(head_dim),
        "image_condition_type": "latent_concat" if in_channels == 2 * out_channels + 1 else None,
    }


def _ltx2(shapes: Shapes) -> dict[str, Any]:
    video, audio = _ltx2_stream(shapes, ""), _ltx2_stream(shapes, "audio_")
    return {
        **video,
        **{f"audio_{key}": value for key, value in audio.items()},
        "patch_size": 1,
        "patch_size_t": 1,
        "audio_patch_size": 1,
        "audio_patch_size_t": 1,
        "vae_scale_factors": [8, 32, 32],
        "pos_embed_max_pos": 20,
        "base_height": 2048,
        "base_width": 2048,
        "audio_scale_factor": 4,
        "audio_pos_embed_max_pos": 20,
        "audio_sampling_rate": 16000,
        "audio_hop_length": 160,
        "num_layers": _count(shapes, "transformer_blocks"),
        "qk_norm": "rms_norm_across_heads",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        # Without its projection (2.3 on) the model takes captions as wide as itself, and reads no such number.
        "caption_channels": shapes.get("caption_projection.linear_1.weight", (0, 3840))[1],
        "attention_bias": True,
        "attention_out_bias": True,
        "rope_theta": 10000.0,
        "rope_double_precision": True,
        "rope_type": "split",
        "causal_offset": 1,
        "timestep_scale_multiplier": 1000,
        "cross_attn_timestep_scale_multiplier": 1000,
        "use_prompt_embeddings": "caption_projection.linear_1.weight" in shapes,
        "use_prompt_adaln_single": not video["cross_attn_mod"] or "prompt_adaln.linear.weight" in shapes,
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in shapes,
        "perturbed_attn": video["cross_attn_mod"],  # no shape tells: LTX-2.3 brought both
    }


def _ltx2_stream(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """What LTX-2's streams of video ("") and audio ("audio_") have each."""
    hidden, in_channels = shapes[f"{prefix}proj_in.weight"]
    block = "transformer_blocks.0."
    return {
        "in_channels": in_channels,
        "out_channels": shapes[f"{prefix}proj_out.weight"][0],
        "num_attention_heads": _LTX2_N_HEADS,
        "attention_head_dim": hidden // _LTX2_N_HEADS,
        "cross_attention_dim": shapes[f"{block}{prefix}attn2.to_k.weight"][1],
        "gated_attn": f"{block}{prefix}attn1.to_gate_logits.weight" in shapes,
        "cross_attn_mod": shapes[f"{prefix}time_embed.linear.weight"][0] == 9 * hidden,  # 6 without the prompt's 3
        "ff_bias": f"{block}{prefix}ff.net.2.bias" in shapes,
    }


_CONFIGS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux1,
    "Flux2Transformer2DModel": _flux2,
    "ZImageTransformer2DModel": _z_image,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan_vace,
    "WanAnimateTransformer3DModel": _wan_animate,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "LTX2VideoTransformer3DModel": _ltx2,
}


def _axes_16(head_dim: int) -> list[int]:
    """The rotary axes of FLUX.1, Qwen-Image and HunyuanVideo: 16 for the first, of the rest a half for each other."""
    return [16, (head_dim - 16) // 2, (head_dim - 16) // 2]


def _count(shapes: Shapes, container: str) -> int:
    """Return how many numbered blocks ``container`` has."""
    behind = (name.removeprefix(f"{container}.") for name in shapes if name.startswith(f"{container}."))
    return len({rest.partition(".")[0] for rest in behind})
