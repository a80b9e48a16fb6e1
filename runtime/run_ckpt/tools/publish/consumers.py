"""How to run a published checkpoint: for each dialect the commands of the consumers that read it."""

from dataclasses import dataclass

from run_ckpt.tools.publish.rows import ConvertedComponent

# Presets of classes that SGLang's diffusion runtime builds, and those of them that make videos.
_SGLANG_DIFFUSION = ("flux1", "flux2", "hunyuan-video", "ltx2", "qwen-image", "wan", "z-image")
_VIDEO = ("hunyuan-video", "ltx2", "wan")
# Where SGLang and diffusers both find the names of a row-wise FP8 file.
_ROWWISE = ("flux1", "flux2", "qwen-image")


@dataclass(frozen=True)
class Consumer:
    """One consumer and what it reads. ``code`` is a template (see commands()), ``needs`` what to install.

    ``formats``, ``granularities`` and ``presets`` are None where any will do.
    """

    title: str
    language: str
    code: str
    naming: str
    dialects: tuple[str, ...]
    formats: tuple[str, ...] | None = None
    granularities: tuple[str, ...] | None = None
    presets: tuple[str, ...] | None = None
    needs: str = ""

    def reads(self, component: ConvertedComponent) -> bool:
        recipe = component.manifest.recipe
        return (
            recipe["naming"] == self.naming
            and recipe["dialect"] in self.dialects
            and (self.formats is None or recipe["format"] in self.formats)
            and (self.granularities is None or recipe["granularity"] in self.granularities)
            and (self.presets is None or recipe["preset"] in self.presets)
        )


_OURS = "in a checkout of convert-ckpt"
_REGISTER = """import torch
from diffusers import DiffusionPipeline, {class_name}
{register}

transformer = {class_name}.from_pretrained("{repo}"{subfolder}, torch_dtype=torch.bfloat16)
pipeline = DiffusionPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)"""
_SGLANG = 'sglang generate --model-path {base} {sglang_paths} --prompt "{prompt}" --save-output'

