"""Adapter: the trainable half of an adapted layer, its parameters, how they start, what they make of a base layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .backend.interface import LOW_PRECISION
from .checks import DTYPES, check_dropout, check_finite, check_route
from .functional import hydra_linear
from .reference import merged_parameters
from .weights import Packed, plain_value

Device = torch.device | str | int | None


class Merging(nn.Module):
    """A layer that can be merged: what it holds meanwhile moves with it, and a change of its Parameters is noticed.

    What it holds are no buffers. A merged model would have more of them than the same model unmerged, and what goes
    through the buffers of two models side by side (``AveragedModel``) would fail.
    """

    HELD: tuple[str, ...]
    merged_weight: Tensor | None = None
    merged_bias: Tensor | None = None
    # The Parameters that the merged weight is made of, and how often each had been written in place.
    merged_from: tuple[tuple[Tensor, int], ...] = ()

    def _note(self, *modules: nn.Module) -> None:
        """Remembers the state of their Parameters; those made in inference mode keep no count."""
        self.merged_from = _counted(p for module in modules for p in module.parameters())

    def _check_unchanged(self) -> None:
        """Raises ValueError where a noted Parameter was written since: the merged weight does not have the change."""
        if not torch.compiler.is_compiling() and self._is_outdated():
            changed = {id(p) for p, version in self.merged_from if p._version != version}
            name = next((name for name, p in self.named_parameters() if id(p) in changed), "a parameter")
            raise ValueError(
                f"{name}: it was changed while the layer is merged, so the merged weight is out of date; unmerge "
                "before anything changes parameters, such as an optimizer or an average of weights"
            )

    def _is_outdated(self) -> bool:
        return any(p._version != version for p, version in self.merged_from)

    def _by_merged(self, x: Tensor) -> Tensor:
        """h [*, N] of the dense weight that a merged layer over a quantised base has, in x's dtype."""
        weight: Any = self.merged_weight
        return hydra_linear(x.to(weight.dtype), weight, self.merged_bias, None, None, None, None).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self.HELD:
            held = getattr(self, name)
            setattr(self, name, None if held is None else fn(held))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts its own count of writes, so it gets the number of those since the merge.
        return self.__dict__ | {"merged_from": tuple((p, p._version - version) for p, version in self.merged_from)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        since = ((p, writes) for p, writes in self.merged_from if not p.is_inference())
        self.merged_from = tuple((p, p._version - writes) for p, writes in since)


def _counted(parameters: Iterable[Tensor]) -> tuple[tuple[Tensor, int], ...]:
    return tuple((p, p._version) for p in parameters if not p.is_inference())


class Adapter(nn.Module):
    """Two low-rank branches (Eq. 9-10 of arXiv 2309.06922) without a base layer; `HydraLinear` is one with its own.

    The Parameters have no values until `reset_adapters` draws them.

    Args:
        in_features, out_features: K and N of the base layer.
        r_a, r_b: ranks of the parallel and of the sequential branch; 0 leaves the branch out.
        scale_a, scale_b: factors of the branches; with ``learnable_scale`` their initial values.
        learnable_scale, dropout, input_dropout, adapter_bias, adapter_dtype, init_std, form, backend: as for
            `HydraLinear`.
        init: "gaussian", or "peft" for a uniform start within 1/sqrt(fan_in), as PEFT's LoRA has it.
        device: of the adapters.
        dtype: of the base layer, and of the adapters where ``adapter_dtype`` is None.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    BIASES = ("A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias")
    ADAPTERS = ("A_down", "A_up", "B_down", "B_up", *BIASES, "scale_a", "scale_b")

    A_down: nn.Parameter | None
    A_up: nn.Parameter | None
    B_down: nn.Parameter | None
    B_up: nn.Parameter | None
    A_down_bias: nn.Parameter | None
    A_up_bias: nn.Parameter | None
    B_down_bias: nn.Parameter | None
    B_up_bias: nn.Parameter | None
    scale_a: float | Tensor
    scale_b: float | Tensor
    init: str = "gaussian"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r_a: int = 4,
        r_b: int = 4,
        scale_a: float = 1.0,
        scale_b: float = 1.0,
        learnable_scale: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        adapter_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_std: float | None = None,
        init: str = "gaussian",
        form: str = "auto",
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features, 1)
        check_count("out_features", out_features, 1)
        check_count("r_a", r_a, 0)
        check_count("r_b", r_b, 0)
        for name, flag in (("learnable_scale", learnable_scale), ("adapter_bias", adapter_bias)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected True or False, got {flag!r}")
        check_finite("scale_a", scale_a)
        check_finite("scale_b", scale_b)
        check_dropout("dropout", dropout)
        check_dropout("input_dropout", input_dropout)
        if input_dropout and not r_a:
            raise ValueError(
                f"input_dropout: expected 0 with r_a = 0, since only the parallel branch has it, got {input_dropout}"
            )
        check_route(form, backend)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if adapter_dtype not in (None, dtype) and not (adapter_dtype == torch.float32 and dtype in LOW_PRECISION):
            raise ValueError(
                f"adapter_dtype: expected None, or torch.float32 over a base in float16 or bfloat16, "
                f"got {adapter_dtype} over a base in {dtype}"
            )
        if init_std is not None:
            check_finite("init_std", init_std, "None or a number")
            if init_std < 0:
                raise ValueError(f"init_std: expected None or a number >= 0, got {init_std}")
        if init not in ("gaussian", "peft"):
            raise ValueError(f"init: expected 'gaussian' or 'peft', got {init!r}")
        if init == "peft" and init_std is not None:
            raise ValueError(f"init_std: expected None with init='peft', which sets the deviation, got {init_std}")
        self.in_features, self.out_features, self.r_a, self.r_b = in_features, out_features, r_a, r_b
        self.dropout, self.input_dropout = dropout, input_dropout
        self.adapter_bias, self.init_std, self.init = adapter_bias, init_std, init
        self.form, self.backend = form, backend
        self._initial_scales = {"scale_a": scale_a, "scale_b": scale_b}

        def adapter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=adapter_dtype or dtype))

        for side, r, fan_in in (("A", r_a, in_features), ("B", r_b, out_features)):
            biased, scale = adapter_bias and r > 0, f"scale_{side.lower()}"
            self.register_parameter(f"{side}_down", adapter(r, fan_in) if r else None)
            self.register_parameter(f"{side}_up", adapter(out_features, r) if r else None)
            self.register_parameter(f"{side}_down_bias", adapter(r) if biased else None)
            self.register_parameter(f"{side}_up_bias", adapter(out_features) if biased else None)
            setattr(self, scale, adapter() if learnable_scale and r else self._initial_scales[scale])

    def adapters(self) -> dict[str, nn.Parameter]:
        """The Parameters of the branches by name: what training changes.

        Raises:
            ValueError: where one of them is parametrized, so that training changes something else.
        """
        for name in self.ADAPTERS:
            if parametrize.is_parametrized(self, name):
                raise ValueError(
                    f"adapters: {name} is parametrized, so other parameters train in its place; use state_dict(), "
                    f"or call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
                )
        return {name: p for name in self.ADAPTERS if isinstance(p := getattr(self, name), nn.Parameter)}

    def reset_adapters(self) -> None:
        """Puts the adapter at the start of training: down projections random, up projections and biases zero."""
        with torch.no_grad():
            for name, parameter in self.adapters().items():
                if name in ("A_down", "B_down"):
                    usual = 1 / math.sqrt(parameter.shape[1])
                    if self.init == "peft":
                        parameter.uniform_(-usual, usual)
                    else:
                        parameter.normal_(0, usual if self.init_std is None else self.init_std)
                elif name in self._initial_scales:
                    parameter.fill_(self._initial_scales[name])
                else:
                    parameter.zero_()

    def adapted(self, x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
        """h [*, N] for x [*, K] over a base layer of weight [N, K] and bias [N] or None (`hydra_linear`)."""
        biases = {name: getattr(self, name) for name in self.BIASES} if self.adapter_bias else {}
        return hydra_linear(
            x,
            weight,
            bias,
            self.A_down,
            self.A_up,
            self.B_down,
            self.B_up,
            **biases,
            scale_a=self.scale_a,
            scale_b=self.scale_b,
            dropout_p=self.dropout,
            input_dropout_p=self.input_dropout,
            training=self.training,
            form=self.form,
            backend=self.backend,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks every module first."""
        raise TypeError(
            "torch.jit.script cannot compile adapted layers; use torch.compile, torch.export or torch.jit.trace, "
            "or script the model that merge_and_unload returns"
        )

    def extra_repr(self) -> str:
        shown = [f"r_a={self.r_a}", f"r_b={self.r_b}"]
        for name in self._initial_scales:
            scale = getattr(self, name)
            if isinstance(scale, Tensor) or scale != 1:
                shown.append(f"{name}={'learnable' if isinstance(scale, Tensor) else scale}")
        shown += [f"{name}={p}" for name in ("dropout", "input_dropout") if (p := getattr(self, name))]
        shown += ["adapter_bias=True"] if self.adapter_bias else []
        shown += [f"{name}={v}" for name, v in (("form", self.form), ("backend", self.backend)) if v != "auto"]
        return ", ".join(shown)

    # Not in inference mode, even where the caller is: a later backward must be able to save the merged weight.
    @torch.inference_mode(False)
    @torch.no_grad()
    def merged_with(self, weight: Tensor | Packed, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [N, K] and the bias [N], or None, of the frozen layer that equals the adapted one (Eq. 11-12)."""
        return merged_parameters(plain_value(weight), bias, **operands_of(self))


def check_count(name: str, value: int, least: int) -> None:
    """Raises unless value is an integer of at least least."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")


def operands_of(adapter: Adapter) -> dict[str, Any]:
    """What `hydra_linear` takes of an adapter, by name."""
    return {name: getattr(adapter, name) for name in Adapter.ADAPTERS}


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The operands of the one adapter that acts as all of these: both branches are linear in what they read."""
    operands: dict[str, Any] = dict.fromkeys(Adapter.ADAPTERS) | {"scale_a": 1.0, "scale_b": 1.0}
    for side in "AB":
        names = [f"{side}_{name}" for name in ("down", "up", "down_bias", "up_bias")]
        present = [part for part in parts if part[names[0]] is not None]
        if present:
            branches = [(*(part[name] for name in names), part[f"scale_{side.lower()}"]) for part in present]
            operands |= zip(names, one_branch(branches), strict=True)
    return operands


def one_branch(
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Down, up and their biases of the one branch that is the sum of these, each of them with a scale at the end."""
    downs, ups, down_biases, up_biases = [], [], [], []
    for down, up, down_bias, up_bias, s in parts:
        downs.append(wide(down))
        ups.append(s * wide(up))
        down_biases.append(downs[-1].new_zeros(len(down)) if down_bias is None else wide(down_bias))
        up_biases += [] if up_bias is None else [s * wide(up_bias)]
    biased = any(part[2] is not None for part in parts)
    return (
        torch.cat(downs),
        torch.cat(ups, dim=1),
        torch.cat(down_biases) if biased else None,
        sum(up_biases[1:], up_biases[0]) if up_biases else None,
    )


def wide(t: Tensor) -> Tensor:
    """In float32 or better, so that scales are not rounded with it."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
