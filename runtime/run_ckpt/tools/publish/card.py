"""The model card of a result: how to run it, what was measured, how to make it again (pure)."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from run_ckpt.contract.display import shown
from run_ckpt.contract.file_names import MAP_NAME, join_names
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import GPTQ, INPUT_SCALE, MANIFEST_NAME, RTN, Layer
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.consumers import how_to_run
from run_ckpt.tools.publish.hardware import hardware, memory
from run_ckpt.tools.publish.metadata import front_matter, hub_id, make_metadata
from run_ckpt.tools.publish.rows import ConvertedComponent, TensorRow
from run_ckpt.tools.publish.tool_url import PLACEHOLDER

_N_WORST = 10
# Of convert-ckpt, those with a value that is left out where there is none.
_LATER_OPTIONS = (
    "recipe",
    "calibration",
    "method",
    "shard_size",
    "max_size",
    "min_sqnr",
    "sensitivities",
    "keep_first",
    "keep_last",
)
_HUB_URL = "https://huggingface.co"


def make_card(
    components: Sequence[ConvertedComponent],
    repo_id: str,
    *,
    base_model: str | None = None,
    has_map: bool = False,
    url: str = PLACEHOLDER,
) -> str:
    """Return README.md for a result that is to be found as ``repo_id``; every number in it is from the manifests.

    url: where the tool is to be found.
    """
    base = base_model or hub_id(components)
    sections = (
        [front_matter(make_metadata(components, base_model=base_model)) + f"# {repo_id.rpartition('/')[2]}"],
        _what_it_is(components, base),
        [f"![SQNR of every layer, by block and projection]({MAP_NAME})"] if has_map else [],
        ["## How to run it", *how_to_run(components, repo_id, base, url)],
        ["## Hardware", *_hardware(components), *memory(components)],
        ["## What was measured", *_measured(components)],
        ["## What stays as it was", *_kept(components)],
        ["## How to make it again", *_reproduce(components)],
    )
    return "\n\n".join(paragraph for section in sections for paragraph in section) + "\n"


def format_name(components: Iterable[ConvertedComponent]) -> str:
    """Return the formats of the layers as people call them."""
    schemes = {layer.scheme for component in components for layer in component.manifest.layers.values()}
    shuffled = {scheme: f"{scheme.layout.label} " if scheme.layout != PLAIN else "" for scheme in schemes}
    return " and ".join(sorted({before + scheme.format.label for scheme, before in shuffled.items()}))


def _rounding(layers: Sequence[Layer]) -> str:
    """Say how codes and activation scales were chosen."""
    n_gptq = sum(layer.method == GPTQ for layer in layers)
    is_static = any(INPUT_SCALE in layer.tensors for layer in layers)
    chosen = "Weights are rounded to nearest"
    if n_gptq:
        others = "" if n_gptq == len(layers) else f"; those of the other {len(layers) - n_gptq} are the nearest"
        chosen = f"GPTQ chose the codes of {n_gptq} layers by statistics of their inputs{others}"
    if is_static:
        return f"{chosen}; static activation scales come from calibration."
    return f"{chosen}." if n_gptq else f"{chosen}, without calibration data."


def _folded(components: Sequence[ConvertedComponent]) -> str:
    """Say which tensors are not the source's own, and for whom that matters."""
    changed = ", but for norms and modulations that smooth the inputs of layers, which make up for it"
    lora = "; a LoRA that was trained on the source does not fit"
    return changed + lora if any(component.manifest.folds for component in components) else ""


def _calibrated_with(recipe: Mapping[str, Any]) -> str:
    """Say how statistics were recorded; nothing where there are none."""
    settings = recipe.get("calibrated_with")
    if not settings:
        return ""
    listed = ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(settings.items()))
    return f" The statistics, {_code(recipe.get('calibration'))}, were recorded with {_code(listed)}."


