"""How to run a published checkpoint: for each dialect the commands of the consumers that read it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from run_ckpt.contract.file_names import SUFFIX, TEXT_ENCODER
from run_ckpt.contract.reading import Reading
from run_ckpt.contract.targets import find_readings
from run_ckpt.storage.manifest_file import hash_of_manifests
from run_ckpt.tools.publish.rows import ConvertedComponent

# Presets of classes that make videos.
_VIDEO = ("hunyuan-video", "ltx2", "wan")


@dataclass(frozen=True)
class Consumer:
    """How to run what is read in some ``way`` (see contract/targets.py).

    ``code`` is a template (see commands()), ``needs`` what to install; ``classes`` are patterns, of which the model's
    class must match one. All that builds the model by itself wants a class.
    """

    way: str
    title: str
    language: str
    code: str
    needs: str = ""
    classes: tuple[str, ...] = ("?*",)


# Where a command that installs the tool is typed; the card says how to get one.
CHECKOUT = "a checkout of convert-ckpt"
_OURS = f"in {CHECKOUT}"
_REGISTER = """import torch
from diffusers import DiffusionPipeline, {class_name}
{register}

transformer = {class_name}.from_pretrained("{repo}"{subfolder}, torch_dtype=torch.bfloat16)
pipeline = DiffusionPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)"""
_SGLANG = 'sglang generate --model-path {base} {sglang_paths} --prompt "{prompt}" --save-output'

_VLLM_OMNI = """hf download {repo_id} --local-dir {folder}
run-ckpt assemble {folder} {folder}-pipeline --model-path {base}
vllm serve {folder}-pipeline --omni"""
_CAUSAL = "ForCausalLM"
_FROM_PRETRAINED = """from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo}"{subfolder}, dtype="auto", device_map="auto")"""
# Servers of language models: what only encodes text is none.
_GENERATES = (f"*{_CAUSAL}", "*ForConditionalGeneration")
_BESIDE_SGLANG = f'sglang >= 0.5.23 with our plug-in: `pip install ".[sglang]"` {_OURS}'
_WITH_DIFFUSERS = f'`pip install ".[diffusers]"` {_OURS}'

# In the order of the card.
_CONSUMERS = (
    Consumer("sglang", "SGLang", "sh", _SGLANG, "sglang >= 0.5.23"),
    Consumer("sglang-plugin", "SGLang", "sh", _SGLANG, _BESIDE_SGLANG),
    Consumer(
        "sglang-weights",
        "SGLang",
        "sh",
        'sglang generate --model-path {base} --transformer-weights-path {repo} --prompt "{prompt}" --save-output',
        "sglang >= 0.5.23",
    ),
    Consumer(
        "vllm-omni",
        "vLLM-Omni",
        "sh",
        _VLLM_OMNI,
        "vllm-omni 0.30",
    ),
    Consumer(
        "vllm-omni-plugin",
        "vLLM-Omni",
        "sh",
        _VLLM_OMNI,
        f"vllm-omni 0.30 with our plug-in: `pip install .` {_OURS}",
    ),
    Consumer(
        "diffusers-file",
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
        "diffusers >= 0.42",
    ),
    Consumer(
        "diffusers-plugin",
        "diffusers",
        "python",
        _REGISTER.replace("{register}", "from run_ckpt.integrations.diffusers import register\n\nregister()"),
        _WITH_DIFFUSERS,
    ),
    Consumer(
        "diffusers-quark",
        "diffusers",
        "python",
        _REGISTER.replace("{register}", "import quark.integrations.diffusers  # makes diffusers know the format"),
        "`pip install amd-quark`",
    ),
    Consumer(
        "run-ckpt",
        "Our loader, from the command line",
        "sh",
        """hf download {repo_id} --local-dir {folder}
run-ckpt generate --model-path {base} {loader_paths} --prompt "{prompt}" --output {output}""",
        _WITH_DIFFUSERS,
    ),
    Consumer(
        "transformers",
        "transformers",
        "python",
        _FROM_PRETRAINED,
        "transformers with `pip install compressed-tensors accelerate`",
    ),
    Consumer(
        "transformers-own", "transformers", "python", _FROM_PRETRAINED, "transformers with `pip install accelerate`"
    ),
    Consumer(
        "transformers-plugin",
        "transformers",
        "python",
        """from run_ckpt.integrations.transformers import register
from transformers import {auto_class}

register()
model = {auto_class}.from_pretrained("{repo}"{subfolder}, dtype="auto")""",
        f"`pip install .` {_OURS}",
    ),
    Consumer("vllm", "vLLM", "sh", "vllm serve {repo}", classes=_GENERATES),
    Consumer(
        "vllm-plugin",
        "vLLM",
        "sh",
        "vllm serve {repo}",
        f"vllm 0.30 with our plug-in: `pip install .` {_OURS}",
        classes=_GENERATES,
    ),
    Consumer("sglang-llm", "SGLang", "sh", "python -m sglang.launch_server --model-path {repo}", classes=_GENERATES),
    Consumer(
        "sglang-encoder",
        "SGLang",
        "sh",
        'sglang generate --model-path {base} --component-paths.{component} {repo} --prompt "{prompt}" --save-output',
        "sglang >= 0.5.23 with `pip install compressed-tensors accelerate`",
    ),
    Consumer(
        "run-ckpt",
        "Our loader, in Python",
        "python",
        """from huggingface_hub import snapshot_download
from run_ckpt import load_quantized

model = load_quantized(snapshot_download("{repo_id}"){subpath}, device="cuda")""",
        _WITH_DIFFUSERS,
    ),
)


