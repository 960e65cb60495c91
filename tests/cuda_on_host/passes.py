"""The passes of csrc/cuda over one case: operands, what a launcher is called with, and the formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .library import Framed, Tensors, call, count, framed, poisoned

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = {F32: 0, F16: 1, BF16: 2}  # HydraType


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    r_a: int
    r_b: int
    offset: int = 0  # elements by which W0, x and G miss a line of 16 bytes
    padding: int = 0  # elements between their rows
    mask: str | None = "bytes"  # or of the type's values
    pointers: bool = True  # scales
    biases: bool = True
    bias: bool = True
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype = F32

    def __str__(self) -> str:
        types = f"{self.dtype}-{self.adapter_dtype}".replace("torch.", "")
        return f"{self.M}x{self.N}x{self.K}-{self.r_a}+{self.r_b}-{types}"

    @property
    def R(self) -> int:
        return self.r_a + self.r_b


SHAPES = [
    Case(67, 129, 131, 3, 5, offset=1),
    Case(1, 1, 1, 1, 1, mask=None),
    Case(64, 128, 192, 8, 8),
    Case(300, 328, 200, 16, 0, mask="values", padding=8),
    Case(65, 71, 137, 0, 7, pointers=False, padding=1),
    Case(130, 257, 40, 20, 13, biases=False, bias=False),
    Case(31, 200, 264, 2, 1, mask="values", offset=8, padding=16, pointers=False),
    Case(271, 80, 97, 40, 24, padding=3),
    Case(197, 136, 328, 11, 21, bias=False, mask=None),
    Case(0, 40, 72, 3, 2),
]
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32)]
CASES = [replace(case, dtype=dtype, adapter_dtype=adapter) for case in SHAPES for dtype, adapter in PAIRS]


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def operands(case: Case) -> dict[str, Framed]:
    """W0, x, G, b0, the adapters, what the forward leaves, the mask and the scales, each in a frame."""
    generator = torch.Generator().manual_seed(1000 * case.M + case.K)
    M, N, K, R = case.M, case.N, case.K, case.R
    shapes = {"D": (R, K), "rest": (case.r_b, K), "Z": (M, R), "dZ": (M, R), "bias": (N,)}
    made = {name: framed(draw(generator, *shape, dtype=case.dtype)) for name, shape in shapes.items()}
    for name, shape in {"w": (N, K), "x": (M, K), "G": (M, N)}.items():
        t = draw(generator, *shape, dtype=case.dtype)
        made[name] = framed(t, shape[1] + case.padding, case.offset)
    for side, r in (("A", case.r_a), ("B", case.r_b)):
        shapes = {"down": (r, K if side == "A" else N), "up": (N, r), "down_bias": (r,), "up_bias": (N,)}
        for name, shape in shapes.items():
            if r > 0 and (case.biases or "bias" not in name):
                made[f"{side}_{name}"] = framed(draw(generator, *shape, dtype=case.adapter_dtype))
    made["d"] = framed(draw(generator, R))
    if case.mask == "bytes":
        made["mask"] = framed((torch.rand(M, R, generator=generator) < 0.7).to(torch.uint8))
    elif case.mask == "values":
        made["mask"] = framed(draw(generator, M, R, dtype=case.dtype))
    if case.pointers:
        made |= {f"scale_{s}": framed(draw(generator, dtype=case.adapter_dtype)) for s in "ab"}
    if not case.bias:
        del made["bias"]
    if case.dtype == F32 or case.r_b == 0:
        del made["rest"]
    return made


def values(case: Case, *names: str) -> dict[str, float]:
    """The arguments of these names that are no pointers."""
    known = {name: getattr(case, name) for name in ("M", "N", "K", "R", "r_a", "r_b")}
    known |= {
        "stride_wn": case.K + case.padding,
        "stride_xm": case.K + case.padding,
        "stride_gm": case.N + case.padding,
    }
    known |= {"mask_bytes": int(case.mask == "bytes"), "mask_scale": 1.0 if case.mask == "values" else 1.375}
    known |= {"scale_a": 0.75, "scale_b": -1.5, "type": TYPES[case.dtype], "adapter_type": TYPES[case.adapter_dtype]}
    return {name: known[name] for name in names}


def chosen(made: dict[str, Framed], *names: str) -> dict[str, Framed]:
    return {name: made[name] for name in names if name in made}


class Truth:
    """The formulas in float64, over operands or over their absolute values: the sums of all terms' absolute values."""

    def __init__(self, case: Case, made: dict[str, Framed], absolute: bool):
        given = {name: v.t.double().abs() if absolute else v.t.double() for name, v in made.items()}
        self.t, self.case = given, case
        scales = {f"scale_{s}": torch.tensor(v).double() for s, v in (("a", 0.75), ("b", -1.5))}
        for name, v in scales.items():
            given.setdefault(name, v.abs() if absolute else v)
        zeros = {"A_down": (case.r_a, case.K), "B_down": (case.r_b, case.N), "d": (case.R,), "bias": (case.N,)}
        zeros |= {"A_up": (case.N, case.r_a), "B_up": (case.N, case.r_b), "rest": (case.r_b, case.K)}
        zeros |= {
            "A_down_bias": (case.r_a,),
            "B_down_bias": (case.r_b,),
            "A_up_bias": (case.N,),
            "B_up_bias": (case.N,),
        }
        for name, shape in zeros.items():
            given.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        mask = given.get("mask", torch.ones(1, 1, dtype=torch.float64)).expand(case.M, case.R)
        self.mask = mask * (values(case, "mask_scale")["mask_scale"] if "mask" in given else 1.0)
        self.B_down = given["B_down"].to(case.dtype).double()
        self.up = torch.cat((given["A_up"], given["B_up"]), 1)
        self.scale = torch.cat((given["scale_a"].expand(case.r_a), given["scale_b"].expand(case.r_b)))

    def compose(self) -> Tensors:
        t = self.t
        D = torch.cat((t["A_down"], self.B_down @ t["w"]))
        d = torch.cat((t["A_down_bias"], self.B_down @ t["bias"] + t["B_down_bias"]))
        u = t["scale_a"] * t["A_up_bias"] + t["scale_b"] * t["B_up_bias"]
        return {"D": D, "d": d, "U": self.up * self.scale, "u": u}

    def down(self) -> Tensors:
        t, rest = self.t, torch.zeros_like(self.t["D"])
        rest[self.case.r_a :] = t["rest"]
        return {"Z": self.mask * (t["x"] @ (t["D"] + rest).t() + t["d"])}

    def grad_z(self) -> Tensors:
        t, up = self.t, self.up.to(self.case.dtype).double()
        sums = {"dU": t["G"].t() @ t["Z"], "g": t["G"].sum(0), "scales": (t["G"] @ up * t["Z"]).sum(0)}
        up_bias = torch.stack((sums["g"] @ t["A_up_bias"], sums["g"] @ t["B_up_bias"]))
        return {"dZ": self.mask * (t["G"] @ up) * self.scale, **sums, "up_bias": up_bias}

    def grad_w(self) -> Tensors:
        return {"dD": self.t["dZ"].t() @ self.t["x"]}

    def reduce(self) -> Tensors:
        t, r_a = self.t, self.case.r_a
        dU, g, z, dD = (t[name].sum(0) for name in ("dU", "g", "z_sums", "dD"))
        scales, (of_a, of_b) = t["scales"].sum(0), t["up_bias"].sum((0, 1))
        return {
            **{"dA_down": dD[:r_a], "dA_up": t["scale_a"] * dU[:, :r_a], "dB_up": t["scale_b"] * dU[:, r_a:]},
            **{"dB_down": dD[r_a:] @ t["w"].t() + z[r_a:, None] * t["bias"]},
            **{"dA_down_bias": z[:r_a], "dB_down_bias": z[r_a:]},
            **{"dA_up_bias": t["scale_a"] * g, "dB_up_bias": t["scale_b"] * g},
            **{"dscale_a": scales[:r_a].sum() + of_a, "dscale_b": scales[r_a:].sum() + of_b},
            **{"dbias": g + z[r_a:] @ t["B_down"]},
        }


