"""What is on a MODEL beside its weights: which of it a rollout follows, and what it has to leave alone.

A rollout runs Wan's layers itself, chunk by chunk over a cache. So of what nodes put on a MODEL these act:

    weights           LoRAs and the like, and object patches of layers, wherever ComfyUI applies them
    attention         optimized_attention_override, with the transformer_options that it may ask for
    guidance          pre-CFG, CFG and post-CFG functions, called as ComfyUI's own samplers call them, and wrappers of
                      predict_noise that set cfg for a range of steps

All else is named, by what it is and not by the node that it comes from, so that no pack has to be known here.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from dis import get_instructions
from itertools import chain
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from comfy.conds import CONDRegular
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from comfy.samplers import cfg_function
from torch import Tensor

from ...sf_core.device import console_text
from ...sf_core.sampling.schedule import Step
from ...sf_core.wan.model import BlockOps, run_block, velocity
from .conditioning import SCENE, START, read_negative, take_scheduled
from .model import PatchedAttention

PRE, CFG, POST = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"
AT_CFG_1 = "disable_cfg1_optimization"  # the functions want the negative prompt even where cfg is 1

log = logging.getLogger(__name__)


# --- Functions of guidance -------------------------------------------------------------------------------------------


class RunsModel(Exception):
    """A function of guidance asks for a forward of its own."""


class ModelView:
    """The model as functions of guidance see it: all of it but a forward, which would lack the frames before."""

    def __init__(self, model: BaseModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, *args, **kwargs) -> Tensor:
        raise RunsModel


class Guarded:
    """A function of guidance that is left out from when it asks for a forward on; then there is what it was given."""

    def __init__(self, function: Callable[[dict], Any], given: Callable[[dict], Any]) -> None:
        self.function, self.given, self.works = function, given, True

    def __call__(self, args: dict) -> Any:
        if self.works:
            try:
                return self.function(args)
            except RunsModel:
                self.works = False
                log.warning("Self Forcing: %s", console_text(line_of(FORWARD, [describe(self.function)])))
        return self.given(args)


@dataclass(frozen=True)
class GuidanceFunctions:
    """A MODEL's functions of guidance as the rollout's `guide`; they get what ComfyUI's sampling_function gives them.

    options       model_options with those functions that act
    scale         cfg
    cond, uncond  prompts as ComfyUI's samplers have them; of no negative prompt None
    overrides     wrappers of predict_noise that set the guider's cfg
    """

    model: ModelView
    options: dict
    scale: float
    cond: list[dict]
    uncond: list[dict] | None
    overrides: tuple[Callable, ...] = ()

    def __call__(self, x: Tensor, positive: Tensor, negative: Tensor | None, step: Step) -> Tensor:
        sigma = torch.full((len(x),), step.sigma, device=x.device)
        scale, uncond = self.scale_at(x, sigma), self.uncond
        if scale == 1 and not self.options.get(AT_CFG_1):
            negative = uncond = None
        out = [positive, torch.zeros_like(positive) if negative is None else negative]
        for function in self.options.get(PRE, []):
            out = function({
                "conds": [self.cond, uncond], "conds_out": out, "cond_scale": scale, "timestep": sigma,
                "input": x, "sigma": sigma, "model": self.model, "model_options": self.options,
            })  # fmt: skip
        return cfg_function(self.model, out[0], out[1], scale, x, sigma, self.options, cond=self.cond, uncond=uncond)

    def scale_at(self, x: Tensor, sigma: Tensor) -> float:
        """The cfg of a step: what the overrides make of it, the innermost last. Raises ValueError where that leads away
        from a negative prompt and there is none.
        """
        guider, seen = SimpleNamespace(cfg=self.scale), [self.scale]

        def predict_noise(x: Tensor, *args, **kwargs) -> Tensor:
            seen.append(guider.cfg)
            return x

        WrapperExecutor.new_class_executor(predict_noise, guider, list(self.overrides)).execute(
            x, sigma, self.options, None
        )
        if seen[-1] != 1 and self.uncond is None:
            read_negative(None, len(x))
        return seen[-1]


def guide_of(
    patcher: ModelPatcher, options: dict, scale: float, prompts: list[Tensor], negative: Tensor | None
) -> GuidanceFunctions | None:
    """The functions of guidance of a MODEL with model_options, for prompts and a negative one [B, tokens, width]; None:
    no such.
    """
    acting, overrides = acting_functions(options), cfg_overrides(patcher, options)
    if not (acting or overrides):
        return None
    options = {key: value for key, value in options.items() if key not in (PRE, CFG, POST)} | acting
    uncond = None if negative is None else as_conds([negative])
    return GuidanceFunctions(ModelView(patcher.model), options, scale, as_conds(prompts), uncond, overrides)


def cfg_overrides(patcher: ModelPatcher, options: dict) -> tuple[Callable, ...]:
    """Wrappers of predict_noise, on a MODEL or already in model_options, that set the guider's cfg."""
    registries = (patcher.wrappers, options.get("transformer_options", {}).get("wrappers", {}))
    found = [wrapper for key, wrapper in functions_in(*registries) if overrides_cfg(key, wrapper)]
    return tuple(dict.fromkeys(found))  # a guider has copied them


