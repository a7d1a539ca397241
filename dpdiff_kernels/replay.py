"""Calls on a GPU that are recorded once, and replayed from then on.

What Python does around a launch (checks, sizes, strides, choices of tiles, Triton's own look at every argument) takes
longer than the kernels of a small problem. All of it depends on the operands' sizes, strides, types and alignment and
on the options, not on what is in the operands. So the first call with these is recorded: the kernels that it launches
and PyTorch's operations, allocations included. Later ones replay just these, on other tensors.

A call is not kept where the host looks at what a tensor holds, where two operands begin at the same address, and after
too many steps. While it is recorded, no tensor is released.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial, update_wrapper, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_MOST_STEPS = 1024  # of a call that is kept
_MOST_CALLS = 1024  # kept of a function
_STREAM = 0  # the slot that holds the current stream
_ALIGNED = 16  # bytes, of which Triton asks whether an address is a multiple

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_running = threading.local()
_everything: list["_Kept"] = []


def replayed(choice: Callable[[], str]) -> Callable[[Callable], Callable]:
    """Decorator of a function that users call: replays it on CUDA tensors. Where a gradient is wanted, and the call
    comes to a single operator on the very tensors that it was given, that one is called.

    Its results, a tensor or a tuple of tensors and None, depend on nothing but its arguments and `choice()`, of a
    backend.
    """

    def decorate(function: Callable) -> Callable:
        calls, routes = _Calls(function), _Routes(function)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or not (args and isinstance(args[0], Tensor) and is_on_gpu(args[0]))
                or torch._C._len_torch_dispatch_stack() > 0
                or torch._C._functorch.peek_interpreter_stack() is not None
                or forward_ad._current_level >= 0
                or torch.is_autocast_enabled("cuda")  # which it may switch off on the way
            ):
                return function(*args, **kwargs)
            values = (*args, *kwargs.values()) if kwargs else args
            key, tensors, wanting = _signature(values)
            key = key and (choice(), *kwargs, *key)
            if wanting and torch.is_grad_enabled():
                return routes.run(key, values, args, kwargs)
            return calls.run(key, tensors, args, kwargs)

        return call

    return decorate


class ReplayedOperator:
    """The function of an operator, below autograd and with nobody else to see the call: replays it."""

    def __init__(self, function: Callable) -> None:
        update_wrapper(self, function)
        self._calls = _Calls(function, share_empty=True)

    def __call__(self, *arguments: Any) -> Any:
        key, tensors, _ = _signature(arguments)
        return self._calls.run(key, tensors, arguments, {})


def is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def forget() -> None:
    """Forgets all calls, as is needed where what they depend on is changed, such as a kernel's tiles."""
    for calls in _everything:
        calls.kept.clear()


def forgo() -> None:
    """Keeps the call that is being recorded, if there is one, from being kept."""
    if not torch.compiler.is_compiling() and recorder() is not None:
        recorder().give_up("forgone")


def recorder() -> "Recorder | None":
    """What records a call in this thread."""
    return getattr(_running, "recorder", None)


def _signature(values: Iterable) -> tuple[tuple | None, list[Tensor], bool]:
    """What a call depends on, but for what the tensors hold (None where it isn't to be replayed), the tensors, and
    whether one of them wants a gradient."""
    key, tensors, addresses, wanting = [], [], [], False
    for x in values:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            try:
                address = x.data_ptr()
                key.append((x.shape, x.stride(), x.dtype, x.get_device(), address % _ALIGNED))
            except RuntimeError:  # a sparse one, say, of which the function will complain
                return None, tensors, wanting
            tensors.append(x)
            addresses.append(address)
            if x.requires_grad:
                wanting = True
        elif isinstance(x, Tensor):
            return None, tensors, wanting
        else:
            key.append((kind, x))
    if len(set(addresses)) < len(addresses):
        return None, tensors, wanting
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():  # whose stream it would be
        return None, tensors, wanting
    kind = "cuda" if device >= 0 else "cpu"
    key.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
    return tuple(key), tensors, wanting