def truths(case: Case, made: dict[str, Framed], kernel: str) -> tuple[Tensors, Tensors]:
    return tuple(getattr(Truth(case, made, absolute), kernel)() for absolute in (False, True))


def run_compose(case: Case, made: dict[str, Framed]) -> Tensors:
    R, low = case.R, case.dtype != F32 and case.r_b > 0
    outputs = {"D": poisoned(R, case.K, dtype=case.dtype), "U": poisoned(case.N, R, dtype=case.dtype)}
    if low:
        outputs["rest"] = poisoned(case.r_b, case.K, dtype=case.dtype)
    if case.bias or case.biases:
        outputs["d"] = poisoned(R)
    if case.biases:
        outputs["u"] = poisoned(case.N, dtype=case.dtype)
    if case.r_b > 0:
        outputs["C"] = poisoned(count("compose_splits", case.N, case.K), case.r_b, case.K)
    names = [f"{side}_{name}" for side in "AB" for name in ("down", "up", "down_bias", "up_bias")]
    numbers = values(case, "N", "K", "stride_wn", "r_a", "r_b", "scale_a", "scale_b", "type", "adapter_type")
    return call("compose", chosen(made, "w", "bias", "scale_a", "scale_b", *names), outputs, **numbers)


def run_down(case: Case, made: dict[str, Framed]) -> Tensors:
    outputs = {"Z": poisoned(case.M, case.R, dtype=case.dtype)}
    outputs["z"] = poisoned(count("down_splits", case.M, case.K), case.M, case.R)
    numbers = values(case, "M", "K", "stride_xm", "R", "r_a", "mask_bytes", "mask_scale", "type")
    return call("down", chosen(made, "x", "D", "rest", "d", "mask"), outputs, **numbers)


