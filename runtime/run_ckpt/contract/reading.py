"""How a target reads results: the records that contract/targets.py fills, and what it tells models apart by."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from run_ckpt.contract.file_names import TEXT_ENCODER
from run_ckpt.contract.formats import Scheme
from run_ckpt.contract.module_names import has_experts

# A transformers model that encodes the text of a pipeline: servers load it in another way than a language model.
ENCODER = "encoder"
# How a runtime matches an entry of the ignore list with a linear's name: all of it, any run of its dotted parts, or any
# part of its text.
NAME, PART, TEXT = "name", "part", "text"


@dataclass(frozen=True)
class Reading:
    """Results that a target reads in one way. ``way`` is the key of its commands in tools/publish/consumers.py.

    ``naming`` is the model_kind of what it reads. ``schemes`` is None for all that the dialects say, ``presets`` where
    it builds any class. ``not_for`` maps a pattern on class names to what goes wrong there, ``not_with`` such a pattern
    with a key and a value of config.json, ``keeps_wrong`` one to what goes wrong where projections or experts are kept;
    ``no_experts`` says what does in a mixture of experts.
    ``matching`` says how the ignore list is matched with a linear's name, None where the manifest decides.
    Codes of a linear that it builds as a plain one become its right BF16 weight in the schemes that it ``dequantizes``;
    in all others they are loaded silently wrong, or refused where it ``is_loud``.
    ``fused_scales``: True where scales must be there under fused names too, False where they must not.
    ``keeps_names``: a quantized linear must have the checkpoint's name in the runtime.
    """

    way: str
    naming: str
    dialects: tuple[str, ...]
    schemes: tuple[Scheme, ...] | None = None
    presets: tuple[str, ...] | None = None
    not_for: dict[str, str] = field(default_factory=dict, hash=False)
    not_with: dict[tuple[str, str, object], str] = field(default_factory=dict, hash=False)
    keeps_wrong: dict[str, str] = field(default_factory=dict, hash=False)
    no_experts: str | None = None
    matching: str | None = None
    dequantizes: tuple[Scheme, ...] = ()
    is_loud: bool = True
    fused_scales: bool | None = None
    keeps_names: bool = False

    def says(self, schemes: Iterable[Scheme]) -> bool:
        return self.schemes is None or set(schemes) <= set(self.schemes)

    def refusal(self, linears: Iterable[str]) -> str | None:
        """Return why no result is read with these linears quantized, None where it is."""
        return self.no_experts if has_experts(linears) else None

    def faults(self, class_name: str, config: Mapping[str, Any], kept: Iterable[str]) -> Iterator[str]:
        """Yield what goes wrong with a class, its config.json and the tensors that are kept."""
        lost = self.keeps_wrong if any(map(_is_of_block, kept)) else {}
        known = [*self.not_for.items(), *lost.items()]
        yield from (fault for pattern, fault in known if fnmatchcase(class_name, pattern))
        for (pattern, key, value), fault in self.not_with.items():
            if fnmatchcase(class_name, pattern) and config.get(key) == value:
                yield fault

    def builds(self, preset: str) -> bool:
        return self.presets is None or preset in self.presets


def _is_of_block(tensor: str) -> bool:
    """Return whether a tensor is that of a projection or of experts, by its name in transformers."""
    module = tensor.removesuffix(".weight")
    return module.endswith("_proj") or ".experts." in module


@dataclass(frozen=True)
class Target:
    """A program that runs results: its name in options and manifests, its title, and what it reads, best first."""

    name: str
    title: str
    readings: tuple[Reading, ...]

    def of(self, naming: str, preset: str) -> Iterator[Reading]:
        """Yield how it reads results for models of this naming and preset."""
        return (reading for reading in self.readings if reading.naming == naming and reading.builds(preset))

    def find_reading(
        self, naming: str, preset: str, class_name: str, dialect: str, schemes: Collection[Scheme]
    ) -> Reading | str:
        """Return how it reads a result, if only into wrong weights, or a sentence that says why it does not."""
        readings = list(self.of(naming, preset))
        if not readings and naming == ENCODER:
            return f"{self.title} was not seen to load a quantized text encoder of a pipeline"
        if not readings:
            return f"{self.title} was not seen to load a {class_name}"
        readings = [reading for reading in readings if dialect in reading.dialects]
        if not readings:
            return f"{self.title} does not read the {dialect} dialect of a {class_name}"
        readings = [reading for reading in readings if reading.says(schemes)]
        if not readings:
            return f"{self.title} was not seen to read {' and '.join(map(str, schemes))} in the {dialect} dialect"
        return readings[0]


def model_kind(naming: str, preset: str, source: str) -> str:
    """Return the kind of a model: "diffusers", "transformers" or ENCODER.

    source: its name, which ends in text_encoder* where it is one of a pipeline's, whatever its class.
    """
    is_encoder = preset == "text-encoder" or source.rpartition("/")[2].startswith(TEXT_ENCODER)
    return ENCODER if naming == "transformers" and is_encoder else naming