# In the order of the card. tests/test_consumers.py and scripts/check_sglang.py run what is installed here.
_CONSUMERS = (
    Consumer(
        "SGLang", "sh", _SGLANG, "diffusers", ("fp8", "modelopt"), presets=_SGLANG_DIFFUSION, needs="sglang >= 0.5.23"
    ),
    Consumer(
        "SGLang",
        "sh",
        _SGLANG,
        "diffusers",
        ("mxfp4",),
        presets=_SGLANG_DIFFUSION,
        needs=f'sglang >= 0.5.23 with our plug-in: `pip install ".[sglang]"` {_OURS}',
    ),
    Consumer(
        "SGLang",
        "sh",
        'sglang generate --model-path {base} --transformer-weights-path {repo} --prompt "{prompt}" --save-output',
        "diffusers",
        ("rowwise",),
        presets=_ROWWISE,
        needs="sglang >= 0.5.23",
    ),
    Consumer(
        "diffusers",
        "python",
        """import torch
from diffusers import BFLQuantizationConfig, DiffusionPipeline, {class_name}
from huggingface_hub import hf_hub_download

transformer = {class_name}.from_single_file(
    hf_hub_download("{repo_id}", "{shard}"),
    config="{base}",
    subfolder="transformer",
    quantization_config=BFLQuantizationConfig(),
    torch_dtype=torch.bfloat16,
)
pipeline = DiffusionPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)""",
        "diffusers",
        ("rowwise",),
        presets=_ROWWISE,
        needs="diffusers >= 0.42",
    ),
    Consumer(
        "diffusers",
        "python",
        _REGISTER.replace("{register}", "from run_ckpt.integrations.diffusers import register\n\nregister()"),
        "diffusers",
        ("mxfp4", "fp8", "modelopt"),
        needs=f'`pip install ".[diffusers]"` {_OURS}',
    ),
    Consumer(
        "diffusers",
        "python",
        _REGISTER.replace("{register}", "import quark.integrations.diffusers  # makes diffusers know the format"),
        "diffusers",
        ("quark",),
        needs="`pip install amd-quark`",
    ),
    Consumer(
        "Our loader, from the command line",
        "sh",
        """hf download {repo_id} --local-dir {folder}
run-ckpt generate --model-path {base} {loader_paths} --prompt "{prompt}" --output {output}""",
        "diffusers",
        ("mxfp4", "fp8", "modelopt"),
        needs=f'`pip install ".[diffusers]"` {_OURS}',
    ),
    Consumer(
        "transformers",
        "python",
        """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")""",
        "transformers",
        ("compressed-tensors",),
        needs="transformers with `pip install compressed-tensors accelerate`",
    ),
    Consumer(
        "transformers",
        "python",
        """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")""",
        "transformers",
        ("fp8",),
        granularities=("block",),
        needs="transformers with `pip install accelerate`",
    ),
    Consumer(
        "transformers",
        "python",
        """from run_ckpt.integrations.transformers import register
from transformers import AutoModelForCausalLM

register()
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")""",
        "transformers",
        ("mxfp4",),
        needs=f"`pip install .` {_OURS}",
    ),
    Consumer("vLLM", "sh", "vllm serve {repo}", "transformers", ("compressed-tensors", "quark", "fp8", "modelopt")),
    Consumer(
        "SGLang",
        "sh",
        "python -m sglang.launch_server --model-path {repo}",
        "transformers",
        ("quark", "fp8", "modelopt"),
    ),
    Consumer(
        "SGLang",
        "sh",
        "python -m sglang.launch_server --model-path {repo}",
        "transformers",
        ("compressed-tensors",),
        formats=("fp8",),
    ),
    Consumer(
        "Our loader, in Python",
        "python",
        """from huggingface_hub import snapshot_download
from run_ckpt import load_quantized

model = load_quantized(snapshot_download("{repo_id}"){subpath}, device="cuda")""",
        "diffusers",
        ("mxfp4", "fp8", "modelopt", "quark", "compressed-tensors"),
        needs=f'`pip install ".[diffusers]"` {_OURS}',
    ),
)


def list_consumers(component: ConvertedComponent) -> list[Consumer]:
    """Return who reads a component of this dialect and class, in the order of the card."""
    return [consumer for consumer in _CONSUMERS if consumer.reads(component)]


def commands(consumer: Consumer, components: tuple[ConvertedComponent, ...], repo_id: str, base: str) -> str:
    """Return the commands as a reader types them. base: Hub id of the model that lends all other components."""
    first = components[0]
    folder = repo_id.rpartition("/")[2]
    inside = f"/{first.name}" if first.name else ""
    names = [component.name for component in components]
    return consumer.code.format(
        repo=repo_id + (inside if consumer.language == "sh" else ""),
        repo_id=repo_id,
        base=base,
        folder=folder,
        prompt="a red bicycle leaning on a white wall",
        output="video.mp4" if first.manifest.recipe["preset"] in _VIDEO else "image.png",
        class_name=first.manifest.recipe["class_name"],
        shard=next((name for name in first.manifest.files if name.endswith(".safetensors")), ""),
        subfolder=f', subfolder="{first.name}"' if first.name else "",
        subpath=f' + "{inside}"' if inside else "",
        sglang_paths=" ".join(_path_options(names, repo_id, "--component-paths.{}")),
        loader_paths=" ".join(_path_options(names, folder, "--{}-path")),
    )


def _path_options(names: list[str], root: str, option: str) -> list[str]:
    """Return the options that name a folder for each component; the first is the usual --transformer-path."""
    options = [f"--transformer-path {root}{'/' if names[0] else ''}{names[0]}"]
    for name in names[1:]:
        spelled = option.format(name if "." in option else name.replace("_", "-"))
        options.append(f"{spelled} {root}/{name}")
    return options
