"""Make tests/golden/aiter_golden.safetensors anew: what AITER's own functions make of its inputs, on a CPU.

    .venv/bin/python scripts/make_golden.py AITER_CHECKOUT OUTPUT

The inputs (``*.x``) are read from the file in tests/golden; tests/golden/README.md says what each tensor is. torch
functions of the checkout run as they are, its Triton kernels in Triton's interpreter, as if on a gfx950.
Prints which tensors differ from those in tests/golden. Needs torch, triton and numpy; AITER need not be installed.
"""

import ast
import enum
import importlib
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import triton
import triton.language as tl
from safetensors.torch import load, save_file
from torch import Tensor
from triton.runtime import interpreter

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "aiter_golden.safetensors"
ARCH = "gfx950"
# AITER's MxScaleRoundModeInt (aiter/utility/mx_types.py) by the names in the file.
TORCH_MODES = {"t_rounddown": 0, "t_roundup": 1, "t_even": 2, "t_ceil": 3}
# Tiles of the preshuffle GEMM; any will do, since every product and sum of these inputs is exact in float32.
GEMM_CONFIG = {
    "BLOCK_SIZE_N": 32,
    "BLOCK_SIZE_K": 256,
    "GROUP_SIZE_M": 1,
    "NUM_KSPLIT": 1,
    "SPLITK_BLOCK_SIZE": 512,
    "num_warps": 4,
    "num_stages": 1,
    "waves_per_eu": 0,
    "matrix_instr_nonkdim": 16,
    "cache_modifier": "",
}


def main(checkout: Path, output: Path) -> None:
    prepare_import(checkout)
    mend_interpreter()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's: log2 of a block of zeros, and the case with NaN
    golden = load(GOLDEN.read_bytes())  # not mapped: OUTPUT may be the same file
    made = {name: golden[name] for name in golden if name.endswith(".x")}
    for name in golden:
        case, mode, role = (*name.split("."), "")[:3]
        if role == "q" and case != "fp8":
            made |= quantize_case(f"{case}.{mode}", made[f"{case}.x"], mode, shuffle=f"{name}_shuf" in golden)
    made |= quantize_fp8(made["fp8.x"])
    for rows in ("m5", "m48"):
        made |= multiply(f"gemm.{rows}", made)
    made = {name: tensor.contiguous() for name, tensor in made.items()}
    # One entry: safetensors writes several in random order.
    tools = f"torch {torch.__version__}, Triton {triton.__version__}"
    save_file(made, output, {"made_with": f"ROCm/aiter {commit_of(checkout)}, {tools}"})
    assert made.keys() == golden.keys(), made.keys() ^ golden.keys()
    differing = [name for name in golden if not same_bytes(made[name], golden[name])]
    print(f"wrote {output}: {len(made)} tensors, {len(differing)} differ from {GOLDEN.name}", *differing, sep="\n  ")


def quantize_case(prefix: str, x: Tensor, mode: str, *, shuffle: bool) -> dict[str, Tensor]:
    """Return packed E2M1 codes and E8M0 scales of BF16 [N, K], and the shuffled ones where asked for."""
    from aiter.ops.quant import per_1x32_f4_quant
    from aiter.ops.shuffle import shuffle_weight

    if mode == "even":
        codes, scale = quantize_even(x)
    else:
        codes, scale = (t.view(torch.uint8) for t in per_1x32_f4_quant(x, round_mode=TORCH_MODES[mode]))
    made = {f"{prefix}.q": codes, f"{prefix}.s": scale}
    if shuffle:
        made |= {f"{prefix}.q_shuf": shuffle_weight(codes), f"{prefix}.s_shuf": shuffle_scale(scale)}
    return made


def quantize_even(x: Tensor) -> tuple[Tensor, Tensor]:
    """AITER's Triton quantizer. It widens x to float32 itself; the interpreter would do so wrongly for subnormals."""
    from aiter.ops.triton.quant.quant import dynamic_mxfp4_quant

    return dynamic_mxfp4_quant(x.float())


def shuffle_scale(scale: Tensor) -> Tensor:
    """AITER's shuffle_scale, of a scale that is padded with zeros: AITER would leave its padding uninitialised."""
    from aiter.utility.fp4_utils import e8m0_shuffle

    rows, cols = scale.shape
    return e8m0_shuffle(torch.nn.functional.pad(scale, (0, -cols % 8, 0, -rows % 256)))


