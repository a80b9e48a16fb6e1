"""The entry point: our config for the MXFP4 checkpoints that convert-ckpt wrote. What is not ours is read as before."""


def register() -> None:
    """Register the config; vLLM calls this in every process (group ``vllm.general_plugins``)."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from run_ckpt.integrations.vllm.config import METHOD, CheckpointConfig

    register_quantization_config(METHOD)(CheckpointConfig)
