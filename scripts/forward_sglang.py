"""Run FLUX.1 in unmodified SGLang 0.5.23 on a CPU: the converted transformer, its dequantized copy and its source.

    DIR/bin/python scripts/forward_sglang.py CONVERTED DEQUANTIZED BF16

DEQUANTIZED is what ``run-ckpt dequantize`` makes of CONVERTED. Both must give the same bits: then the plug-in's
linears compute in the whole model what BF16 linears with the decoded weights compute. The forward is the
model's own. Its operators take their plain torch form, since SGLang's CPU kernels (sgl_kernel) are no wheel.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from sglang_on_cpu import SGLang

N_TEXT, SIDE = 5, 4


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare what FLUX.1 computes in SGLang, quantized and not.")
    parser.add_argument("folders", type=Path, nargs=3, metavar="CONVERTED DEQUANTIZED BF16")
    folders = parser.parse_args().folders
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sglang = SGLang(folders[0], persona=None)
    from sglang.multimodal_gen.runtime.layers.custom_op import CustomOp

    CustomOp.dispatch_forward = lambda self: self.forward_native
    quantized, dequantized, source = (forward(sglang.load(folder).model) for folder in folders)
    error = float((quantized - source).norm() / source.norm())
    same = torch.equal(quantized, dequantized)
    print(f"{'RIGHT' if same else 'WRONG'} (forward, {folders[0].name}): error against BF16 {error:.4f}")
    if not same:
        print(f"off by {float((quantized - dequantized).norm() / dequantized.norm()):.4g} from the dequantized model")
    return 0 if same else 1


def forward(model: torch.nn.Module) -> torch.Tensor:
    """Return the output for small seeded inputs, float32."""
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    image_ids = torch.zeros(SIDE, SIDE, 3)
    image_ids[..., 1], image_ids[..., 2] = torch.arange(SIDE)[:, None], torch.arange(SIDE)[None, :]
    rotary = [model.rotary_emb.forward(ids) for ids in (torch.zeros(N_TEXT, 3), image_ids.reshape(-1, 3))]
    config = model.config
    torch.manual_seed(0)
    with torch.no_grad(), set_forward_context(0, None):
        output = model(
            hidden_states=torch.randn(1, SIDE * SIDE, config.in_channels).bfloat16(),
            encoder_hidden_states=torch.randn(1, N_TEXT, config.joint_attention_dim).bfloat16(),
            pooled_projections=torch.randn(1, config.pooled_projection_dim).bfloat16(),
            timestep=torch.tensor([500.0]),
            guidance=torch.tensor([3500.0]),
            freqs_cis=tuple(torch.cat(parts) for parts in zip(*rotary, strict=True)),
        )
    return output.float()


if __name__ == "__main__":
    sys.exit(main())