def quantize_fp8(x: Tensor) -> dict[str, Tensor]:
    from aiter.ops.quant import per_tensor_quant, pertoken_quant
    from aiter.ops.shuffle import shuffle_weight

    tensor_codes, tensor_scale = per_tensor_quant(x, quant_dtype=torch.float8_e4m3fn)
    row_codes, row_scale = pertoken_quant(x, quant_dtype=torch.float8_e4m3fn)
    return {
        "fp8.per_tensor.q": tensor_codes,
        "fp8.per_tensor.s": tensor_scale,
        "fp8.per_row.q": row_codes,
        "fp8.per_row.s": row_scale,
        "fp8.per_row.q_shuf": shuffle_weight(row_codes),
    }


def multiply(prefix: str, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return quantized activations and their product with the weight ``normal.even``, [N, K] = [304, 512]."""
    from aiter.ops.triton.gemm.basic.gemm_afp4wfp4 import gemm_afp4wfp4_preshuffle
    from aiter.utility.fp4_utils import e8m0_to_f32, mxfp4_to_f32

    codes, scale = quantize_even(made[f"{prefix}.x"])
    shuffled = shuffle_scale(scale)
    weight, weight_scale = made["normal.even.q_shuf"], made["normal.even.s_shuf"]
    M, N = len(codes), len(weight)
    # The kernel takes scales as rows of whole tiles, and plain ones for fewer than 32 activations.
    tiles = shuffled.reshape(len(shuffled) // 32, -1)[: -(-M // 32)]
    y = gemm_afp4wfp4_preshuffle(
        codes,
        weight.reshape(N // 16, -1),
        scale.contiguous() if M < 32 else tiles,
        weight_scale.reshape(len(weight_scale) // 32, -1),
        dtype=torch.float32,
        config={"BLOCK_SIZE_M": 16 if M < 32 else 32, **GEMM_CONFIG},
    )

    def decode(codes: Tensor, scale: Tensor) -> Tensor:
        return mxfp4_to_f32(codes).double() * e8m0_to_f32(scale.contiguous()).double().repeat_interleave(32, 1)

    reference = decode(codes, scale) @ decode(made["normal.even.q"], made["normal.even.s"]).T
    results = {"xq": codes, "xs": scale, "xs_shuf": shuffled, "y_f32": y, "ref_f64": reference}
    return {f"{prefix}.{name}": tensor for name, tensor in {**results, "y_a4w4_bf16": y.bfloat16()}.items()}


def prepare_import(checkout: Path) -> None:
    """Let modules of the checkout be imported one by one, without what AITER's __init__ needs: ROCm and a GPU."""
    for name in ("aiter", "aiter.ops", "aiter.ops.triton", "aiter.ops.triton.quant", "aiter.jit", "aiter.jit.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = module

    def stand_in(name: str, **contents: object) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module

    stand_in("aiter.jit.core", compile_ops=lambda *_, **__: lambda function: function)
    stand_in("aiter.jit.utils.chip_info", get_gfx=lambda: ARCH, get_gfx_runtime=lambda: ARCH, get_cu_num=lambda: 256)
    kinds = ("No", "per_Tensor", "per_Token", "per_1x32", "per_1x128", "per_128x128")
    stand_in("aiter.ops.enum", ActivationType=enum.IntEnum("ActivationType", "No"), QuantType=enum.IntEnum("Q", kinds))
    target = types.SimpleNamespace(backend="hip", arch=ARCH)
    triton.runtime.driver.set_active(
        types.SimpleNamespace(get_current_target=lambda: target, get_active_torch_device=lambda: torch.device("cpu"))
    )
    assert Path(importlib.import_module("aiter.ops.shuffle").__file__).is_relative_to(checkout)


def mend_interpreter() -> None:
    """Give Triton's interpreter (3.9) what its compiler does: ``not`` of each lane, and exact powers of two."""

    def visit_not(self: ast.NodeTransformer, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.Call(ast.Name("lanewise_not", ast.Load()), [node.operand], [])

    interpreter.lanewise_not = lambda x: x.__not__() if isinstance(x, tl.tensor) else not x
    interpreter.ASTTransformer.visit_UnaryOp = visit_not
    # numpy's float32 exp2 is one step off for some integers on some CPUs.
    interpreter.InterpreterBuilder.create_exp2 = lambda self, x: self.unary_op(
        x, lambda data: np.exp2(data.astype(np.float64)).astype(data.dtype)
    )


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