def _what_it_is(components: Sequence[ConvertedComponent], base: str | None) -> Iterator[str]:
    source, recipe = components[0].manifest.source, components[0].manifest.recipe
    class_name = _code(recipe["class_name"]) if recipe.get("class_name") else "model"
    # Of a Hub repo this is owner/name/component.
    name = f"[{_code(source['name'])}]({_HUB_URL}/{base})" if hub_id(components) else _code(source["name"])
    at = (
        f" at commit [{_code(source['revision'][:12])}]({_HUB_URL}/{base}/tree/{source['revision']})"
        if base and source.get("revision")
        else ""
    )
    layers = sum(component.summary.n_layers for component in components)
    rounding = _rounding([layer for component in components for layer in component.manifest.layers.values()])
    budget = recipe.get("budget")
    chosen = (
        f" Each layer's format was chosen to meet {_prose(_budget(recipe))}, by {_prose(budget['by'])}."
        if budget
        else ""
    )
    before = components[0].manifest.source_quantization
    others = f"The source was {_prose(before)}. All" if before else "All"
    yield (
        f"The {class_name} of {name}{at} with its linear layers in {format_name(components)}."
        f" {layers} layers were quantized offline by {_prose(components[0].summary.tool)}. {others} other tensors are"
        f" bit for bit those of the source{_folded(components)}.{chosen} {rounding}{_calibrated_with(recipe)}"
    )
    rows = [
        (
            _code(component.name) if component.name else "all files",
            format_nbytes(component.summary.source_nbytes),
            format_nbytes(component.summary.output_nbytes),
            f"{component.summary.source_nbytes / max(1, component.summary.output_nbytes):.2f}",
            f"{component.summary.share_of_parameters:.1%}",
        )
        for component in components
    ]
    yield _table(("", "before", "after", "times smaller", "parameters quantized"), rows, right=4)


