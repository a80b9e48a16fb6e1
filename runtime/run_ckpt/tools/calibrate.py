"""`run-ckpt calibrate`: run BASE on prompts or a text, and record what goes into its linear layers."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from run_ckpt.contract.errors import UsageError
from run_ckpt.statistics.record import HELD_OUT_EVERY, Recorder, held_out_in_turn, record_statistics
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.compare.text import cut_windows, load_language_model
from run_ckpt.tools.compare.trajectory import Sample
from run_ckpt.tools.generate import Placement, load_pipeline, run_pipeline

DEFAULT_PROMPTS = Path(__file__).with_name("calibration_prompts.txt")


@dataclass(frozen=True)
class Recording:
    """Where statistics go, and how: see record_statistics. ``memory`` is of the sums of all components together."""

    folder: Path
    hessian: str = "auto"
    fisher: bool = False
    memory: int | None = None


@dataclass(frozen=True)
class _Run:
    """One sample: a call that runs the model, and whether it is held out."""

    work: Callable[[], object]
    held_out: bool


def calibrate_pipeline(
    base: str,
    samples: Sequence[Sample],
    options: Mapping[str, Any],
    recording: Recording,
    placement: Placement,
    say: Callable[[str], None],
    sizes: Sequence[tuple[int, int]] = (),
) -> None:
    """Record the transformers of a diffusers pipeline, each in the folder of its component's name.

    options: go to the pipeline, those that are None are left to it. sizes: widths and heights that samples have by
    turns, see sizes_in_turn(). Raises UsageError for options that the pipeline
    does not have, and where there are too few samples; CheckpointError for what can't be loaded.
    """
    pipeline = load_pipeline(base, {}, placement, say)
    found = {
        name: part
        for name, part in pipeline.components.items()
        if name.startswith("transformer") and isinstance(part, nn.Module)
    }
    if not found:
        raise UsageError(f"--model-path {base}: {type(pipeline).__name__} has no transformer to calibrate.")

    def work(sample: Sample, size: Mapping[str, int]) -> Callable[[], object]:
        arguments = {**options, **size, "output_type": "latent"}
        return lambda: run_pipeline(pipeline, sample.prompt, sample.seed, arguments, lambda _: None)

    shaped = zip(samples, sizes_in_turn(len(samples), sizes), hold_out(samples), strict=True)
    runs = [_Run(work(sample, size), held_out) for sample, size, held_out in shaped]
    given = {**options, **({"sizes": [f"{width}x{height}" for width, height in sizes]} if sizes else {})}
    settings = _settings([(sample.prompt, sample.seed) for sample in samples], given, placement)
    _record_all({recording.folder / name: model for name, model in found.items()}, runs, recording, settings, say)


def calibrate_text(
    base: str,
    text: str,
    n_windows: int,
    n_context: int,
    recording: Recording,
    placement: Placement,
    say: Callable[[str], None],
) -> None:
    """Record a language model of transformers on at most ``n_windows`` windows of a text, spread over all of it.

    Raises UsageError where the text has fewer than two windows, CheckpointError for what can't be loaded.
    """
    tokenizer, model = load_language_model(base, placement)
    n_context = min(n_context, getattr(model.config, "max_position_embeddings", n_context))
    windows = list(cut_windows(tokenizer, text, n_context))
    windows = windows[:: max(1, len(windows) // n_windows)][:n_windows]

    def work(tokens: torch.Tensor) -> Callable[[], object]:
        return lambda: model(input_ids=tokens[None].to(placement.device), use_cache=False)

    runs = [_Run(work(tokens), held_out_in_turn(number)) for number, tokens in enumerate(windows)]
    settings = _settings([tokens.tolist() for tokens in windows], {}, placement)
    _record_all({recording.folder: model}, runs, recording, settings, say)


def sizes_in_turn(n_samples: int, sizes: Sequence[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Yield width and height of each sample, {} without ``sizes``; among those held out, too, they take turns."""
    for number in range(n_samples):
        if sizes:
            width, height = sizes[(number + number // HELD_OUT_EVERY) % len(sizes)]
            yield {"width": width, "height": height}
        else:
            yield {}


def hold_out(samples: Sequence[Sample]) -> Iterator[bool]:
    """Yield for each sample whether it is held out: all those of a prompt, or none; by turns if there is one prompt."""
    prompts = list(dict.fromkeys(sample.prompt for sample in samples))
    for number, sample in enumerate(samples):
        yield held_out_in_turn(prompts.index(sample.prompt) if len(prompts) > 1 else number)


def _settings(inputs: Sequence[object], options: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    return {
        **given,
        "n_samples": len(inputs),
        "inputs_sha256": digest,
        "dtype": str(placement.dtype).removeprefix("torch."),
    }


def _record_all(
    models: Mapping[Path, nn.Module],
    runs: Sequence[_Run],
    recording: Recording,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Run all samples as often as it takes until the sums of every layer have fitted into the memory."""
    if len({run.held_out for run in runs}) < 2:
        raise UsageError(f"{len(runs)} samples: at least two are needed, as some are held out. Give more samples.")
    memory = recording.memory and recording.memory // len(models)
    while True:
        started = time.perf_counter()
        with ExitStack() as stack:
            recorders = [
                stack.enter_context(
                    record_statistics(
                        model,
                        folder,
                        hessian=recording.hessian,
                        fisher=recording.fisher,
                        memory=memory,
                        settings=settings,
                    )
                )
                for folder, model in models.items()
            ]
            _run_all(runs, recorders)
        n_left = sum(len(recorder.left_out) for recorder in recorders)
        left = f"; {n_left} layers wait for the next pass" if n_left else ""
        say(f"ran {len(runs)} samples in {time.perf_counter() - started:.1f} s{left}")
        if not n_left:
            break
    for folder, recorder in zip(models, recorders, strict=True):
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
        say(f"wrote {folder}: {format_nbytes(nbytes)}")
        if recorder.uncalled:
            say(f"no statistics for {len(recorder.uncalled)} layers that never ran: {', '.join(recorder.uncalled)}")


@torch.no_grad()  # not inference_mode(): what a model keeps from then could not be differentiated
def _run_all(runs: Sequence[_Run], recorders: Sequence[Recorder]) -> None:
    for run in runs:
        for recorder in recorders:
            recorder.next_sample(held_out=run.held_out)
        run.work()