def parts(case: Case) -> dict[str, int]:
    """The numbers of partial sums that grad_z leaves."""
    of = TYPES[case.dtype]
    return {
        **{"P": count("grad_z_partials", case.M, case.R, of), "P_z": count("grad_z_sums", case.M)},
        **{"Q": count("grad_z_splits", case.M, case.N, case.R, of)},
    }


def partials(case: Case) -> dict[str, tuple[int, ...]]:
    p, N, R = parts(case), case.N, case.R
    of_ranks = {"z_sums": (p["P_z"], R), "scales": (p["P_z"], R)}
    return {"dU": (p["P"], N, R), "g": (p["P"], N), **of_ranks, "up_bias": (p["P"], p["Q"], 2)}


def partials_of_dD(case: Case) -> tuple[int, int, int]:
    return count("grad_w_splits", case.M, case.K), case.R, case.K


GRAD_Z = ("dZ", "dU", "g", "z_sums", "scales", "up_bias")


def run_grad_z(case: Case, made: dict[str, Framed], wanted: tuple[str, ...] = GRAD_Z) -> Tensors:
    shapes = {name: shape for name, shape in partials(case).items() if name in wanted}
    outputs = {name: poisoned(*shape) for name, shape in shapes.items()}
    if "dZ" in wanted:
        outputs["dZ"] = poisoned(case.M, case.R, dtype=case.dtype)
    if "dZ" in wanted or "scales" in wanted:
        outputs["dz"] = poisoned(parts(case)["Q"], case.M, case.R)
    names = ["G", "A_up", "B_up", "scale_a", "scale_b", "mask"]
    names += ["A_up_bias", "B_up_bias"] if "scales" in wanted else []
    names += ["Z"] if "dU" in wanted or "scales" in wanted else []
    numbers = values(case, "M", "N", "stride_gm", "r_a", "r_b", "mask_bytes", "mask_scale")
    numbers |= values(case, "scale_a", "scale_b", "type", "adapter_type")
    return call("grad_z", chosen(made, *names), outputs, **numbers)


def run_grad_w(case: Case, made: dict[str, Framed]) -> Tensors:
    outputs = {"dD": poisoned(*partials_of_dD(case))}
    return call("grad_w", chosen(made, "x", "dZ"), outputs, **values(case, "M", "K", "stride_xm", "R", "type"))


SWEPT = ("dZ", "g", "z_sums", "scales", "up_bias")  # that may be wanted or not


def sweep_sizes(case: Case, computes_Z: bool, wanted: tuple[str, ...] = SWEPT) -> tuple[int, ...]:
    """What the numbers of parts of sm90_sweep depend on, but M."""
    ranks = case.R + ("g" in wanted or "up_bias" in wanted)
    return case.N, case.K, ranks, computes_Z, TYPES[case.dtype]


