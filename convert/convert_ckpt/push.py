"""`convert-ckpt --push-to-hub`: upload shards while later ones are converted, and the rest at the end."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert_ckpt.run_summary import RunSummary
from run_ckpt.contract.errors import CheckpointError, PublishError
from run_ckpt.progress import Progress
from run_ckpt.tools.publish.push import ShardUploads, push_result
from run_ckpt.tools.publish.repository import Target


def convert_and_push(
    convert: Callable[..., RunSummary],
    output: Path,
    target_options: dict[str, Any],
    *,
    base_model: str | None,
    at_end: bool,
    progress: Progress,
) -> RunSummary:
    """Convert and push. convert: convert_checkpoint() with all but its ``listener`` bound.

    A repo that can't be written to stops it before anything is converted. What fails later leaves
    ``output`` complete: PublishError then says how to go on.
    """
    target = Target(**target_options)
    uploads = ShardUploads(target, progress, at_end=at_end)
    try:
        summary = convert(listener=uploads)
    finally:
        uploads.stop()
    try:
        pushed = push_result(output, target, base_model=base_model, progress=progress)
        return replace(summary, pushed=replace(pushed, sent=(*uploads.sent, *pushed.sent)))
    except (CheckpointError, KeyboardInterrupt) as error:
        reason = str(error) or "the push was stopped."
        raise PublishError(
            f"{reason}\n{output} is complete. Push it with: run-ckpt push {output} {target.repo_id}"
        ) from error
