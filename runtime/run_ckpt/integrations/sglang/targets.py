"""Which linear of SGLang's model holds which layers of a checkpoint, by its own map of names (pure)."""

from collections.abc import Callable, Mapping

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.integrations.serving.share import Target

# A checkpoint's tensor name -> the model's, its place among the tensors fused there, how many these are.
# The name "" stands for a tensor that is left out. This is the form of SGLang's own map.
Place = tuple[str, int | None, int | None]
Rename = Callable[[str], Place]

_WEIGHT = ".weight"


def find_targets(manifest: Manifest, rename: Rename) -> dict[str, Target]:
    """Return module of the model -> target, for every quantized layer.

    rename: where the model has a tensor of that name, as SGLang maps it. Raises FaultsError for
    layers that are to be fused with others that are missing, unquantized or quantized differently.
    """
    places = {module: rename(module + _WEIGHT) for module in manifest.layers}
    members: dict[str, dict[int, Layer]] = {}
    counts: dict[str, int] = {}
    for module, (name, index, count) in places.items():
        members.setdefault(name, {})[index or 0] = manifest.layers[module]
        counts[name] = max(count or 1, counts.get(name, 1))
    faults = [fault for name in members for fault in _faults(name, members[name], counts[name])]
    if faults:
        raise FaultsError("SGLang can't hold the quantized layers of this checkpoint", faults)
    targets = {}
    for name, layers in members.items():
        module = name.removesuffix(_WEIGHT)
        targets[module] = Target(module, tuple(layers[index] for index in sorted(layers)))
    return targets


def rename_tensors(manifest: Manifest, targets: Mapping[str, Target], rename: Rename) -> Rename:
    """Return ``rename`` extended by every tensor of the quantized layers.

    SGLang's own rules know the weights alone. Scales that repeat those of fused members under the
    fused name are left out: they come with the members.
    """
    places: dict[str, Place] = dict.fromkeys(manifest.fused_scales, ("", None, None))
    for target in targets.values():
        is_fused = len(target.layers) > 1
        for index, layer in enumerate(target.layers):
            fused = (index, len(target.layers)) if is_fused else (None, None)
            places.update({name: (f"{target.module}.{role}", *fused) for role, name in layer.tensors.items()})
    return lambda name: places[name] if name in places else rename(name)


def _faults(name: str, members: Mapping[int, Layer], count: int) -> list[str]:
    modules = ", ".join(members[index].module for index in sorted(members))
    if set(members) != set(range(count)):
        return [
            f"{modules}: fused with others into {name} ({count} tensors), but only these are quantized."
            " Convert again with a rule that treats them alike."
        ]
    schemes = [(layer.scheme, layer.K) for layer in members.values()]
    kinds = sorted({(scheme.format.name, scheme.layout.name, scheme.granularity, K) for scheme, K in schemes})
    if len(kinds) > 1:
        return [
            f"{modules}: fused into {name}, but their (format, layout, granularity, K) are {kinds}."
            " Convert again with a rule that treats them alike."
        ]
    return []
