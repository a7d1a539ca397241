"""Operators of torch.library get their fake kernels and gradients, and are called.

Where nobody but autograd has to see the call, torch.library is passed by: its layers of Python take longer than small
problems, or the kernels of large ones on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dpdiff_kernels.replay import recorder, saw


def register(
    name: str,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    *modules: Any,
) -> Callable:
    """Registers what is given for the operator `name`, "namespace::operator", and returns what calls it.

    fake, backward, setup_context: as for `torch.library.register_fake` and `register_autograd`.
    modules: one of them has the function that the operator runs, under its name, if that is Python's.
    """
    if fake is not None:
        torch.library.register_fake(name, fake)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
    namespace, operator = name.split("::")
    function = next((getattr(module, operator) for module in modules if hasattr(module, operator)), None)
    operator = getattr(getattr(torch.ops, namespace), operator).default
    return _Operator(operator, function or _below_autograd(operator), backward, setup_context)


def _below_autograd(operator: Callable) -> Callable:
    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


class _Operator:
    """Calls the function, with its gradient, or the operator where it has to be seen."""

    def __init__(
        self, operator: Callable, function: Callable, backward: Callable | None, setup_context: Callable | None
    ) -> None:
        self.operator, self.function, self.differentiable = operator, function, None
        if backward is not None:

            def forward(ctx: Any, *arguments: Any) -> Any:
                output = function(*arguments)
                if setup_context is not None:  # not autograd.Function's own, for which it binds the signature each time
                    setup_context(ctx, arguments, output)
                return output

            parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            self.differentiable = type(str(operator), (torch.autograd.Function,), parts).apply

    def __call__(self, *arguments: Any) -> Any:
        if observed(arguments):
            if self.differentiable is not None:
                _refuse_functorch(self.operator, arguments)
            return self.operator(*arguments)
        if self.differentiable is not None and torch.is_grad_enabled():
            if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
                outputs = self.differentiable(*arguments)
                saw(self.differentiable, arguments, outputs)
                return outputs
        return self.function(*arguments)


def _refuse_functorch(operator: Callable, arguments: tuple) -> None:
    if torch.compiler.is_compiling():  # which can't trace the question
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is None or transform.key() != torch._C._functorch.TransformType.Grad:
        return
    if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        raise NotImplementedError(f"torch.func doesn't differentiate {operator}: use torch.autograd")


def observed(arguments: tuple) -> bool:
    """Whether a compiler, a transform of torch.func, a dispatch mode or a subclass of Tensor is to see the call."""
    if torch.compiler.is_compiling() or dispatched() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    for x in arguments:  # `any` of a generator takes twice as long
        if type(x) is not Tensor and type(x) is not Parameter and isinstance(x, Tensor):
            return True
    return False


def dispatched() -> bool:
    """Whether a dispatch mode is active, as when torch.compile traces an operator. What records a call is none."""
    return torch._C._len_torch_dispatch_stack() > (recorder() is not None)
