"""Small pipelines with random weights, and a tokenizer of letters for language models."""

from pathlib import Path

import torch

from tests.models import MODELS, save

# Products in BF16 take ten times as long on a CPU without instructions for them.
FLOAT32 = ("--dtype", "float32")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_pipeline(folder: Path) -> Path:
    """Write a small FLUX.1 pipeline with random weights and tokenizers that know single letters."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8,),
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
            scaling_factor=1.0,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=32, num_layers=1, num_heads=4)),
        tokenizer_2=T5TokenizerFast(vocab=pieces, extra_ids=0),
        transformer=MODELS["flux1"].build(),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_language_model(folder: Path) -> Path:
    """Write a small Llama with random weights that reads single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save(MODELS["llama"], MODELS["llama"].build(), str(folder))
    vocabulary = {letter: number for number, letter in enumerate(["<s>", *LETTERS, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder
