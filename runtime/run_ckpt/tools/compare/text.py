"""Run the same text through BASE and each converted language model: perplexity and KL divergence."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from run_ckpt.contract.errors import CheckpointError, UsageError, first_line
from run_ckpt.progress import Progress
from run_ckpt.tools.compare.figures import TextErrors
from run_ckpt.tools.compare.metrics import sum_text_errors
from run_ckpt.tools.generate import Placement, load_transformers


@dataclass(frozen=True)
class TextComparison:
    """BASE and the results on one text."""

    base: str
    base_perplexity: float
    n_tokens: int
    results: tuple[TextErrors, ...]

    @property
    def title(self) -> str:
        return f"{self.n_tokens} tokens against {self.base}, perplexity {self.base_perplexity:.4f}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "results": [result.to_json() for result in self.results]}


def compare_texts(
    base: str,
    outputs: Sequence[Path],
    text: str,
    n_context: int,
    placement: Placement,
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> TextComparison:
    """Return how far each of ``outputs`` is from ``base`` on the text, in windows of at most ``n_context`` tokens.

    BASE stays in memory beside the result at work: the logits of a text would be larger. Raises UsageError where
    the text is shorter than two tokens, CheckpointError for what can't be loaded or is not finite.
    """
    tokenizer, reference = load_language_model(base, placement)
    n_context = min(n_context, getattr(reference.config, "max_position_embeddings", n_context))
    windows = list(cut_windows(tokenizer, text, n_context))
    if not windows:
        raise UsageError("--text: holds no two tokens, so that nothing can be predicted. Give a longer text.")
    say(f"loaded {type(reference).__name__} from {base}; {sum(map(len, windows))} tokens in {len(windows)} windows")
    results = []
    for output in outputs:
        model = load_transformers({"model": output}, placement, progress, say)["model"]
        results.append(_compare(reference, model, windows, str(output)))
        del model
    n, nll = (sum(getattr(window, key) for window in results[0].windows) for key in ("n", "base_nll"))
    return TextComparison(base, float(torch.tensor(nll / n).exp()), n, tuple(results))


def load_language_model(base: str, placement: Placement) -> tuple[Any, Any]:
    """Return the tokenizer and the model of ``base``, folder or Hub repo. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=placement.dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--model-path {base}: no language model that transformers can load ({first_line(error)})."
        ) from error
    return tokenizer, model.to(placement.device).eval()


def cut_windows(tokenizer: Any, text: str, n_context: int) -> Iterator[Tensor]:
    """Yield int64 [T], each with as much text as fits; a tokenizer's first token opens every one of them."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for part in torch.split(tokens, n_context - len(first)):
        if len(part) + len(first) > 1:
            yield torch.cat([torch.tensor(first, dtype=torch.int64), part])


@torch.inference_mode()
def _compare(base: Any, model: nn.Module, windows: Sequence[Tensor], name: str) -> TextErrors:
    sums = []
    for window in windows:
        tokens = window.to(base.device)
        before, after = (each(input_ids=tokens[None], use_cache=False).logits[0, :-1] for each in (base, model))
        for who, logits in (("BASE", before), (name, after)):
            if not logits.isfinite().all():
                raise CheckpointError(f"{who}: logits hold NaN or Inf. Try --dtype float32, or another --backend.")
        sums.append(sum_text_errors(before, after, tokens[1:]))
    return TextErrors(name, tuple(sums))