def _hardware(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    schemes = {layer.scheme for component in components for layer in component.manifest.layers.values()}
    for scheme in sorted(schemes, key=str):
        yield hardware(scheme)


def _measured(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    quantized = [row for component in components for row in component.rows if row.is_quantized]
    yield (
        "SQNR of a layer is 10 log10(sum w² / sum (w - decoded)²) over its weights, in dB: more is better, and 6 dB are"
        " a factor of two. It says how well weights survived, not how a picture or a text looks."
    )
    is_calibrated = any(row.method for row in quantized)
    if is_calibrated:
        yield (
            "Output SQNR is the same of what a layer computes, measured on samples that were held out. GPTQ's codes are"
            " farther from the weights and nearer to what the layer computes."
        )
    columns = ("layer", "count", "N × K", "format", "mean SQNR", "worst SQNR", "codes", "worst output SQNR")
    n_columns = len(columns) if is_calibrated else len(columns) - 2
    kinds: dict[tuple[str, str, tuple[int, ...]], list[TensorRow]] = {}
    for row in quantized:
        kinds.setdefault((row.kind, row.stored_as, row.shape), []).append(row)
    lines = []
    for (kind, stored_as, shape), rows in kinds.items():
        values = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        mean = fmean(values) if values else None
        size = " × ".join(map(str, shape))
        measured = (_db(mean), _db(min(values, default=None)), _codes(rows), _db(_worst_output(rows)))
        lines.append((_code(kind), str(len(rows)), size, stored_as, *measured)[:n_columns])
    yield _table(columns[:n_columns], lines, right=2)
    ranked = sorted((row for row in quantized if row.sqnr_db is not None), key=lambda row: row.sqnr_db or 0.0)
    titles = ("layer", "SQNR", "largest error of a weight", "codes", "output SQNR")
    n_titles = len(titles) if is_calibrated else len(titles) - 2
    worst = [
        (
            *(_code(row.path), _db(row.sqnr_db), f"{row.max_abs_error:.4g}"),
            *(_codes([row]), _db(row.output_sqnr_db)),
        )[:n_titles]
        for row in ranked[:_N_WORST]
    ]
    title = f"The {len(worst)} worst layers:" if len(ranked) > len(worst) else "All layers, worst first:"
    yield title + "\n\n" + _table(titles[:n_titles], worst, right=1)


def _codes(rows: Sequence[TensorRow]) -> str:
    """Return how the codes of rows were chosen, with how many were so where they differ."""
    words = {GPTQ: "GPTQ", RTN: "nearest", None: "nearest"}
    counts = Counter(words[row.method] for row in rows)
    return " and ".join(f"{count} {name}" if len(counts) > 1 else name for name, count in sorted(counts.items()))


def _worst_output(rows: Sequence[TensorRow]) -> float | None:
    return min((row.output_sqnr_db for row in rows if row.output_sqnr_db is not None), default=None)


def _kept(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    reasons: dict[tuple[str, str], list[TensorRow]] = {}
    for component in components:
        for row in component.rows:
            if row.is_linear and not row.is_quantized:
                reasons.setdefault((row.reason, row.stored_as), []).append(row)
    n_others = sum(not row.is_linear for component in components for row in component.rows)
    if reasons:
        lines = [
            (_kinds(rows), str(len(rows)), dtype, format_nbytes(sum(row.output_nbytes for row in rows)), _prose(reason))
            for (reason, dtype), rows in reasons.items()
        ]
        yield _table(("linear layers", "count", "dtype", "size", "why"), lines, right=1)
    yield f"And {n_others} tensors that are no weights of linear layers: biases, norms, embeddings, tables."


def _reproduce(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    base = hub_id(components)
    source = components[0].manifest.source
    yield f"The same command gives the same bytes, on any machine ({_prose(components[0].summary.tool)}):"
    command = _convert_command(components)
    if base:
        inside = "/".join(str(source["name"]).split("/")[2:])
        parts = [f"{component.name}/*" for component in components if component.name] or [
            f"{inside}/*" if inside else ""
        ]
        includes = "".join(f" --include {shlex.quote(part)}" for part in parts if part)
        extra = " --include README.md --include model_index.json" if includes else ""
        folder = "SOURCE" + (f"/{inside}" if inside and not components[0].name else "")
        yield (
            f"```sh\nSOURCE=$(hf download -q {base} --revision {source['revision']}{includes}{extra})\n"
            f'convert-ckpt "${folder}" OUTPUT {command}\n```'
        )
    else:
        yield f"```sh\nconvert-ckpt {shlex.quote(str(source['name']))} OUTPUT {command}\n```"
    titles = {
        "recipe": "Its recipe file",
        "calibration": "What was known of the inputs",
        "sensitivities": "What was measured of layers",
    }
    for key, title in titles.items():
        if name := components[0].manifest.recipe.get(key):
            yield f"{title} was {_code(name)}."
    made = [entry for component in components for entry in _checksums(component, component.manifest.files)]
    used = [entry for component in components for entry in _checksums(component, component.manifest.source["files"])]
    yield _details(f"BLAKE3 of the files ({MANIFEST_NAME} holds more)", _table(("file", "bytes", "BLAKE3"), made))
    yield _details("BLAKE3 of the source's shards", _table(("file", "bytes", "BLAKE3"), used))


def _convert_command(components: Sequence[ConvertedComponent]) -> str:
    recipe = components[0].manifest.recipe
    words = ["--format", recipe["format"], *(["--target", recipe["target"]] if recipe.get("target") else [])]
    formats = {layer.format for component in components for layer in component.manifest.layers.values()}
    for option in ("layout", "scale_rule", "granularity"):
        if any(recipe[option] in quant_format.choices.get(option, ()) for quant_format in formats):
            words += [f"--{option.replace('_', '-')}", recipe[option]]
    words += ["--dialect", recipe["dialect"]]
    if len({component.manifest.recipe["preset"] for component in components}) == 1:
        words += ["--preset", recipe["preset"]]
    for pattern in recipe.get("ignore") or ():
        words += ["--ignore", pattern]
    for option in _LATER_OPTIONS:
        value = recipe.get(option)
        words += [f"--{option.replace('_', '-')}", str(value)] if value else []
    flags = ("static", "fold", "allow_unaligned_k", "swap_weight_nibbles")
    words += [f"--{flag.replace('_', '-')}" for flag in flags if recipe.get(flag)]
    return shlex.join(words)


def _budget(recipe: Mapping[str, Any]) -> str:
    given = {name: recipe.get(name) for name in ("max_size", "min_sqnr")}
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value)


def _checksums(component: ConvertedComponent, files: dict[str, dict[str, object]]) -> list[tuple[str, str, str]]:
    return [
        (_code(join_names(component.name, name)), f"{entry['nbytes']:,}", _code(entry["blake3"]))
        for name, entry in sorted(files.items())
    ]


def _code(name: object) -> str:
    """Return a name as code within a line, which it can't end."""
    return f"`{shown(name).replace('`', chr(39))}`"


def _prose(text: object) -> str:
    """Return text of a manifest as it is, without links and elements that it may hold."""
    return shown(text).replace("`", "'").replace("<", "&lt;").replace(">", "&gt;").replace("[", "\\[")


def _kinds(rows: list[TensorRow]) -> str:
    return ", ".join(dict.fromkeys(_code(row.kind) for row in rows))


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} dB"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int | None = None) -> str:
    """Return a Markdown table; columns 1 to ``right`` hold numbers."""
    marks = ["---:" if right and 0 < i <= right else "---" for i in range(len(columns))]
    lines = [columns, marks, *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
