"""Checkpoints that can't be converted, told by class and tensor names: what each is, and the way from there."""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from convert_ckpt.source.original import originals
from run_ckpt.contract.module_names import matching_names

_BESIDE = "It runs as it is beside a converted transformer: give both to the pipeline."
_NO_CONVOLUTIONS = "no format here stores convolutions"


@dataclass(frozen=True)
class _Signature:
    """A kind of checkpoint, by patterns: its class is one of ``classes``, or all of one of ``tensors`` are there.

    kind: what it is, in words. way: what to do instead.
    """

    kind: str
    way: str
    tensors: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...] = ()

    def matches(self, names: Collection[str], class_name: str | None) -> bool:
        if class_name and any(fnmatchcase(class_name, pattern) for pattern in self.classes):
            return True
        return any(all(matching_names(pattern, names) for pattern in patterns) for patterns in self.tensors)


# The first that matches counts.
_SIGNATURES = (
    _Signature(
        kind="a LoRA of peft, which changes the weights of a model and is none",
        way="Merge it first: PeftModel.from_pretrained(BASE, LORA).merge_and_unload().save_pretrained(MERGED), and"
        " convert MERGED; or convert BASE and load the LoRA beside it.",
        tensors=(("base_model.model.*.lora_A.*",),),
    ),
    _Signature(
        kind="a LoRA, which changes the weights of a model and is none",
        way="Merge it first: pipeline.load_lora_weights(LORA), pipeline.fuse_lora(), pipeline.unload_lora_weights(),"
        " pipeline.transformer.save_pretrained(MERGED), and convert MERGED; or convert the model and load the LoRA"
        " beside it.",
        tensors=tuple((f"*{part}*",) for part in (".lora_A", ".lora_down.", ".lora.down.", ".lokr_w1", ".hada_w1_a")),
    ),
    _Signature(
        kind="a ControlNet",
        way=_BESIDE,
        tensors=(("controlnet_*",), ("control_model.*",), ("control_all_x_embedder.*",)),
        classes=("*ControlNet*",),
    ),
    _Signature(
        kind="a Stable Diffusion 1, 2 or XL file, with UNet, VAE and text encoder in one",
        way=f"UNets are not converted, as {_NO_CONVOLUTIONS}. Give a model with a diffusion transformer.",
        tensors=(("model.diffusion_model.input_blocks.*",),),
    ),
    _Signature(
        kind="a UNet",
        way=f"It stays as it is, as {_NO_CONVOLUTIONS}. Give a model with a diffusion transformer.",
        tensors=(("down_blocks.*.resnets.*", "up_blocks.*"), ("input_blocks.*", "output_blocks.*")),
        classes=("UNet*",),
    ),
    _Signature(
        kind="a VAE",
        way=f"It stays as it is, as {_NO_CONVOLUTIONS}. Convert the transformer beside it.",
        tensors=(("encoder.conv_in.*",), ("decoder.conv_in.*",), ("encoder.conv1.*", "decoder.conv1.*")),
        classes=("Autoencoder*", "*VAE*", "VQModel"),
    ),
)
# Names that other programs than diffusers give the tensors of a class; "*" may be their prefix. The first counts.
_ORIGINAL_NAMES = {
    "LTX2VideoTransformer3DModel": "*audio_patchify_proj.weight",
    "ChromaTransformer2DModel": "*distilled_guidance_layer.norms.0.scale",
    "LTXVideoTransformer3DModel": "*patchify_proj.weight",
    "Lumina2Transformer2DModel": "*layers.0.adaLN_modulation.1.weight",
    "SD3Transformer2DModel": "*joint_blocks.0.x_block.attn.qkv.weight",
    "MochiTransformer3DModel": "*blocks.0.attn.qkv_x.weight",
    "AuraFlowTransformer2DModel": "*double_layers.0.attn.w2q.weight",
    "SanaTransformer2DModel": "*blocks.0.cross_attn.kv_linear.weight",
    "HiDreamImageTransformer2DModel": "*double_stream_blocks.0.block.adaLN_modulation.1.weight",
    "CosmosTransformer3DModel": "net.x_embedder.proj.1.weight",
    "MiniMaxH3Transformer3DModel": "*token_refiner.blocks.0.attn.qkv_proj.weight",
}


def find_refusal(names: Collection[str], class_name: str | None) -> str | None:
    """Return what a checkpoint with these tensors is and what to do instead, None where it may be converted."""
    found = next((signature for signature in _SIGNATURES if signature.matches(names, class_name)), None)
    if found:
        return f"it is {found.kind}. {found.way}"
    original = next((name for name, pattern in _ORIGINAL_NAMES.items() if matching_names(pattern, names)), None)
    if original in (None, class_name, *(mapped.class_name for mapped in originals())):
        return None
    return (
        f"it is a {original} under other names than diffusers'. Write it in diffusers' form first:"
        f" diffusers.{original}.from_single_file(FILE).save_pretrained(DIR), and convert DIR."
    )