def how_to_run(components: Sequence[ConvertedComponent], repo_id: str, base: str | None, url: str) -> Iterator[str]:
    """Yield the paragraphs of a card with the commands of each consumer. url: where the tool is."""
    shown = base or "BASE"
    found = [(consumer, group) for group in _groups(components) for consumer in list_consumers(group[0])]
    if base is None and any("{base}" in consumer.code for consumer, _ in found):
        yield "BASE stands for the Hub id or the folder of the pipeline that this was made from."
    if any(CHECKOUT in consumer.needs for consumer, _ in found):
        yield f"For {CHECKOUT}: `git clone {url}`."
    for consumer, group in found:
        of = f", `{group[0].name}`" if group[0] is not components[0] else ""
        needs = f" ({consumer.needs})" if consumer.needs else ""
        text = commands(consumer, group, repo_id, shown)
        yield f"**{consumer.title}**{of}{needs}\n\n```{consumer.language}\n{text}\n```"
    if not found:
        yield _for_our_loader(components[0])
    fetch = f"hf download {repo_id} --local-dir COPY"
    stated = hash_of_manifests({component.name: component.manifest_blake3 for component in components})
    yield f"Check a copy, every byte of it:\n\n```sh\n{fetch}\nrun-ckpt verify COPY --expect {stated}\n```"


def list_consumers(component: ConvertedComponent) -> list[Consumer]:
    """Return how to run a component by each target that it is for, in the order of the card."""
    reasons, readings = component.manifest.targets, find_readings(component.manifest)
    fitting = {name for name, reason in reasons.items() if reason is None}
    ways = {reading.way for name, reading in readings.items() if isinstance(reading, Reading) and name in fitting}
    return [consumer for consumer in _CONSUMERS if consumer.way in ways and _takes(consumer, _class_of(component))]


def commands(consumer: Consumer, components: Sequence[ConvertedComponent], repo_id: str, base: str) -> str:
    """Return the commands as a reader types them. base: Hub id of the model that lends all other components."""
    first = components[0]
    folder = repo_id.rpartition("/")[2]
    inside = f"/{first.name}" if first.name else ""
    names = [component.name for component in components]
    class_name = _class_of(first)
    return consumer.code.format(
        repo=repo_id + (inside if consumer.language == "sh" else ""),
        repo_id=repo_id,
        base=base,
        component=first.name or _component_of(first),
        folder=folder,
        prompt="a red bicycle leaning on a white wall",
        output="video.mp4" if first.manifest.recipe["preset"] in _VIDEO else "image.png",
        class_name=class_name,
        auto_class=f"AutoModel{_CAUSAL}" if class_name.endswith(_CAUSAL) else class_name,
        shard=json.dumps(next((name for name in first.manifest.files if name.endswith(SUFFIX)), ""))[1:-1],
        subfolder=f', subfolder="{first.name}"' if first.name else "",
        subpath=f' + "{inside}"' if inside else "",
        sglang_paths=" ".join(_path_options(names, repo_id, "--component-paths.{}")),
        loader_paths=" ".join(_path_options(names, folder, "--{}-path")),
    )


def _groups(components: Sequence[ConvertedComponent]) -> list[list[ConvertedComponent]]:
    """Return what runs together: all transformers of a pipeline, and each text encoder by itself."""
    encoders = [component for component in components if component.name.startswith(TEXT_ENCODER)]
    others = [component for component in components if component not in encoders]
    return [group for group in (others, *([encoder] for encoder in encoders)) if group]


def _for_our_loader(component: ConvertedComponent) -> str:
    if _class_of(component):
        return "Our loader reads it: `run_ckpt.load_quantized(FOLDER)`."
    return "Its config names no class. Build the model, then fill it: `run_ckpt.load_quantized(FOLDER, model=MODEL)`."


def _class_of(component: ConvertedComponent) -> str:
    return component.manifest.recipe.get("class_name") or ""


def _component_of(component: ConvertedComponent) -> str:
    """Return the name of a text encoder in its pipeline, as its source has it."""
    name = str(component.manifest.source["name"]).rpartition("/")[2]
    return name if name.startswith(TEXT_ENCODER) else TEXT_ENCODER


def _takes(consumer: Consumer, class_name: str) -> bool:
    return any(fnmatchcase(class_name, pattern) for pattern in consumer.classes)


def _path_options(names: list[str], root: str, option: str) -> list[str]:
    """Return the options that name a folder for each component; the first is the usual --transformer-path."""
    options = [f"--transformer-path {root}{'/' if names[0] else ''}{names[0]}"]
    for name in names[1:]:
        spelled = option.format(name if "." in option else name.replace("_", "-"))
        options.append(f"{spelled} {root}/{name}")
    return options
