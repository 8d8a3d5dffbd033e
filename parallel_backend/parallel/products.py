"""What a linear multiplies with: one kind of thing, however its weight is stored.

A `Product` gives the product with all of the weight, and with parts of it: some rows (output features) or some columns
(input features), which is what blocks ask for that compute one part while another travels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_library = torch.library.Library("hybrid_dit", "FRAGMENT")


class Product(ABC):
    """A weight ``[out, in]`` as it is stored, and how inputs are multiplied with it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight, whatever its tensors look like."""

    @property
    def kind(self) -> str | None:
        """What `restored` makes it of again, beside its tensors; None where they are not all of it."""
        return None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That the weight is stored as."""

    @property
    def title(self) -> str:
        """What it is stored as and how it is multiplied, for people: ``int8 (units)``, ``nvfp4 (dequantized)``."""
        return str(self.dtype).removeprefix("torch.")

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., in]`` times the weight, plus ``bias [out]``: ``[..., out]`` in the dtype of ``x``."""

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + product(x)`` for ``y`` ``[B, S, out]``."""
        return y + self.product(x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """As `added`, in the memory of ``y``, which is used up."""
        return self.added(y, x) if torch.is_grad_enabled() else y.add_(self.product(x))

    def product_in(self, y: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """Put `product` of ``x [tokens, in]`` into ``y [tokens, out]``."""
        y.copy_(self.product(x, bias))

    @abstractmethod
    def rows(self, first: int, end: int) -> Product:
        """Of some output features; shares the memory."""

    @abstractmethod
    def columns(self, first: int, end: int) -> Product:
        """Of some input features; shares the memory."""

    def split_rows(self, at: int) -> tuple[Product, Product]:
        """Of the output features before a number, and of the others."""
        return self.rows(0, at), self.rows(at, self.shape[0])

    def split_columns(self, at: int) -> tuple[Product, Product]:
        """Of the input features before a number, and of the others."""
        return self.columns(0, at), self.columns(at, self.shape[1])

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[out, in]`` in a dtype; memory of its own, unless it is stored so."""

    def repeated(self, dtype: torch.dtype) -> Product:
        """For many products with the same weight: what has to be done once for all of them is done now."""
        return self

    @abstractmethod
    def tensors(self) -> Sequence[Tensor]:
        """All that it holds, the same ones each time: what is moved is their `Tensor.data`."""

    def fix_sizes(self) -> None:
        """Tell the compiler that sizes are the model's: it takes all but a module's parameters for dynamic ones."""
        for tensor in self.tensors():
            torch._dynamo.mark_static(tensor)


class Plain(Product):
    """A weight that is multiplied as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def kind(self) -> str | None:
        return "plain"

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.added(y, x)
        if torch.compiler.is_compiling():
            # The compiler would give the product memory of its own and add it in another pass.
            torch.ops.hybrid_dit.add_product(y, x, self.weight)
        else:
            _add_in_place(y, x, self.weight)
        return y

    def product_in(self, y: Tensor, x: Tensor, bias: Tensor | None) -> None:
        if bias is None:
            torch.mm(x, self.weight.t(), out=y)
        else:
            torch.addmm(bias, x, self.weight.t(), out=y)

    def rows(self, first: int, end: int) -> Plain:
        return Plain(self.weight[first:end])

    def columns(self, first: int, end: int) -> Plain:
        return Plain(self.weight[:, first:end])

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def tensors(self) -> Sequence[Tensor]:
        return (self.weight,)


class Adapted(Product):
    """A product, and beside it the product of two thin matrices: a LoRA of a weight that is not touched.

    Args:
        base: of the weight.
        down, up: ``[r, in]`` and ``[out, r]``.
        strengths: ``[r]``, by which what stands between them is multiplied.
    """

    def __init__(self, base: Product, down: Tensor, up: Tensor, strengths: Tensor) -> None:
        self.base, self.down, self.up, self.strengths = base, down, up, strengths

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def kind(self) -> str | None:
        return None if self.base.kind is None else f"adapted {self.base.kind}"

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def title(self) -> str:
        return self.base.title

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.base.product(x, bias) + self.beside(x)

    def beside(self, x: Tensor) -> Tensor:
        """What is added to the product of ``base``."""
        return F.linear(F.linear(x, self.down) * self.strengths, self.up)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        return self.added(y, x) if torch.is_grad_enabled() else self.base.add_to(y, x).add_(self.beside(x))

    def rows(self, first: int, end: int) -> Adapted:
        return Adapted(self.base.rows(first, end), self.down, self.up[first:end], self.strengths)

    def columns(self, first: int, end: int) -> Adapted:
        return Adapted(self.base.columns(first, end), self.down[:, first:end], self.up, self.strengths)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.base.dense(dtype) + (self.up * self.strengths @ self.down).to(dtype)

    def repeated(self, dtype: torch.dtype) -> Product:
        return Adapted(self.base.repeated(dtype), self.down, self.up, self.strengths)

    def tensors(self) -> Sequence[Tensor]:
        return (*self.base.tensors(), self.down, self.up, self.strengths)

    def fix_sizes(self) -> None:
        """As of any product, but for the rank, which may be another one with the next LoRA."""
        self.base.fix_sizes()
        torch._dynamo.mark_static(self.down, 1)
        torch._dynamo.mark_static(self.up, 0)


class Instead(Plain):
    """Another weight in the place of a product, which is kept to come back.

    Args:
        base: what it stands for.
        weight: what is multiplied with.
    """

    def __init__(self, base: Product, weight: Tensor) -> None:
        super().__init__(weight)
        self.base = base

    @property
    def kind(self) -> str | None:
        return None if self.base.kind is None else f"instead {self.base.kind}"

    def tensors(self) -> Sequence[Tensor]:
        return (*self.base.tensors(), self.weight)


class Foreign(Product):
    """A module of another library in a linear's place (such as peft's), which has no parts.

    Of two halves of its output the first that is asked for computes both; with two halves of its input it waits for
    the second.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.module(x)  # which adds its bias itself
        return y

    def split_rows(self, at: int) -> tuple[Product, Product]:
        kept: list[Tensor] = []
        return _ForeignRows(self.module, kept, 0, at), _ForeignRows(self.module, kept, at, self.shape[0])

    def split_columns(self, at: int) -> tuple[Product, Product]:
        waiting: list[Tensor] = []
        return _ForeignColumns(self.module, waiting), _ForeignColumns(self.module, waiting)

    def rows(self, first: int, end: int) -> Product:
        raise NotImplementedError("a module of another library gives all of its outputs")

    def columns(self, first: int, end: int) -> Product:
        raise NotImplementedError("a module of another library takes all of its inputs")

    def dense(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("the weight of a module of another library is its own")

    def tensors(self) -> Sequence[Tensor]:
        return ()  # they are the module's parameters


class _ForeignRows(Foreign):
    """Some output features of a module; ``kept`` is what the other half has left, for the same inputs."""

    def __init__(self, module: nn.Module, kept: list[Tensor], first: int, end: int) -> None:
        super().__init__(module)
        self.kept, self.first, self.end = kept, first, end

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.first, super().shape[1]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kept:
            whole = self.kept.pop()
        else:
            whole = self.module(x)
            self.kept.append(whole)
        return whole[..., self.first : self.end]


class _ForeignColumns(Foreign):
    """Some input features of a module: the later half first says that it waits, then the earlier comes beside it."""

    def __init__(self, module: nn.Module, waiting: list[Tensor]) -> None:
        super().__init__(module)
        self.waiting = waiting

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.waiting.append(x)
        return x.new_empty(1).expand(*x.shape[:-1], self.shape[0])  # for its shape; nobody reads it

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        return self.add_to(y, x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        whole: Tensor = self.module(torch.cat([x, self.waiting.pop(0)], dim=-1))
        return whole


class Multiplier(nn.Module):
    """A linear whose weight is a parameter, or a `Product` of another kind."""

    weight: nn.Parameter
    product: Product | None = None

    def hold(self, product: Product) -> None:
        """Multiply with it instead of the parameter, which stays where it is a part of the product."""
        product.fix_sizes()
        parameter = self._parameters.get("weight")
        if parameter is None or all(parameter is not tensor for tensor in product.tensors()):
            if parameter is not None:
                del self.weight
            self.product = product
        else:
            self.product = None if type(product) is Plain else product


def product_of(linear: Any) -> Product:
    """What a linear multiplies with: of ours, of torch, or a module of another library in the place of one."""
    if isinstance(linear, Multiplier):
        return Plain(linear.weight) if linear.product is None else linear.product
    return Plain(linear.weight) if type(linear) is nn.Linear else Foreign(linear)


def stored_tensors(module: nn.Module) -> list[Tensor]:
    """All weights of a module, each once: its parameters, and what its linears hold in other formats."""
    held = [m.product for m in module.modules() if isinstance(m, Multiplier) and m.product is not None]
    found = [*module.parameters(), *(tensor for product in held for tensor in product.tensors())]
    return list({id(tensor): tensor for tensor in found}.values())


def held_as(module: nn.Module) -> dict[str, int]:
    """Bytes of a module's weights by `Product.title`, the most first."""
    sizes: dict[str, int] = {}
    for weight in named_weights(module).values():
        product = weight if isinstance(weight, Product) else Plain(weight)
        sizes[product.title] = sizes.get(product.title, 0) + sum(tensor.nbytes for tensor in product.tensors())
    return dict(sorted(sizes.items(), key=lambda one: -one[1]))


def named_weights(module: nn.Module) -> dict[str, Tensor | Product]:
    """The weights of a module by name, as its class has them: a `Product` where one is not stored as it is."""
    found: dict[str, Tensor | Product] = dict(module.named_parameters())
    for name, linear in module.named_modules():
        if isinstance(linear, Multiplier) and linear.product is not None:
            found[f"{name}.weight"] = linear.product
    return found


def restored(kind: str, tensors: Sequence[Tensor]) -> Product:
    """A product of its `Product.kind` and `Product.tensors`, which is how one is given to an operator."""
    name, _, options = kind.partition(" ")
    if name == "adapted":
        *base, down, up, strengths = tensors
        return Adapted(restored(options, base), down, up, strengths)
    if name == "instead":
        *base, weight = tensors
        return Instead(restored(options, base), weight)
    return KINDS[name](options, tensors)


KINDS: dict[str, Callable[[str, Sequence[Tensor]], Product]] = {"plain": lambda _, tensors: Plain(*tensors)}
"""First words of `Product.kind` -> what makes a product of the other words and the tensors."""


def _add_in_place(y: Tensor, x: Tensor, weight: Tensor) -> None:
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


_library.define("add_product(Tensor(a!) y, Tensor x, Tensor weight) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("add_product", _add_in_place, _device)
torch.library.register_fake("hybrid_dit::add_product", lambda y, x, weight: None, lib=_library)