class _Kept:
    """What is kept of a function's calls, by their keys: `repeat(given)` does without the function; None: it is run."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.kept: dict[tuple, Any] = {}
        _everything.append(self)

    def run(self, key: tuple | None, given: Sequence, args: tuple, kwargs: dict) -> Any:
        if key is None or recorder() is not None:
            return self.function(*args, **kwargs)
        try:
            kept = self.kept.get(key, self)
        except TypeError:  # an argument without a hash, of which the function will complain
            return self.function(*args, **kwargs)
        if kept is self:
            if len(self.kept) >= _MOST_CALLS:
                self.kept.clear()
            results, self.kept[key] = self.first(given, args, kwargs)
            return results
        return self.function(*args, **kwargs) if kept is None else kept.repeat(given)


class _Routes(_Kept):
    """Of calls with a gradient, the operator that they come to."""

    def first(self, values: Sequence, args: tuple, kwargs: dict) -> tuple[Any, "_Route | None"]:
        _running.seen = []
        try:
            results = self.function(*args, **kwargs)
            return results, _Route.of(_running.seen, values, results)
        finally:
            _running.seen = None


class _Route(NamedTuple):
    """One of the results of `differentiable(*arguments)`, with the call's values in their places."""

    differentiable: Callable
    arguments: list
    filled: tuple[tuple[int, int], ...]  # place, and which value
    result: int

    def repeat(self, values: Sequence) -> Tensor:
        arguments = self.arguments.copy()
        for place, value in self.filled:
            arguments[place] = values[value]
        return self.differentiable(*arguments)[self.result]

    @classmethod
    def of(cls, seen: list[tuple[Callable, tuple, tuple]], values: Sequence, results: Any) -> "_Route | None":
        if len(seen) != 1:
            return None
        [(differentiable, arguments, outputs)] = seen
        given = {id(x): i for i, x in enumerate(values) if isinstance(x, Tensor)}
        tensors = {place: x for place, x in enumerate(arguments) if isinstance(x, Tensor)}
        result = next((i for i, x in enumerate(outputs) if x is results), None)
        if result is None or any(id(x) not in given for x in tensors.values()):
            return None
        others = [None if place in tensors else x for place, x in enumerate(arguments)]
        return cls(differentiable, others, tuple((place, given[id(x)]) for place, x in tensors.items()), result)


def saw(differentiable: Callable, arguments: tuple, outputs: Any) -> None:
    """An operator was called, and autograd sees it."""
    seen = getattr(_running, "seen", None)
    if seen is not None:
        seen.append((differentiable, arguments, outputs))


class _Calls(_Kept):
    """Calls without a gradient. share_empty: results without elements may be the same tensors each time."""

    def __init__(self, function: Callable, share_empty: bool = False) -> None:
        super().__init__(function)
        self.share_empty = share_empty

    def first(self, tensors: list[Tensor], args: tuple, kwargs: dict) -> tuple[Any, "_Call | None"]:
        _running.recorder = Recorder(tensors)
        try:
            with _running.recorder:
                results = self.function(*args, **kwargs)
            return results, _running.recorder.call(results, self.share_empty)
        finally:
            _running.recorder = None


class _Step(NamedTuple):
    """`call(*arguments)` with what the slots hold in its places."""

    call: Callable
    arguments: list
    filled: tuple[tuple[int, int], ...]  # place, slot
    results: tuple[int, ...]  # slots
    done: tuple[int, ...] = ()  # slots that nobody needs any more


class _Call(NamedTuple):
    steps: list[_Step]
    slots: int
    results: list  # slots; None, or a tensor without elements, as they are
    make: Callable | None  # a tuple of them; None: a tensor alone

    def repeat(self, tensors: list[Tensor]) -> Any:
        held = [None, *tensors, *[None] * (self.slots - len(tensors) - 1)]
        device = tensors[0].get_device()
        if device >= 0:
            held[_STREAM] = torch._C._cuda_getCurrentRawStream(device)
        with torch._C._AutoDispatchBelowAutograd():
            for call, arguments, filled, results, done in self.steps:
                if filled:
                    arguments = arguments.copy()
                    for place, slot in filled:
                        arguments[place] = held[slot]
                found = call(*arguments)
                if len(results) == 1:
                    held[results[0]] = found
                elif results:
                    for slot, tensor in zip(results, found):
                        held[slot] = tensor
                for slot in done:
                    held[slot] = None
        if self.make is None:
            return held[self.results[0]]
        return self.make([held[x] if type(x) is int else x for x in self.results])


class _Unrepeatable(Exception):
    """What was called has no place in a replay."""


