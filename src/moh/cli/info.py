"""`moh info`: versions, devices, which attention backends work here, and which one handles a call of a given shape."""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING, Any

from moh.cli.loading import revision
from moh.cli.options import add_command, add_json, print_result

if TYPE_CHECKING:
    from moh.cli.options import Commands

_TOKENS = 512
"""Length of the text for which a model's backend is chosen."""

_Described = tuple[dict[str, Any], list[str]]
"""What `--json` prints, and the lines that are printed otherwise."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_parser(sub: Commands) -> None:
    """Add the command to the parser of all commands."""
    text = (
        "Versions, devices, and which attention backends work here; or how the attention of a model would be computed."
    )
    parser = add_command(sub, "info", text, run)
    parser.add_argument(
        "model",
        nargs="?",
        help="model of transformers, dense or MoH: what its attention implementations compute and save",
    )
    parser.add_argument(
        "--shape", nargs=5, type=int, metavar=("B", "H", "HKV", "N", "D"),
        help="sequences, query heads, key/value heads, tokens, width of a head: which backend handles such a call",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of that call (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of that call, such as cpu or cuda (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="that call needs gradients")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of that call's attention weights")
    parser.add_argument(
        "--share",
        type=float,
        metavar="A",
        help="share of active heads: also show what projects such a layer's queries and output",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model that is named on the hub")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print what is installed and works, what a model's attention computes, or which backend handles `--shape`.

    Raises:
        ValueError: the shape, the device, the probability of dropout or the share of heads is invalid.
    """
    describe = _of_model if arguments.model else _of_call if arguments.shape else _of_machine
    print_result(arguments, *describe(arguments))


_COMPUTE_ALL = ("reference", "straight_through")  # backends


