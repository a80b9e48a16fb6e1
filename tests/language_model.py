"""A small language model, trained in a minute on text that every Python brings along."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N_CONTEXT = 128
_N_STEPS = 200
_N_ROWS = 8
_MAX_RATE = 4e-3
# The last topics, by name: what the model has not seen.
_HELD_OUT_SHARE = 0.025


def train(folder: Path) -> tuple[Path, Path]:
    """Train a Llama of 1.3 million weights on single letters; return its checkpoint and a file of text it never saw.

    The text is that of Python's help(): its language reference, 0.7 MB. What it saw is in "seen.txt" beside them.
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    n_seen = int(len(text) * (1 - _HELD_OUT_SHARE))
    tokenizer = _make_tokenizer(text)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=N_CONTEXT, tie_word_embeddings=False, **sizes)
    )
    _fit(model, torch.tensor(tokenizer(text[:n_seen])["input_ids"]))
    model.to(torch.bfloat16).save_pretrained(folder / "bf16")
    tokenizer.save_pretrained(folder / "bf16")
    (folder / "seen.txt").write_text(text[:n_seen], encoding="utf-8")
    (folder / "unseen.txt").write_text(text[n_seen:], encoding="utf-8")
    return folder / "bf16", folder / "unseen.txt"


def _make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _fit(model: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_MAX_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _MAX_RATE, total_steps=_N_STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(_N_STEPS):
        starts = torch.randint(len(tokens) - N_CONTEXT, (_N_ROWS,), generator=generator)
        rows = torch.stack([tokens[start : start + N_CONTEXT] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
