"""Small checkpoints of the real model classes, one for each preset: builders, and one forward run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

SEED = 20
# MXFP4 takes N >= 256 and K % 256 == 0: 256 is the smallest hidden size that passes.
HIDDEN = 256
HEAD_DIM = 64
N_HEADS = HIDDEN // HEAD_DIM
TEXT_DIM = 64
N_TEXT_TOKENS = 5
ROPE_AXES = (16, 24, 24)


@dataclass(frozen=True)
class ModelCase:
    """A small model: ``build`` makes it with seeded BF16 weights, ``preset`` is the one it belongs to.

    ``inputs`` makes the seeded arguments of its forward. ``max_shard_size`` is for save_pretrained and
    None for a single file; where it is set, some attention layer has its q, k and v in two shards.
    """

    name: str
    preset: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, object]]
    max_shard_size: str | None = None


def run(case: ModelCase, model: nn.Module) -> torch.Tensor:
    """Return the output of the model's own forward on small seeded inputs, as float32.

    Where the forward returns several tensors (LTX-2: video and audio) they are flattened into one.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        output = model.eval()(**case.inputs(), return_dict=False)
    return torch.cat([tensor.float().flatten() for tensor in _tensors(output)])


def save(case: ModelCase, model: nn.Module, folder: str) -> None:
    """Write the model as the case asks: one file, or shards with an index."""
    if case.max_shard_size:
        model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    else:
        model.save_pretrained(folder)


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder with fixed weights in the dtypes that from_pretrained(bfloat16) gives.

    Default initialisation leaves some tensors zero (pad tokens) and makes all layers alike; here each
    matrix is N(0, 1 / K) times a factor of its own between 0.5 and 2. Buffers stay float32 (rope).
    """

    def build_seeded() -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(SEED)
            model = build()
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    factor = 2 ** (2 * torch.rand(()) - 1)
                    parameter.normal_().mul_(factor * parameter[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.02)
                if not _stays_float32(model, name):
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model.eval()

    return build_seeded


def _stays_float32(model: nn.Module, name: str) -> bool:
    """True where diffusers holds the parameter in float32 whatever is asked for (Wan has such)."""
    return bool(set(name.split(".")) & set(getattr(model, "_keep_in_fp32_modules", None) or ()))


def random_values(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


# Z-Image's feed-forward is int(dim / 3 * 8) wide: 384 gives 1024, which FP8 takes; for MXFP4 the smallest
# is 768, which leaves room for one block only.
def _z_image() -> nn.Module:
    return _z_image_of(dim=384, n_layers=2, n_refiner_layers=1)


def _z_image_wide() -> nn.Module:
    return _z_image_of(dim=768, n_layers=1, n_refiner_layers=0)


def _z_image_of(*, dim: int, n_layers: int, n_refiner_layers: int) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4,
        dim=dim,
        n_layers=n_layers,
        n_refiner_layers=n_refiner_layers,
        n_heads=dim // HEAD_DIM,
        n_kv_heads=dim // HEAD_DIM,
        cap_feat_dim=TEXT_DIM,
        axes_dims=list(ROPE_AXES),
        axes_lens=[64, 32, 32],
    )


def _z_image_inputs() -> dict[str, object]:
    return {
        "x": [random_values(4, 1, 8, 8)],  # [channels, frames, height, width] for each image
        "t": torch.tensor([0.5], dtype=torch.bfloat16),
        "cap_feats": [random_values(N_TEXT_TOKENS, TEXT_DIM)],
    }


def _flux1() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=N_HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=ROPE_AXES,
    )


def _flux1_inputs() -> dict[str, object]:
    return {
        "hidden_states": random_values(1, 16, 16),
        "encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
        "pooled_projections": random_values(1, 32),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], dtype=torch.bfloat16),
        "img_ids": grid_ids(4, 4, n_axes=3),
        "txt_ids": torch.zeros(N_TEXT_TOKENS, 3),
    }


def _flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=N_HEADS,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=64,
        axes_dims_rope=(16, 16, 16, 16),
    )


def _flux2_inputs() -> dict[str, object]:
    return {
        "hidden_states": random_values(1, 16, 16),
        "encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], dtype=torch.bfloat16),
        "img_ids": grid_ids(4, 4, n_axes=4),
        "txt_ids": torch.zeros(N_TEXT_TOKENS, 4),
    }


def grid_ids(height: int, width: int, *, n_axes: int) -> torch.Tensor:
    """Return the position of each image token, [height * width, n_axes], row and column in axes 1 and 2."""
    ids = torch.zeros(height, width, n_axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, n_axes)


def _qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=N_HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    )


def _qwen_image_inputs() -> dict[str, object]:
    return {
        "hidden_states": random_values(1, 16, 16),
        "encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
        "encoder_hidden_states_mask": torch.ones(1, N_TEXT_TOKENS, dtype=torch.bool),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_shapes": [[(1, 4, 4)]],
    }


def _wan_2_2() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**WAN_SIZES)


def _wan_2_1_image_to_video() -> nn.Module:
    from diffusers import WanTransformer3DModel

    sizes = {**WAN_SIZES, "in_channels": 9}  # noise, mask and first frame
    return WanTransformer3DModel(**sizes, image_dim=32, added_kv_proj_dim=HIDDEN)


WAN_SIZES = {
    "num_attention_heads": N_HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "ffn_dim": 512,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _wan_2_2_inputs() -> dict[str, object]:
    return {
        "hidden_states": random_values(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
    }


def _wan_2_1_image_to_video_inputs() -> dict[str, object]:
    return {
        **_wan_2_2_inputs(),
        "hidden_states": random_values(1, 9, 2, 8, 8),
        "encoder_hidden_states_image": random_values(1, 7, 32),
        # Wan 2.1 splits image from text tokens at 512 text tokens (transformer_wan.py, WanAttnProcessor).
        "encoder_hidden_states": random_values(1, 512, TEXT_DIM),
    }


def _hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=N_HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=32,
        rope_axes_dim=ROPE_AXES,
    )


def _hunyuan_video_inputs() -> dict[str, object]:
    return {
        "hidden_states": random_values(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": torch.ones(1, N_TEXT_TOKENS, dtype=torch.int64),
        "pooled_projections": random_values(1, 32),
        "guidance": torch.tensor([6000.0], dtype=torch.bfloat16),
    }


def _ltx2() -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=N_HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HIDDEN,
        audio_in_channels=16,
        audio_out_channels=16,
        audio_num_attention_heads=N_HEADS,
        audio_attention_head_dim=HEAD_DIM // 2,
        audio_cross_attention_dim=HIDDEN // 2,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )


def _ltx2_inputs() -> dict[str, object]:
    return {
        "hidden_states": random_values(1, 32, 16),  # 2 frames of 4 x 4
        "audio_hidden_states": random_values(1, 6, 16),
        "encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
        "audio_encoder_hidden_states": random_values(1, N_TEXT_TOKENS, TEXT_DIM),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, N_TEXT_TOKENS),
        "audio_encoder_attention_mask": torch.ones(1, N_TEXT_TOKENS),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
    }


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_LLM_SIZES, num_key_value_heads=N_HEADS, tie_word_embeddings=False))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # Grouped queries: k and v have N = 128, too few rows for MXFP4, and q stays with them.
    config = Qwen3Config(**_LLM_SIZES, num_key_value_heads=2, head_dim=HEAD_DIM, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config)


_LLM_SIZES = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": 64,
}


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": HIDDEN, "d_kv": HEAD_DIM, "d_ff": 512, "num_layers": 2, "num_heads": N_HEADS}
    model = seeded(lambda: T5EncoderModel(T5Config(**sizes, vocab_size=512, feed_forward_proj="gated-gelu")))()
    for block in model.encoder.block:  # T5 has the attention's scale in the weights of q
        block.layer[0].SelfAttention.q.weight.data *= HEAD_DIM**-0.5
    return model.bfloat16()  # transformers holds wo in float32, but for float16 only


def _t5_inputs() -> dict[str, object]:
    return {"input_ids": torch.randint(0, 512, (1, 12))}


def _llm_inputs() -> dict[str, object]:
    return {"input_ids": torch.randint(0, 512, (1, 12)), "use_cache": False}


_CASES = (
    ModelCase("z-image", "z-image", seeded(_z_image), _z_image_inputs, "3MB"),
    ModelCase("z-image-wide", "z-image", seeded(_z_image_wide), _z_image_inputs),
    ModelCase("flux1", "flux1", seeded(_flux1), _flux1_inputs, "1500KB"),
    ModelCase("flux2", "flux2", seeded(_flux2), _flux2_inputs),
    ModelCase("qwen-image", "qwen-image", seeded(_qwen_image), _qwen_image_inputs, "1500KB"),
    ModelCase("wan-2.2", "wan", seeded(_wan_2_2), _wan_2_2_inputs, "1MB"),
    ModelCase("wan-2.1-i2v", "wan", seeded(_wan_2_1_image_to_video), _wan_2_1_image_to_video_inputs),
    ModelCase("hunyuan-video", "hunyuan-video", seeded(_hunyuan_video), _hunyuan_video_inputs, "2MB"),
    ModelCase("ltx2", "ltx2", seeded(_ltx2), _ltx2_inputs, "1800KB"),
    ModelCase("llama", "dense-llm", seeded(_llama), _llm_inputs, "600KB"),
    ModelCase("qwen3", "dense-llm", seeded(_qwen3), _llm_inputs),
    ModelCase("t5", "text-encoder", _t5, _t5_inputs),
)
MODELS: dict[str, ModelCase] = {case.name: case for case in _CASES}