def run_sm90_sweep(
    case: Case, made: dict[str, Framed], computes_Z: bool = False, wanted: tuple[str, ...] = SWEPT
) -> Tensors:
    sizes = sweep_sizes(case, computes_Z, wanted)
    blocks, P = count("sm90_sweep_blocks", *sizes), count("sm90_sweep_partials", case.M, *sizes)
    shapes = {"dU": (P, case.N, case.R), "dD": (P, case.R, case.K), "g": (P, case.N), "up_bias": (P, blocks, 2)}
    shapes |= dict.fromkeys(("z_sums", "scales"), (P * blocks, case.R))
    outputs = {name: poisoned(*shape) for name, shape in shapes.items() if name in ("dU", "dD", *wanted)}
    if "dZ" in wanted:
        outputs["dZ"] = poisoned(case.M, case.R, dtype=case.dtype)
    if computes_Z:
        outputs["Z"] = poisoned(case.M, case.R, dtype=case.dtype)
    names = ["x", "G", "A_up", "B_up", "scale_a", "scale_b", "mask", *(["D", "rest", "d"] if computes_Z else ["Z"])]
    names += ["A_up_bias", "B_up_bias"] if "up_bias" in wanted else []
    numbers = values(case, "M", "N", "K", "stride_xm", "stride_gm", "r_a", "r_b", "mask_bytes", "mask_scale")
    numbers |= values(case, "scale_a", "scale_b", "type", "adapter_type")
    return call("sm90_sweep", chosen(made, *names), outputs, **numbers)


# What each gradient is computed from, but scales.
SOURCES_OF = {
    **{"dA_down": ("dD",), "dA_up": ("dU",), "dB_up": ("dU",), "dB_down": ("dD", "w", "bias", "z_sums")},
    **{"dA_down_bias": ("z_sums",), "dB_down_bias": ("z_sums",), "dA_up_bias": ("g",), "dB_up_bias": ("g",)},
    **{"dscale_a": ("scales", "up_bias"), "dscale_b": ("scales", "up_bias"), "dbias": ("g", "z_sums", "B_down")},
}


def gradients(case: Case) -> list[str]:
    """Those that a case has."""
    present = {"dA": case.r_a > 0, "dB": case.r_b > 0, "ds": True, "db": True}
    return [name for name in SOURCES_OF if present[name[:2]] and not (name == "dscale_a" and case.r_a == 0)]


def run_reduce(case: Case, made: dict[str, Framed], wanted: tuple[str, ...] | None = None) -> Tensors:
    shapes = {"dA_down": (case.r_a, case.K), "dB_down": (case.r_b, case.N), "dscale_a": (), "dscale_b": ()}
    shapes |= {"dA_up": (case.N, case.r_a), "dB_up": (case.N, case.r_b), "dA_down_bias": (case.r_a,)}
    shapes |= {"dB_down_bias": (case.r_b,), "dA_up_bias": (case.N,), "dB_up_bias": (case.N,), "dbias": (case.N,)}
    wanted = gradients(case) if wanted is None else wanted
    outputs = {
        name: poisoned(*shapes[name], dtype=case.dtype if name == "dbias" else case.adapter_dtype) for name in wanted
    }
    if "dB_down" in wanted:
        outputs["T"] = poisoned(case.r_b, case.K)
        outputs["dB"] = poisoned(count("reduce_splits", case.N, case.K), case.N, case.r_b)
    names = {source for name in wanted for source in SOURCES_OF[name]} | {"scale_a", "scale_b"}
    numbers = values(case, "N", "K", "stride_wn", "r_a", "r_b", "scale_a", "scale_b", "type", "adapter_type")
    return call("reduce", chosen(made, *names), outputs, S=made["dD"].t.shape[0], **numbers, **parts(case))


def with_partials(case: Case, made: dict[str, Framed]) -> dict[str, Framed]:
    generator = torch.Generator().manual_seed(1)
    shapes = partials(case) | {"dD": partials_of_dD(case)}
    return made | {name: framed(draw(generator, *shape)) for name, shape in shapes.items()}
