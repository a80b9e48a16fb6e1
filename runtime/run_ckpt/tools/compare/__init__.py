"""Compare what BASE and converted models compute: latents, pictures and the text of a language model."""