def overrides_cfg(key: str, wrapper: Callable) -> bool:
    """Whether a wrapper does no more than to set a guider's cfg: it neither changes nor leaves out a prediction."""
    code = getattr(innermost(wrapper), "__code__", None)
    if key != WrappersMP.PREDICT_NOISE or code is None:
        return False
    stored = {step.argval for step in get_instructions(code) if step.opname == "STORE_ATTR"}
    return stored == {"cfg"} and names_in(code) <= CFG_NAMES


CFG_NAMES = {"cfg", "class_obj", "float", "flatten", "item", "max", "min"}  # all that such a wrapper needs


def acting_functions(options: dict) -> dict:
    """Those of model_options' functions of guidance that do not run the model themselves, under their keys."""
    lists = {
        PRE: [Guarded(f, lambda args: args["conds_out"]) for f in options.get(PRE, []) if not runs_model(f)],
        POST: [Guarded(f, lambda args: args["denoised"]) for f in options.get(POST, []) if not runs_model(f)],
    }
    acting = {key: functions for key, functions in lists.items() if functions}
    if CFG in options and not runs_model(options[CFG]):
        acting[CFG] = Guarded(options[CFG], linear)
    return acting


def linear(args: dict) -> Tensor:
    """Classifier-free guidance as it is without a CFG function."""
    return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]


def wants_negative(options: dict) -> bool:
    """Whether functions in model_options lead away from the negative prompt where cfg is 1, too."""
    return bool(options.get(AT_CFG_1) and acting_functions(options))


def as_conds(prompts: list[Tensor]) -> list[dict]:
    """Embeddings [B, tokens, width] as ComfyUI's samplers have prompts."""
    return [{"cross_attn": p, "model_conds": {"c_crossattn": CONDRegular(p)}, "uuid": uuid4()} for p in prompts]


FORWARDS = {"calc_cond_batch", "calc_cond_uncond_batch", "sampling_function", "apply_model"}


