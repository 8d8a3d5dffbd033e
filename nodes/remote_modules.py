"""The modules of a model whose weights are elsewhere: whoever looks gets a model's answers, whoever changes is refused.

Nodes look at a model to see what kind it is: ``hasattr(diffusion_model, "double_blocks")``, the number of blocks,
``named_modules()``, the shape of a weight. They get what ComfyUI's own model would say. What would change a module or a
weight, run one, or hang a hook on it, would change nothing that is computed, and raises ValueError.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .graph_nodes import executing_node

Shapes = Mapping[str, tuple[int, ...]]


def refuse_reach(what: str) -> NoReturn:
    """Raise ValueError, with the node that is being executed, for a change that would never reach the workers."""
    raise ValueError(
        f"{executing_node() or 'a node'} reaches into the model, to change or run {what}, which lives in the parallel "
        "workers; bypass the node, or use ComfyUI's own loader"
    )


class RemoteWeight(nn.Parameter):
    """A parameter without memory, that knows its shape and dtype; writing into it raises ValueError."""

    label = "a weight"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") and not name.startswith("__") and name not in ("requires_grad_", "share_memory_")
        in_place |= name.startswith("__i") and name not in ("__index__", "__int__", "__invert__", "__init__")
        if in_place or name == "__setitem__" or function == Tensor.data.__set__:
            refuse_reach(getattr(args[0], "label", cls.label))
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(cls) if function == Tensor.data.__get__ else result


class RemoteModule(nn.Module):
    """A module of which only names and shapes are here; ``label`` is its name in the model."""

    label = "a module"
    _sealed = False
    comfy_cast_weights = False
    """ComfyUI's layers have it; nodes that see it ask the ModelPatcher for the weight, which refuses."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self._sealed and name not in ("training", "label"):
            refuse_reach(f"{self.label}.{name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._sealed:
            refuse_reach(f"{self.label}.{name}")
        super().__delattr__(name)

    def forward(self, *_: Any, **__: Any) -> Any:
        refuse_reach(self.label)

    def _apply(self, *_: Any, **__: Any) -> Any:  # to(), cpu(), half(): there is nothing to move
        return self

    def _changed(self, *_: Any, **__: Any) -> Any:
        if self._sealed:
            refuse_reach(self.label)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._changed()
        super().add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._changed()
        super().register_parameter(name, param)

    register_buffer = register_forward_hook = register_forward_pre_hook = _changed  # type: ignore[assignment]
    register_full_backward_hook = register_full_backward_pre_hook = load_state_dict = _changed  # type: ignore


class _Settings(SimpleNamespace):
    """The settings of a model, for nodes that look at them."""

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_reach(f"its params.{name}")


class RemoteStandIn(RemoteModule):
    """Stands for a whole model: to ``isinstance`` it is what it stands for, as to ``hasattr`` and ``named_modules``.

    Args:
        config: settings of the model, by the names of the attributes that ComfyUI's has them in.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.stands_for: Any = None
        """ComfyUI's class of the model; once it is there, nothing of the model can be changed."""
        self._config = dict(config or {})

    @property
    def _sealed(self) -> bool:  # type: ignore[override]
        return self.__dict__.get("stands_for") is not None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__.get("stands_for") or type(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What ComfyUI's own model has by this name: a setting, or a method that would run blocks.
            real, config = self.__dict__.get("stands_for"), self.__dict__.get("_config", {})
            if real is None or name.startswith("__"):
                raise
            if name == "params" and name in _set_by(real):
                return _Settings(**config)
            if name in config and name in _set_by(real):
                return config[name]
            if callable(getattr(real, name, None)):
                return lambda *_, **__: refuse_reach(f"its {name}")
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        real = self.__dict__.get("stands_for")
        known = self._sealed and (name in self._modules or hasattr(real, name) or name in _set_by(real))
        if known and name != "training":
            refuse_reach(f"its {name}")
        nn.Module.__setattr__(self, name, value)


@functools.cache
def _set_by(model_class: Any) -> frozenset[str]:
    """The attributes that a class' ``__init__`` sets."""
    inits = [vars(cls)["__init__"] for cls in model_class.__mro__ if "__init__" in vars(cls) and cls is not nn.Module]
    steps = (step for init in inits if hasattr(init, "__code__") for step in dis.get_instructions(init))
    return frozenset(step.argval for step in steps if step.opname == "STORE_ATTR")


class RemoteLinear(RemoteModule, nn.Linear):
    """Stands for a linear, as an instance of one."""

    def __init__(self, weight: tuple[int, ...], bias: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight
        if not bias:
            self.bias = None  # type: ignore[assignment]


class RemoteList(RemoteModule, nn.ModuleList):
    """Stands for a list of blocks."""


def add_modules(root: nn.Module, shapes: Shapes, dtype: torch.dtype) -> None:
    """Give a module the modules and weights that these names are of.

    Args:
        root: gets them.
        shapes: names of weights, ``double_blocks.0.img_attn.qkv.weight``, and their shapes.
        dtype: of the weights.
    """
    tree: dict[str, Any] = {}
    for name, shape in shapes.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tuple(shape)
    _fill(root, tree, "", dtype)


def _fill(module: nn.Module, tree: Mapping[str, Any], prefix: str, dtype: torch.dtype) -> None:
    for name, what in tree.items():
        label = prefix + name
        if isinstance(what, tuple):
            weight = RemoteWeight(torch.empty(what, dtype=dtype, device="meta"), requires_grad=False)
            weight.label = label
            nn.Module.register_parameter(module, name, weight)
            continue
        child = _module_of(what)
        _fill(child, what, label + ".", dtype)
        child.label = label
        child._sealed = True
        nn.Module.add_module(module, name, child)


def _module_of(tree: Mapping[str, Any]) -> RemoteModule:
    numbers = [name for name in tree if name.isdigit()]
    if numbers and len(numbers) == len(tree) == 1 + max(map(int, numbers)):
        return RemoteList()
    weight = tree.get("weight")
    if isinstance(weight, tuple) and len(weight) == 2 and set(tree) <= {"weight", "bias"}:
        return RemoteLinear(weight, "bias" in tree)
    return RemoteModule()