class Recorder(TorchDispatchMode):
    """Runs what it sees, and writes it down."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.operands = len(tensors)
        self.steps: list[_Step] = []
        self.tensors: list = [None, *tensors]  # by slot; they all stay, and so do their identities and addresses
        self.slots = {id(t): slot for slot, t in enumerate(self.tensors) if t is not None}
        self.views: dict[tuple, int] = {}  # slots
        self.fault = ""  # why the call is not to be kept

    def give_up(self, fault: str) -> None:
        self.fault = self.fault or fault
        self.tensors.clear()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = operation(*args, **kwargs)
        if not self.fault:
            try:
                self._saw(operation, args, kwargs, results)
            except _Unrepeatable as fault:
                self.give_up(str(fault))
        return results

    def _saw(self, operation: Any, args: tuple, kwargs: dict, results: Any) -> None:
        if any(isinstance(x, Tensor) for x in kwargs.values()):
            raise _Unrepeatable(f"{operation} has a tensor by name")
        found = results if isinstance(results, (tuple, list)) else [results]
        if not any(isinstance(x, Tensor) for x in (*args, *found)):
            return  # a question about types
        if torch.Tag.dynamic_output_shape in operation.tags:
            raise _Unrepeatable(f"{operation} has a result of any size")
        if operation in _ALLOCATIONS:
            layout = results.shape, results.stride()
            self._add(partial(torch.empty_strided, *layout, dtype=results.dtype, device=results.device), (), found)
        elif operation is _aten.detach.default:  # below autograd it is the tensor itself
            self._known(results, self._slot(args[0]))
        elif operation.is_view and results is found[0]:
            view = operation, self._slot(args[0]), *map(str, args[1:])
            if view not in self.views:
                self._add(operation, args, found)
                self.views[view] = self._slot(results)
            self._known(results, self.views[view])
        else:
            self._add(partial(operation, **kwargs) if kwargs else operation, args, found)

    def launched(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        """compiled: what Triton found for the kernel and launched; None from its interpreter."""
        if self.fault:
            return
        first = {(t.data_ptr(), t.dtype): t for t in reversed(self.tensors) if t is not None}

        def at_address(x: Any) -> Any:  # kernels don't see the shape of a view
            return first.get((x.data_ptr(), x.dtype), x) if isinstance(x, Tensor) else x

        try:
            if compiled is None:
                self._add(partial(kernel[grid], **kwargs), [at_address(x) for x in args], ())
                return
            named = dict(zip(kernel.arg_names, args)) | kwargs
            # As Triton's JITFunction.run does, once it has found them.
            head = [*grid, *[1] * (3 - len(grid)), None, compiled.function, compiled.packed_metadata, None, None, None]
            body = [at_address(named[name]) for name in kernel.arg_names]
            self._add(compiled.run, head + body, (), ((3, _STREAM),))
        except _Unrepeatable as fault:
            self.give_up(str(fault))

    def _add(self, call: Callable, arguments: Sequence, results: Iterable, filled: tuple = ()) -> None:
        arguments = list(arguments)
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor):
                filled += ((place, self._slot(x)),)
                arguments[place] = None
            elif isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
                raise _Unrepeatable(f"{call} has a list of tensors")
        slots = []
        for tensor in results:
            if not isinstance(tensor, Tensor):
                raise _Unrepeatable(f"{call} tells the host what a tensor holds")
            if id(tensor) not in self.slots:  # else changed in place
                self._known(tensor, len(self.tensors))
            slots.append(self._slot(tensor))
        self.steps.append(_Step(call, arguments, filled, tuple(slots)))

    def _known(self, tensor: Tensor, slot: int) -> None:
        self.tensors.append(tensor)
        self.slots[id(tensor)] = slot

    def _slot(self, tensor: Tensor) -> int:
        if id(tensor) not in self.slots:
            raise _Unrepeatable("a tensor is neither an operand nor a result")
        return self.slots[id(tensor)]

    def call(self, results: Any, share_empty: bool) -> _Call | None:
        """The steps that are needed for the results; None where they can't be replayed."""
        make = None if isinstance(results, Tensor) else getattr(results, "_make", tuple)
        wanted = []
        for x in [results] if make is None else results:
            if isinstance(x, Tensor) and not (share_empty and x.numel() == 0):
                x = self.slots.get(id(x), 0)
            wanted.append(x)
        needed = {x for x in wanted if type(x) is int}
        if self.fault or len(self.steps) > _MOST_STEPS or min(needed, default=1) <= self.operands:
            return None
        kept: list[_Step] = []
        for step in reversed(self.steps):
            in_vain = not step.filled or (isinstance(step.call, torch._ops.OpOverload) and step.call.is_view)
            if step.results and in_vain and needed.isdisjoint(step.results):
                continue  # an allocation or a view that is looked at by its address, or not at all
            used = {slot for _, slot in step.filled}
            kept.append(step._replace(done=tuple((used | set(step.results)) - needed - {_STREAM})))
            needed |= used
        return _Call(kept[::-1], len(self.tensors), wanted, make)


class Launcher(NamedTuple):
    """In place of a Triton kernel, `kernel[grid](...)`, while a call is recorded."""

    recorder: Recorder
    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():  # Triton's interpreter uses PyTorch
                compiled = self.kernel[grid](*args, **kwargs)
            self.recorder.launched(self.kernel, compiled, grid, args, kwargs)

        return run
