"""Nunchaku's SVDQuant files: 4 bit codes in the tiles of its kernels, a low-rank branch, and modulations by AWQ.

Source: deepcompressor 69f3473, backend/nunchaku (convert.py, utils.py), which writes them; nunchaku 3a3cc3d, models,
which says what each is.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.foreign import ForeignTensors
from run_ckpt.contract.formats import E4M3, F32, NVFP4_BLOCK_SIZE, QuantFormat, Scheme
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.module_names import split_name
from run_ckpt.contract.source_formats import BY_ROW, UNKNOWN_RULE, opaque_format
from run_ckpt.contract.tensors import TensorSpec

NUNCHAKU = "Nunchaku"
# Rows and columns of a tile of codes, and columns that share a scale in INT4, and in the weights of modulations.
TILE_ROWS, TILE_COLUMNS, GROUP = 128, 64, 64
SVDQUANT_INT4 = opaque_format("svdquant_int4", "SVDQuant INT4", TILE_ROWS)
SVDQUANT_NVFP4 = opaque_format("svdquant_nvfp4", "SVDQuant NVFP4", TILE_ROWS)
SVDQUANT_BIAS = opaque_format("svdquant_bias", "SVDQuant's bias", TILE_ROWS)
# How many vectors a modulation makes, whose elements lie side by side -> format of its weight, and of its bias.
MODULATIONS = {n: opaque_format(f"modulation_{n}", f"AWQ INT4, {n} vectors") for n in (3, 6)}
MODULATION_BIASES = {n: opaque_format(f"modulation_bias_{n}", f"bias of {n} vectors") for n in (3, 6)}
SCALES, SMOOTH, DOWN, UP, ALPHA, CHANNELS, ZEROS = "scales", "smooth", "down", "up", "alpha", "channels", "zeros"
# How the name of a tensor ends -> its role.
_ROLES = {
    "qweight": WEIGHT,
    "wscales": SCALES,
    "smooth": SMOOTH,
    "smooth_factor": SMOOTH,
    "lora_down": DOWN,
    "proj_down": DOWN,
    "lora_up": UP,
    "proj_up": UP,
    "wtscale": ALPHA,
    "wcscales": CHANNELS,
    "wzeros": ZEROS,
}
_UNUSED = {"smooth_orig", "smooth_factor_orig"}
# Prefixes of roles: of the weight whose columns come before, and of the one whose input is shifted.
FIRST, SHIFTED = "first_", "shifted_"


@dataclass(frozen=True)
class _Kind:
    """What a module is. ``is_shifted``: a number is added to the input of its INT4 codes, so that none is negative.

    ``first``: the module whose columns come before its own in ``joined``. ``n_vectors``: of a modulation.
    """

    is_shifted: bool = False
    n_vectors: int = 0
    first: str = ""
    joined: str = ""


_LINEAR, _SHIFTED = _Kind(), _Kind(is_shifted=True)
_ATTENTION = ("attn.to_qkv", "attn.add_qkv_proj", "attn.to_out.0", "attn.to_add_out")
_Z_IMAGE = dict.fromkeys(
    ("attention.to_qkv", "attention.to_out.0", "feed_forward.net.0.proj", "feed_forward.net.2"), _LINEAR
)
# Blocks -> module in one -> what it is: FLUX.1 and Qwen-Image, FLUX.1, Z-Image.
_KINDS: dict[str, dict[str, _Kind]] = {
    "transformer_blocks": {
        **dict.fromkeys(("qkv_proj", "qkv_proj_context", "out_proj", "out_proj_context"), _LINEAR),
        **dict.fromkeys(("mlp_fc1", "mlp_context_fc1"), _LINEAR),
        **dict.fromkeys(("mlp_fc2", "mlp_context_fc2"), _SHIFTED),
        **dict.fromkeys(("norm1.linear", "norm1_context.linear", "img_mod.1", "txt_mod.1"), _Kind(n_vectors=6)),
        **dict.fromkeys((*_ATTENTION, "img_mlp.net.0.proj", "txt_mlp.net.0.proj"), _LINEAR),
        **dict.fromkeys(("img_mlp.net.2", "txt_mlp.net.2"), _SHIFTED),
    },
    "single_transformer_blocks": {
        **dict.fromkeys(("qkv_proj", "mlp_fc1", "out_proj"), _LINEAR),
        "mlp_fc2": _Kind(is_shifted=True, first="out_proj", joined="proj_out"),
        "norm.linear": _Kind(n_vectors=3),
    },
    **dict.fromkeys(("layers", "noise_refiner", "context_refiner"), _Z_IMAGE),
}


def is_nunchaku(specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether tensors are named as Nunchaku names what it quantized."""
    return any(name.endswith(".wscales") for name in specs)