def runs_model(function: Callable) -> bool:
    """Whether a function, or one of its module that it calls, names one of ComfyUI's that run the model."""
    todo, seen = [function], set()
    while todo:
        function = innermost(todo.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = names_in(code)
        if names & FORWARDS:
            return True
        own = [function.__globals__[name] for name in names & function.__globals__.keys()]
        todo += [f for f in own if isinstance(f, FunctionType) and f.__module__ == function.__module__]
        todo += [f for f in map(cell_contents, function.__closure__ or ()) if callable(f)]
    return False


def names_in(code: CodeType) -> set[str]:
    """All that a function's code, and functions defined in it, call by name."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(names_in, inner))


def cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def innermost(function: Any) -> Any:
    """The plain function behind a partial, a method or an object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__code__") else type(function).__call__


# --- What attention is told ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TellingCall:
    """Calls the parts of a forward, and keeps the attention told of them: what overrides and kernels may ask for."""

    attention: PatchedAttention

    def __call__(self, part: Callable, module: torch.nn.Module, *args):
        if part is velocity:
            x, t = args[:2]
            noisiest = t.max().item() if isinstance(t, Tensor) else t  # frames that are held have 0, and chunks differ
            self.attention.options["sigmas"] = torch.full((1,), noisiest / 1000, device=x.device)
        elif part is run_block:
            self.attention.options["block_index"] = args[2]
            self.attention.now["block"] = module
        return part(module, *args)


def telling_ops(ops: BlockOps, attention: PatchedAttention) -> BlockOps:
    """Block operations that keep `attention` told, and give cross-attention one of its own."""
    cross = replace(attention, layer="cross_attn")

    def finish(block, x, attended, e6, keys, values, _, config):
        return ops.finish(block, x, attended, e6, keys, values, cross, config)

    return ops._replace(finish=finish, call=TellingCall(attention))


def transformer_options(options: dict, blocks: int, sigmas: Tensor, guided: bool) -> dict:
    """A rollout's own transformer_options: those of model_options, and what ComfyUI's samplers add to them.

    sigmas  [steps + 1] of a chunk, the last one 0
    guided  whether a forward holds the prompt and then the negative one
    """
    return {
        **options.get("transformer_options", {}),
        "total_blocks": blocks,
        "block_type": "double",
        "cond_or_uncond": [0, 1] if guided else [0],
        "sample_sigmas": sigmas,
    }


# --- What has no effect ----------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of patch that has no effect, and why."""

    name: str
    why: str


LAYERS = "a rollout runs Wan's layers itself, chunk by chunk"
WRAPPER = Kind("wrapper", LAYERS)
FUNCTION_WRAPPER = Kind("model function wrapper", LAYERS)
PATCH = Kind("block or attention patch", LAYERS)
REPLACEMENT = Kind("block or attention replacement", LAYERS)
OBJECT = Kind("object patch", LAYERS + ", and these are not among them")
FORWARD = Kind("guidance function", "it runs the model once more, without the frames that a chunk attends to")
BATCH = Kind("calc_cond_batch function", "a rollout has one forward for both prompts")
MASK = Kind("denoise mask function", "a rollout makes whole frames, without a mask")
WINDOWS = Kind("context windows", "a rollout has its own; set window and sink")
ROPE = Kind("position (RoPE) options", "positions are those of the chunk in its window")
CALLBACK = Kind("callback", "a rollout has no such moment")
HOOK = Kind("hook", "a rollout does not change weights on the way")
INJECTION = Kind("injection", "what it puts into the model's own forward is not run")
PROMPT = Kind("setting of a prompt", "a rollout reads its words alone, and starts from what is in prefix")
COMBINED = Kind("prompt combined with another", "a rollout follows one at a time; see Self Forcing Next Prompt")
GPUS = Kind("multi-GPU clones", "a rollout runs on one device")
OPTION = Kind("option", "a rollout does not know it")

ACTING_OBJECTS = re.compile(
    r"manual_cast_dtype|model_sampling(\..+)?|"  # the latter has a line of its own
    r"diffusion_model\.("
    r"patch_embedding|(text|time)_embedding|time_projection|head\.head|head\.modulation|"
    r"blocks\.\d+\.((self|cross)_attn\.(q|k|v|o|norm_q|norm_k)|norm3|ffn|modulation)"
    r")(\..+)?"
)
MODEL_OPTIONS = {"transformer_options", PRE, CFG, POST, AT_CFG_1, "torch_compile_kwargs", "multigpu_clones"}
TRANSFORMER_OPTIONS = {
    "patches", "patches_replace", "wrappers", "callbacks", "rope_options", "optimized_attention_override",
    "sigmas", "sample_sigmas", "cond_or_uncond", "uuids", "block_index", "block_type", "total_blocks",
}  # fmt: skip
SINGLE = {  # keys of model_options that hold one patch
    "model_function_wrapper": FUNCTION_WRAPPER, "sampler_calc_cond_batch_function": BATCH,
    "denoise_mask_function": MASK, "context_handler": WINDOWS,
}  # fmt: skip
AROUND_SAMPLER = {WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE}
UNHEARD = {CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_APPLY_HOOKS, CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES}
BYPASS = "bypass_lora"  # an injection that goes into layers
MOST_NAMES = 4


def ignored_patches(patcher: ModelPatcher, in_guider: bool = False) -> list[str]:
    """What is on a MODEL and has no effect on a rollout, one line for each kind.

    in_guider  whether the rollout runs in one of ComfyUI's guiders, which calls the wrappers around a sampler
    """
    kinds: dict[Kind, list[str]] = {}
    for kind, name in chain(on_options(patcher.model_options), on_patcher(patcher, in_guider)):
        names = kinds.setdefault(kind, [])
        if name not in names:
            names.append(name)
    return [line_of(kind, names) for kind, names in kinds.items()]


def line_of(kind: Kind, names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"no effect here: {kind.name} {', '.join(names[:MOST_NAMES])}{more}; {kind.why}."


def on_options(options: dict) -> Iterator[tuple[Kind, str]]:
    """(kind, name) of each patch in model_options that has no effect, but for wrappers."""
    for function in (*options.get(PRE, []), *([options[CFG]] if CFG in options else []), *options.get(POST, [])):
        if runs_model(function):
            yield FORWARD, describe(function)
    for key, kind in SINGLE.items():
        if options.get(key) is not None:
            yield kind, describe(options[key])
    inner = options.get("transformer_options", {})
    for name, functions in inner.get("patches", {}).items():
        yield from ((PATCH, f"{name} {describe(function)}") for function in functions)
    for name, functions in inner.get("patches_replace", {}).items():
        yield from ((REPLACEMENT, f"{name} {describe(function)}") for function in functions.values())
    if inner.get("rope_options"):
        yield ROPE, ", ".join(f"{key} {value:g}" for key, value in inner["rope_options"].items() if value)
    yield from ((OPTION, str(key)) for key in options.keys() - MODEL_OPTIONS - SINGLE.keys())
    if "optimized_attention_override" not in inner:  # which may read any of them
        yield from ((OPTION, str(key)) for key in inner.keys() - TRANSFORMER_OPTIONS)


def on_patcher(patcher: ModelPatcher, in_guider: bool) -> Iterator[tuple[Kind, str]]:
    """(kind, name) of each wrapper, and of each patch beside model_options, that has no effect."""
    inner = patcher.model_options.get("transformer_options", {})
    for key, function in functions_in(patcher.wrappers, inner.get("wrappers", {})):
        if not (in_guider and key in AROUND_SAMPLER) and not overrides_cfg(key, function):
            yield WRAPPER, f"{key} {describe(function)}"
    for key, function in functions_in(patcher.callbacks, inner.get("callbacks", {})):
        if key in UNHEARD:
            yield CALLBACK, f"{key} {describe(function)}"
    for path, value in patcher.object_patches.items():
        if not ACTING_OBJECTS.fullmatch(path):
            yield OBJECT, re.sub(r"\.\d+\b", ".*", path) + f" {describe(value)}"
    yield from ((HOOK, describe(hook)) for hook in patcher.hook_patches)
    yield from ((INJECTION, str(key)) for key in patcher.injections if key != BYPASS)
    yield from ((GPUS, str(clone.load_device)) for clone in patcher.get_additional_models_with_key("multigpu"))


WORDS = {"pooled_output", "cross_attn", "model_conds", "uuid", "attention_mask", START, SCENE}
NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}  # as if they were not there


def ignored_conditioning(**prompts: list | None) -> list[str]:
    """What is in prompts beside their words and their times, and has no effect on a rollout, one line for each kind.

    prompts  {input's name: CONDITIONING}
    """
    kinds: dict[Kind, list[str]] = {PROMPT: [], COMBINED: []}
    for name, conditioning in prompts.items():
        followed = take_scheduled(conditioning)[: None if name == "positive" else 1] if conditioning else []
        for _, values in followed:
            known = WORDS | ({"start_percent"} if START in values else set())
            keys = [key for key, value in values.items() if value is not None and key not in known]
            kinds[PROMPT] += [f"{key} ({name})" for key in keys if key not in NEUTRAL or values[key] != NEUTRAL[key]]
        if more := len(conditioning or []) - len(followed):
            kinds[COMBINED].append(f"{more} ({name})")
    return [line_of(kind, list(dict.fromkeys(names))) for kind, names in kinds.items() if names]


def functions_in(*registries: dict[str, dict[str, list[Callable]]]) -> Iterator[tuple[str, Callable]]:
    """(type, function) of wrappers or callbacks."""
    for registry in registries:
        for kind, keyed in registry.items():
            yield from ((kind, function) for functions in keyed.values() for function in functions)


def describe(value: Any) -> str:
    """A function, or an object's class, and where it is from: "EasyCache.wrapper (comfy_extras.nodes_easycache)"."""
    while isinstance(value, functools.partial):
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    name = named.__qualname__.replace("<locals>.", "").replace(".<lambda>", "")
    module = (getattr(named, "__module__", None) or "").rpartition("/")[2]  # packs' modules have paths for names
    return f"{name} ({module})" if module not in ("", "builtins") else name