def _of_machine(arguments: argparse.Namespace) -> _Described:
    import torch

    import moh
    from moh.attention import BACKENDS, Call
    from moh.evaluation.speed import cpu_name

    lines = [f"moh {moh.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    names = ("torch", "triton", "transformers", "accelerate", "timm", "diffusers")
    versions = {name: _version(name) for name in names}
    lines += [f"  {name:13s} {number or 'not installed'}" for name, number in versions.items()]
    devices = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    devices |= {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    lines += ["devices", *(f"  {name:13s} {about}" for name, about in devices.items())]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines.append(f"attention backends on {device}, the first that supports a call handles it; --shape shows one call")
    q, gates = torch.zeros(1, 2, 4, 16, device=device), torch.zeros(1, 4, 2, device=device)
    backends = {}
    for backend in BACKENDS.values():
        reason = backends[backend.name] = backend.why_not(Call(q, q, q, gates, heads_per_group=1))
        works = "works" if backend.chosen_on is None or device in backend.chosen_on else "works if named"
        lines.append(
            f"  {backend.name:13s} {works if reason is None else f'does not work: {reason}'} - {backend.description}"
        )
    sets, more = _instruction_sets()
    about = {"moh": moh.__version__, "python": platform.python_version(), "platform": platform.platform()}
    # a backend and an instruction set have the reason why they do not work here, or null
    return {**about, "versions": versions, "devices": devices, "backends": backends, **sets}, lines + more


def _instruction_sets() -> _Described:
    from moh.attention import cpu

    if cpu.unavailable() is not None:
        return {"instruction_set": None, "instruction_sets": {}}, []
    used, left_out = cpu.instruction_set(), cpu.instruction_sets_left_out()
    known = dict.fromkeys(cpu.instruction_sets())
    lines = ["instruction sets of the C++ kernels, MOH_CPU_ISA chooses one"]
    lines += [f"  {name:13s} {'in use' if name == used else 'works'}" for name in known]
    lines += [f"  {name:13s} does not work: {reason}" for name, reason in left_out.items()]
    return {"instruction_set": used, "instruction_sets": {**known, **left_out}}, lines


def _of_model(arguments: argparse.Namespace) -> _Described:
    import torch

    from moh.attention import Call, backends_passed_over
    from moh.config import FIXED
    from moh.models.heads import HasLayerHeads
    from moh.models.transformers.loading import load_config

    config: Any = load_config(arguments.model, **revision(arguments))
    is_routed = isinstance(config, HasLayerHeads)
    if not is_routed:
        figures = {"model_type": config.model_type, "share_of_heads": None, "runs": None}
        return figures, [f"{config.model_type}: dense, so every attention implementation computes all heads"]
    from moh.models.transformers.attention import DEFAULT, IMPLEMENTATIONS

    device, layers = _device(arguments.device), config.layer_configs()
    H, width = config.num_attention_heads, getattr(config, "head_dim", None)
    Hkv, D = getattr(config, "num_key_value_heads", None) or H, width or config.hidden_size // H
    number = torch.zeros(1, device=device, dtype=getattr(torch, arguments.dtype), requires_grad=arguments.train)
    q, k = number.expand(1, H, _TOKENS, D), number.expand(1, Hkv, _TOKENS, D)
    fixed = [layer for layer in layers if layer.router == FIXED]
    routed = next((layer for layer in layers if layer.router != FIXED), None)
    per_group = None if routed is None else routed.heads_per_group
    call = Call(q, k, k, number.expand(1, _TOKENS, H), heads_per_group=per_group)
    reasons = backends_passed_over(call._replace(dropout_p=arguments.dropout))
    chosen = next(name for name, reason in reasons.items() if reason is None)
    some, everything = f"computes {config.share:.0%} of the heads", "computes all heads, saves nothing"
    all_by_name = _COMPUTE_ALL if routed is None or per_group is not None else (*_COMPUTE_ALL, "grouped")
    saves = some if chosen not in all_by_name else everything
    lines = [f"{config.model_type}: {len(layers)} layers of {H} heads, {config.share:.0%} of them active"]
    requested = config._attn_implementation
    origin = "the default" if requested is None else "from config.json"
    name_of_run, problem = _loaded_implementation(config)
    used = IMPLEMENTATIONS.get(name_of_run, "reference") or chosen
    used_saves = used not in all_by_name
    lines.append(f"  {'runs':18s} {name_of_run}, {origin}; {problem or (some if used_saves else everything)}")
    if fixed:
        without = sum(layer.num_shared == 0 for layer in fixed)
        lines.append(
            f"  {len(fixed)} layers have fixed heads, {without} of these none: their other heads do not exist, whatever computes "
            "them"
        )
    quantisation = getattr(config, "quantization_config", None)
    method = None if quantisation is None else _method(quantisation)
    if method is not None:
        decoded = "; a new token on the CPU by our operators" if _has_int8_rows(quantisation) else ""
        lines.append(
            f"  {'projections':18s} quantised ({method}): dense products, by the library that quantised them{decoded}"
        )
    lines.append(f"  {DEFAULT:18s} the default: {chosen} on {device} in {arguments.dtype}; {saves}")
    for name, backend in IMPLEMENTATIONS.items():
        if backend not in (None, *_COMPUTE_ALL):
            lines.append(f"  {name:18s} that backend; {everything if backend in all_by_name else some}")
    lines += [
        f"  {DEFAULT + '_reference':18s} the definition; computes all heads, saves nothing",
        f"  {DEFAULT}_straight_through  for training: gradients of inactive heads' gates too; computes all heads, saves nothing",
        "  any other          transformers' own (eager, sdpa, flash_attention_2, ...), gates in front of W_O; computes",
        "                     all heads, saves nothing",
    ]
    figures = {"model_type": config.model_type, "share_of_heads": config.share, "layers": len(layers), "heads": H}
    figures["quantised"] = method
    return {**figures, "runs": name_of_run, "problem": problem, "backend": used, "saves": used_saves}, lines


def _method(quantisation: Any) -> str:
    """The library that a saved configuration of quantised weights names."""
    method = quantisation["quant_method"] if isinstance(quantisation, dict) else quantisation.quant_method
    return str(getattr(method, "value", method))


def _has_int8_rows(quantisation: Any) -> bool:
    """Whether a saved configuration names the weights that `moh.attention.projections.matrix_of` knows."""
    saved: dict[str, Any] = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    kinds = saved.get("quant_type")  # torchao's: {"default": {"_type": class, "_data": {argument: value}}}
    kind = kinds.get("default", {}) if isinstance(kinds, dict) else {}
    granularity = kind.get("_data", {}).get("granularity") or {}
    return (kind.get("_type"), granularity.get("_type")) == ("Int8WeightOnlyConfig", "PerRow")


def _loaded_implementation(config: Any) -> tuple[str, str | None]:
    """The `attn_implementation` that a model with this configuration is loaded with, and why it can't be loaded, if so."""
    import torch
    from transformers import AutoModel

    from moh.models.transformers.attention import DEFAULT, IMPLEMENTATIONS

    name: str = config._attn_implementation or DEFAULT
    if name in IMPLEMENTATIONS:
        return name, None
    try:
        with torch.device("meta"):  # transformers checks and resolves the name as it builds the model
            built: str = AutoModel.from_config(config).config._attn_implementation
    except (ValueError, ImportError) as error:
        return name, f"can't be loaded so: {' '.join(str(error).split())}; attn_implementation={DEFAULT!r} works"
    return built, None


def _of_call(arguments: argparse.Namespace) -> _Described:
    import torch

    from moh.attention import Call, backends_passed_over

    B, H, Hkv, N, D = arguments.shape
    if min(arguments.shape) < 1 or H % Hkv:
        raise ValueError(f"--shape must be B H HKV N D, each at least 1, HKV a divisor of H, got {arguments.shape}")
    if not 0 <= arguments.dropout < 1:
        raise ValueError(f"--dropout must be at least 0 and below 1, got {arguments.dropout}")
    if arguments.share is not None and not 0 < arguments.share <= 1:
        raise ValueError(f"--share must be above 0 and at most 1, got {arguments.share}")
    device = _device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    number = torch.zeros(1, device=device, dtype=dtype, requires_grad=arguments.train)
    q, k, gates = number.expand(B, H, N, D), number.expand(B, Hkv, N, D), number.expand(B, N, H)
    reasons = backends_passed_over(Call(q, k, k, gates, dropout_p=arguments.dropout))
    chosen = next(name for name, reason in reasons.items() if reason is None)
    lines = [
        f"{chosen} handles B{B} H{H}/{Hkv} N{N} D{D} {arguments.dtype} on {device}{' with gradients' * arguments.train}"
    ]
    for name, reason in reasons.items():
        lines.append(
            f"  {name:13s} {reason or ('handles it' if name == chosen else 'could handle it, but comes later')}"
        )
    figures: dict[str, Any] = {"backend": chosen, "reasons": reasons}
    if arguments.share is not None:
        projections, more = _of_projections(number, arguments)
        return {**figures, "projections": projections}, lines + more
    return figures, lines


def _of_projections(number: Any, arguments: argparse.Namespace) -> _Described:
    from torch import nn

    from moh.attention.projections import Kind, projections_passed_over

    B, H, _, N, D = arguments.shape
    linear = nn.Linear(1, 1, device=number.device, dtype=number.dtype)
    linear.in_features = linear.out_features = H * D
    linear.weight = nn.Parameter(number.detach().expand(H * D, H * D), requires_grad=arguments.train)
    lines = [
        f"projections of {arguments.share:.0%} of the heads, width {H * D}, where the router reads the layer's input"
    ]
    found: dict[str, Any] = {}
    products: tuple[tuple[Kind, Any], ...] = (
        ("queries", number.expand(B, N, H * D)),
        ("output", number.expand(B, N, H, D)),
    )
    for kind, x in products:
        reasons = projections_passed_over(linear, x, kind, H, arguments.share)
        found[kind] = chosen = next((name for name, reason in reasons.items() if reason is None), "dense")
        why = "".join(f"; {name}: {reason}" for name, reason in reasons.items() if reason is not None)
        lines.append(f"  {kind:13s} {chosen}{why if chosen == 'dense' else ''}")
    return found, lines


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
