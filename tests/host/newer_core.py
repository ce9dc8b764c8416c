"""The call contract of ComfyUI 0.40 and later, laid over the ComfyUI 0.33 that is installed.

What changed since then, written anew: a call may carry `preferred_attention`, the module by which a checkpoint chooses
the attention of a layer; an override on the model displaces that choice; and every network hands q, k, v over in
containers. `install` gives ComfyUI's attentions that wrapper and its networks such calls.
"""

import functools
import sys

import comfy.ldm.modules.attention as attention
import comfy.sd  # noqa: F401  every network is imported
import torch

OVERRIDE = "optimized_attention_override"
INSIDE = "_inside_attn_wrapper"
HOLDER = "comfy_attention"


class ComfyAttention(torch.nn.Module):
    """A layer's choice; a child of the module that calls attention. It has no weights."""

    def __init__(self, function=None):
        super().__init__()
        self.function = function


def supported():
    """Whether this ComfyUI has containers, without which the contract cannot be laid over it."""
    return hasattr(attention, "AttentionTensorContainer")


def take(args):
    return (*(container.take() for container in args[:3]), *args[3:])


def is_contained(args):
    return len(args) >= 3 and isinstance(args[0], attention.AttentionTensorContainer)


def wrapped(function, container_function=None):
    """An attention of ComfyUI, of tensors or containers: the override first, then the layer's choice, then itself."""

    @functools.wraps(function)
    def called(*args, **kwargs):
        choice = kwargs.pop("preferred_attention", None)
        contained = is_contained(args)
        if INSIDE not in kwargs:
            kwargs[INSIDE] = True
            override = (kwargs.get("transformer_options") or {}).get(OVERRIDE)
            if override is not None:
                if contained and hasattr(override, "container_function"):
                    return override.container_function(*args, **kwargs)
                return override(function, *(take(args) if contained else args), **kwargs)
            if choice is not None and choice.function is not None:
                return choice.function(*args, **kwargs)
        if contained and called.container_function is not None:
            return called.container_function(*args, **kwargs)
        return function(*(take(args) if contained else args), **kwargs)

    called.container_function = container_function
    return called


def call_site(function):
    """What a network of 0.40 does where one of 0.33 calls `function` with plain tensors."""

    def call(*args, **kwargs):
        if not is_contained(args):
            args = (*(attention.AttentionTensorContainer(tensor) for tensor in args[:3]), *args[3:])
        if not torch.compiler.is_compiling():
            choice = getattr(caller(), HOLDER, None)
            if choice is not None:
                kwargs["preferred_attention"] = choice
        return function(*args, **kwargs)

    return call


def caller():
    """The module that calls attention, perhaps through a function or two."""
    frame = sys._getframe(2)
    for _ in range(3):
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            return module
        frame = frame.f_back
    return None


class Seen:
    """A module as another one sees it, with some attributes replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


def install(patch):
    """Lay the contract over ComfyUI with `patch` (MonkeyPatch), until that is undone."""
    old = {name: function for name, function in vars(attention).items()
           if name.startswith(("attention_", "attention3_")) and hasattr(function, "container_function")}
    new = {function: wrapped(function.__wrapped__, function.container_function) for function in old.values()}
    sites = {function: call_site(function_now) for function, function_now in new.items()}
    patch.setattr(attention, "ComfyAttention", ComfyAttention, raising=False)
    patch.setattr(attention, "wrap_attn", wrapped)
    for name, function in list(attention.REGISTERED_ATTENTION_FUNCTIONS.items()):
        patch.setitem(attention.REGISTERED_ATTENTION_FUNCTIONS, name, new.get(function, function))
    for name, module in list(sys.modules.items()):
        if not name.startswith(("comfy.", "comfy_extras.")):
            continue
        here = new if module is attention or not name.startswith("comfy.ldm.") else sites
        for attribute, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in here:
                patch.setattr(module, attribute, here[value])
    # LTX calls by the full name.
    seen = Seen(attention, **{name: call_site(getattr(attention, name))
                              for name in ("optimized_attention", "optimized_attention_masked")})
    for name in ("comfy.ldm.lightricks.model", "comfy.ldm.lightricks.av_model"):
        module = sys.modules[name]
        import comfy

        patch.setattr(module, "comfy", Seen(comfy, ldm=Seen(comfy.ldm, modules=Seen(comfy.ldm.modules,
                                                                                  attention=seen))))


def choose(network, function):
    """Every layer of a network chooses `function`, as a checkpoint's metadata would have it."""
    holders = [module for module in network.modules()
               if any(word in type(module).__name__ for word in ("Attention", "StreamBlock"))]
    for module in holders:
        setattr(module, HOLDER, ComfyAttention(function))
    return holders


def forget(network):
    for module in network.modules():
        module._modules.pop(HOLDER, None)


def rounding(calls):
    """An attention that a checkpoint may choose: it takes containers and rounds, as INT8 attention does; `calls` gets
    whether q, k, v have one shape."""

    def attention_rounding(q, k, v, heads, **kwargs):
        calls.append(q.shape == k.shape)
        kwargs[INSIDE] = True
        return attention.attention_pytorch.__wrapped__(*(x.half().to(x.dtype) for x in (q, k, v)), heads, **kwargs)

    def from_containers(q, k, v, heads, **kwargs):
        return attention_rounding(q.take(), k.take(), v.take(), heads, **kwargs)

    return wrapped(attention_rounding, from_containers)