def read_nunchaku(specs: Mapping[str, TensorSpec], source_dtype: str) -> ForeignTensors:
    """Return what the tensors of a checkpoint are: weights and biases as the model has them that Nunchaku runs.

    source_dtype: of what they stand for. Raises FaultsError with a sentence for each that can't be read.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in specs:
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = name
    modules = {module: leaves for module, leaves in modules.items() if "qweight" in leaves}
    reader = _Reader(specs, modules, source_dtype)
    for module in sorted(modules):
        try:
            reader.read(module)
        except ValueError as error:
            reader.faults.append(f"{module}.qweight: {error}.")
    if reader.faults:
        raise FaultsError("the quantized weights can't be read", reader.faults)
    unused = frozenset(leaves[leaf] for leaves in modules.values() for leaf in _UNUSED & leaves.keys())
    return ForeignTensors(reader.layers, unused, reader.shapes)


class _Reader:
    """Collects layers, their shapes and faults."""

    def __init__(self, specs: Mapping[str, TensorSpec], modules: dict[str, dict[str, str]], source_dtype: str):
        self.layers: dict[str, Layer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.faults: list[str] = []
        self._specs, self._modules, self._dtype = specs, modules, source_dtype

    def read(self, module: str) -> None:
        """Add a module's weight and bias. Raises ValueError where they can't be read."""
        stack, block, projection = split_name(module)
        kind = _KINDS.get(stack, {}).get(projection) if block is not None else None
        if kind is None:
            raise ValueError("is of no model of Nunchaku's that is read here: FLUX.1, Qwen-Image, Z-Image")
        if odd := sorted(self._modules[module].keys() - {*_ROLES, *_UNUSED, "bias"}):
            raise ValueError(f"has {odd[0]} beside it, which is not known here")
        if kind.n_vectors:
            self._read_modulation(module, kind.n_vectors)
            return
        if any(other.first == projection for other in _KINDS[stack].values()):
            return  # with the one that it is joined with
        N, K, quant_format = self._check(module)
        roles, name = self._roles(module), module
        bias_roles = {f"{SHIFTED}{role}": stored for role, stored in roles.items()} if kind.is_shifted else {}
        bias_roles = bias_roles if quant_format == SVDQUANT_INT4 else {}
        if kind.first:
            first = f"{module.removesuffix(projection)}{kind.first}"
            if first not in self._modules or self._check(first)[::2] != (N, quant_format):
                raise ValueError(f"its columns follow those of {first}, which is missing or another one")
            K += self._check(first)[1]
            roles |= {f"{FIRST}{role}": stored for role, stored in self._roles(first).items()}
            name = f"{module.removesuffix(projection)}{kind.joined}"
            if bias := self._modules[first].get("bias"):
                bias_roles[f"{FIRST}{WEIGHT}"] = bias
        self._add(f"{name}.weight", quant_format, (N, K), roles)
        if bias := self._modules[module].get("bias"):
            self._add_bias(f"{name}.bias", SVDQUANT_BIAS, {WEIGHT: bias, **bias_roles}, N)
        elif bias_roles:
            raise ValueError("has no bias, which the shift of its input needs")

    def _read_modulation(self, module: str, n_vectors: int) -> None:
        roles = self._roles(module)
        stored = [self._specs[roles[role]] for role in (WEIGHT, SCALES, ZEROS) if role in roles]
        N, K = (stored[0].shape[0] * 4, stored[0].shape[1] * 2) if len(stored[0].shape) == 2 else (0, 0)
        is_whole = len(stored) == 3 and N * K > 0 and N % (4 * n_vectors) == K % GROUP == 0
        fits = is_whole and stored[0].dtype == "I32" and stored[1].dtype in ("BF16", "F16")
        if not fits or not stored[1].shape == stored[2].shape or stored[1].shape[1:] != (N,):
            raise ValueError(f"{_listed(stored)}: no weight of a modulation, with scales and zero points")
        if stored[1].shape[0] < K // GROUP or stored[2].dtype != stored[1].dtype:
            raise ValueError(f"{_listed(stored)}: no scale for each {GROUP} columns")
        self._add(f"{module}.weight", MODULATIONS[n_vectors], (N, K), roles)
        if bias := self._modules[module].get("bias"):
            self._add_bias(f"{module}.bias", MODULATION_BIASES[n_vectors], {WEIGHT: bias}, N)

    def _roles(self, module: str) -> dict[str, str]:
        return {_ROLES[leaf]: name for leaf, name in self._modules[module].items() if leaf in _ROLES}

    def _check(self, module: str) -> tuple[int, int, QuantFormat]:
        """Return N, K and format of a weight whose tensors fit. Raises ValueError."""
        roles = {role: self._specs[name] for role, name in self._roles(module).items()}
        weight, scales = roles[WEIGHT], roles.get(SCALES, roles[WEIGHT])
        N, K = (weight.shape[0], weight.shape[1] * 2) if len(weight.shape) == 2 else (0, 0)
        quant_format, group = (
            (SVDQUANT_NVFP4, NVFP4_BLOCK_SIZE) if scales.dtype == E4M3.dtype else (SVDQUANT_INT4, GROUP)
        )
        rank = roles[UP].shape[-1] if UP in roles and roles[UP].shape else 0
        shapes = {
            WEIGHT: (N, K // 2),
            SCALES: (K // group, N),
            SMOOTH: (K,),
            DOWN: (K, rank),
            UP: (N, rank),
            CHANNELS: (N,),
        }
        is_float = all(roles[role].dtype in F32.readable for role in roles if role not in (WEIGHT, SCALES))
        fits = (
            weight.dtype in ("I8", "U8")
            and N * K > 0
            and N % TILE_ROWS == K % TILE_ROWS == rank % 16 == 0
            and {SCALES, SMOOTH} <= roles.keys()
            and (DOWN in roles) == (UP in roles)
            and (quant_format == SVDQUANT_NVFP4 or {CHANNELS, ALPHA}.isdisjoint(roles))
            and (quant_format == SVDQUANT_NVFP4 or scales.dtype in ("BF16", "F16"))
            and is_float
            and all(roles[role].shape == shape for role, shape in shapes.items() if role in roles)
            and (ALPHA not in roles or roles[ALPHA].shape in ((), (1,)))
        )
        if not fits:
            raise ValueError(f"{_listed(roles.values())}: no weight as Nunchaku stores it")
        return N, K, quant_format

    def _add(self, name: str, quant_format: QuantFormat, shape: tuple[int, int], tensors: dict[str, str]) -> None:
        scheme = Scheme(quant_format, PLAIN, BY_ROW)
        module = name.removesuffix(".weight")
        self.layers[module] = Layer(module, scheme, *shape, name, self._dtype, UNKNOWN_RULE, tensors, (1,))

    def _add_bias(self, name: str, quant_format: QuantFormat, tensors: dict[str, str], N: int) -> None:
        biases = [self._specs[tensors[role]] for role in (WEIGHT, f"{FIRST}{WEIGHT}") if role in tensors]
        if any(bias.shape != (N,) or bias.dtype not in F32.readable for bias in biases):
            raise ValueError(f"{_listed(biases)}: no bias of {N} rows")
        self._add(name, quant_format, (N, 1), tensors)
        self.shapes[name] = (N,)


def _listed(specs: object) -> str:
    return ", ".join(f"{spec.dtype} {list(spec.shape)}" for spec in specs)  # type: ignore[attr-defined]
