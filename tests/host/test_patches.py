"""What nodes put on a MODEL beside its weights acts on the rollout, or the node and the log say that it does not."""

import asyncio
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def latent(call):
    return call("Latent", width=32, height=32, frames=21, seconds=0.0, fps=16.0, batch_size=1)


@pytest.fixture(scope="module")
def negative(call, tiny):
    with torch.inference_mode():
        return call("Prompt", tiny.clip, "a blue square")


@pytest.fixture
def guided(sample, negative):
    """guided(model) samples with cfg 3."""
    return lambda model, **changes: sample(model=model, negative=negative, **{"cfg": 3.0, **changes})


@pytest.fixture(scope="module")
def ignored(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.patches"].ignored_patches


@pytest.fixture(scope="module")
def stock(comfyui):
    """Node id -> class of all that ComfyUI itself brings."""
    import nodes

    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    return {key: node for key, node in nodes.NODE_CLASS_MAPPINGS.items() if not key.startswith("SelfForcing")}


def widget(spec):
    """The value that a widget begins with; None for an input that is none, and for a list without files."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    kind, choices = ("COMBO", kind) if isinstance(kind, list) else (kind, options.get("options"))
    start = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(kind, choices[0] if choices else None)
    return options.get("default", start)


def apply(node, model, **changes):
    """The MODEL out of a stock node with its widgets as they begin."""
    inputs = {key: widget(spec) for key, spec in node.INPUT_TYPES()["required"].items() if spec[0] != "MODEL"}
    name = next(key for key, spec in node.INPUT_TYPES()["required"].items() if spec[0] == "MODEL")
    run = node.execute if hasattr(node, "GET_SCHEMA") else getattr(node(), node.FUNCTION)
    out = run(**{**inputs, name: model, **changes})
    return (out.args if hasattr(out, "args") else out)[list(node.RETURN_TYPES).index("MODEL")]


def takes_a_model_alone(node):
    """Whether a node makes a MODEL of one MODEL and widgets."""
    required = node.INPUT_TYPES().get("required", {})
    models = [key for key, spec in required.items() if spec[0] == "MODEL"]
    others = [spec for spec in required.values() if spec[0] != "MODEL" and widget(spec) is None]
    return len(models) == 1 and not others


def puts_nothing(patched, model):
    """Whether a MODEL carries nothing that the one before did not."""
    from comfy.utils import get_attr

    def own(path):
        try:
            return get_attr(model.model, path)
        except AttributeError:
            return unknown

    bags = ("patches", "weight_wrapper_patches", "wrappers", "callbacks", "injections", "additional_models")
    return patched is model or (
        patched.model_options == model.model_options
        and all(own(path) is value for path, value in patched.object_patches.items())
        and not any(getattr(patched, bag) for bag in bags)
    )


def stock_latents(model, prompt, cfg=3.0):
    import nodes

    latent = {"samples": torch.zeros(1, 16, 3, 4, 4)}
    return nodes.common_ksampler(model, 0, 2, cfg, "euler", "simple", prompt, prompt, latent)[0]["samples"]


def test_every_stock_node_acts_or_is_named(tiny, guided, stock, ignored, caplog):
    makes_models = {key: node for key, node in stock.items() if "MODEL" in node.RETURN_TYPES}
    usual, outcomes, silent = guided(tiny.model), {}, []
    for key, node in makes_models.items():
        required = node.INPUT_TYPES().get("required", {})
        if not any(spec[0] == "MODEL" for spec in required.values()):
            continue
        try:
            patched = apply(node, tiny.model) if takes_a_model_alone(node) else None
        except KeyError:  # a node for UNets
            patched = None
        if patched is None:
            outcomes[key] = "skipped: needs files, other inputs or another kind of model"
            continue
        if puts_nothing(patched, tiny.model):
            outcomes[key] = "puts nothing on a Wan MODEL"
            continue
        caplog.clear()
        try:
            acts = not torch.equal(guided(patched), usual)
        except AttributeError:
            with pytest.raises(AttributeError):
                stock_latents(patched, tiny.prompt)
            outcomes[key] = "fails with stock samplers, too: for another kind of model"
            continue
        said = [record.getMessage() for record in caplog.records if "Self Forcing: " in record.getMessage()]
        assert len(said) >= len(ignored(patched))
        outcomes[key] = " + ".join([*(["acts"] if acts else []), *said])
        if not outcomes[key]:
            silent.append(key)
    sys.stdout.write("\n".join(f"{key:30} {outcome}" for key, outcome in outcomes.items()))
    assert not silent
    assert sum(outcome.startswith("acts") for outcome in outcomes.values()) >= 10


@pytest.mark.parametrize(
    "node",
    ["RescaleCFG", "CFGZeroStar", "CFGNorm", "TCFG", "FreSca", "APG", "Mahiro", "VideoLinearCFGGuidance"],
)
def test_functions_of_guidance_act_without_a_word(tiny, guided, stock, ignored, node):
    patched = apply(stock[node], tiny.model)
    assert not torch.allclose(guided(patched), guided(tiny.model), atol=1e-3)
    assert ignored(patched) == []


def test_post_cfg_function_gets_at_cfg_1_what_stock_samplers_give(tiny, sample):
    calls = []

    def record(args):
        calls.append(args)
        return args["denoised"]

    patched = tiny.model.clone()
    patched.set_model_sampler_post_cfg_function(record)
    assert torch.equal(sample(model=patched), sample())
    ours, calls[:] = calls[:], []
    stock_latents(patched, tiny.prompt, cfg=1.0)
    theirs = calls[0]
    assert {args["sigma"].item() for args in ours} > {1.0}
    for args in ours:
        assert args.keys() == theirs.keys()
        assert args["cond_scale"] == 1 and args["uncond"] is None and not args["uncond_denoised"].any()
        assert torch.equal(args["denoised"], args["cond_denoised"])
        assert args["sigma"].shape == theirs["sigma"].shape
        assert args["input"].shape[1] == 16 and args["model"].latent_format is tiny.model.model.latent_format


def test_post_cfg_function_decides_the_video(tiny, guided):
    patched = tiny.model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["cond_denoised"])
    positive_alone = guided(patched)
    patched = tiny.model.clone()
    patched.set_model_sampler_cfg_function(lambda args: args["cond"])
    assert torch.allclose(guided(patched), positive_alone, atol=1e-4)
    patched = tiny.model.clone()
    patched.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0]] * 2)
    assert torch.allclose(guided(patched), positive_alone, atol=1e-4)


def test_plain_functions_change_nothing(tiny, guided):
    patched = tiny.model.clone()
    patched.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
    )
    assert torch.allclose(guided(patched), guided(tiny.model), atol=1e-2)


def test_function_may_ask_for_the_negative_prompt_at_cfg_1(tiny, guided):
    seen = []

    def away(args):
        seen.append(args["uncond_denoised"].any().item())
        return args["denoised"]

    patched = tiny.model.clone()
    patched.set_model_sampler_post_cfg_function(away, disable_cfg1_optimization=True)
    usual = guided(tiny.model, cfg=1.0)
    assert torch.allclose(guided(patched, cfg=1.0), usual, atol=1e-3)
    assert all(seen) and seen


def test_function_that_runs_the_model_is_left_out_and_named(tiny, guided, ignored, caplog):
    class Hidden:
        def forward(self, args):
            return args["model"].apply_model(args["input"], args["sigma"])

        def __call__(self, args):
            return self.forward(args)

    patched = tiny.model.clone()
    patched.set_model_sampler_post_cfg_function(Hidden())
    assert torch.allclose(guided(patched), guided(tiny.model), atol=1e-3)
    assert caplog.text.count("Hidden") == 1 and "runs the model" in caplog.text


@pytest.fixture
def custom(call, tiny, negative):
    """custom(model) samples with SamplerCustomAdvanced's guider at cfg 3."""
    from comfy.samplers import CFGGuider

    def run(model):
        guider = CFGGuider(model)
        guider.set_conds(tiny.prompt, negative)
        guider.set_cfg(3.0)
        sampler = call("SamplerSelect", chunk=0, window=0, sink=-1)
        sigmas = call("Sigmas", model=model, preset="auto", steps=0)
        empty = torch.zeros(1, 16, 6, 4, 4)
        return guider.sample(empty, empty, sampler, sigmas, seed=0)

    return run


def test_functions_act_in_sampler_custom_too(custom, tiny, stock):
    assert not torch.allclose(custom(apply(stock["RescaleCFG"], tiny.model)), custom(tiny.model), atol=1e-3)


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache", "WanContextWindowsManual"])
def test_wrappers_around_a_sampler_do_no_harm_and_those_within_are_named(custom, tiny, stock, caplog, node):
    assert torch.equal(custom(apply(stock[node], tiny.model)), custom(tiny.model))
    assert "no effect here: " in caplog.text and "wrapper outer_sample" not in caplog.text


def test_cfg_override_is_the_cfg_of_the_steps_it_is_for(tiny, guided, custom, stock, ignored):
    def override(**widgets):
        return apply(stock["CFGOverride"], tiny.model, **widgets)

    three, one = guided(tiny.model), guided(tiny.model, cfg=1.0)
    assert torch.allclose(guided(override(cfg=3.0), cfg=1.0), three, atol=1e-2)
    assert torch.allclose(guided(override(cfg=1.0)), one, atol=1e-2)
    assert torch.allclose(guided(override(cfg=9.0, start_percent=0.999, end_percent=1.0)), three, atol=1e-2)
    first = guided(override(cfg=1.0, end_percent=0.1))
    assert not torch.allclose(first, three, atol=1e-2) and not torch.allclose(first, one, atol=1e-2)
    both = apply(stock["CFGOverride"], override(cfg=9.0), cfg=3.0)  # the last one wins
    assert torch.allclose(guided(both, cfg=1.0), three, atol=1e-2)
    assert ignored(both) == []
    assert torch.allclose(custom(override(cfg=1.0)), custom(override(cfg=1.0, start_percent=0.0)))
    assert not torch.allclose(custom(override(cfg=1.0)), custom(tiny.model), atol=1e-2)


def test_functions_of_guidance_see_the_cfg_of_an_override(tiny, guided, stock):
    seen = []
    patched = apply(stock["CFGOverride"], tiny.model, cfg=1.0, end_percent=0.1)
    patched.set_model_sampler_post_cfg_function(
        lambda args: seen.append((args["cond_scale"], args["uncond"] is None)) or args["denoised"]
    )
    guided(patched)
    assert set(seen) == {(1.0, True), (3.0, False)}


def test_cfg_override_without_a_negative_prompt_is_refused(tiny, sample, stock):
    patched = apply(stock["CFGOverride"], tiny.model, cfg=3.0)
    with pytest.raises(ValueError, match="cfg other than 1 without a negative prompt"):
        sample(model=patched)
    assert torch.equal(sample(model=apply(stock["CFGOverride"], tiny.model, cfg=1.0)), sample())


def test_wrapper_that_does_more_than_set_cfg_is_named(tiny, guided, ignored):
    def halves(executor, *args, **kwargs):
        executor.class_obj.cfg = 1.0
        return executor(*args, **kwargs) * 0.5 + torch.zeros(1)

    patched = tiny.model.clone()
    patched.add_wrapper("predict_noise", halves)
    assert [line for line in ignored(patched) if "halves" in line]
    assert torch.equal(guided(patched), guided(tiny.model))


# --- Prompts ---------------------------------------------------------------------------------------------------------

ON_PROMPTS = {  # of one's own: what stock nodes put into a prompt's dict
    "hooks": lambda: __import__("comfy.hooks").hooks.HookGroup(),
    "control": object,
    "mask": lambda: torch.ones(1, 4, 4),
    "area": lambda: (4, 4, 0, 0),
    "strength": lambda: 0.5,
    "end_percent": lambda: 0.5,
    "concat_latent_image": lambda: torch.ones(1, 16, 1, 4, 4),
    "something_new": lambda: 1,
}


@pytest.mark.parametrize("key", ON_PROMPTS)
def test_what_is_on_a_prompt_and_has_no_effect_is_named(tiny, sample, negative, caplog, key):
    embeds, values = tiny.prompt[0]
    prompt = [[embeds, {**values, key: ON_PROMPTS[key]()}]]
    assert torch.equal(sample(positive=prompt), sample())
    assert f"no effect here: setting of a prompt {key} (positive); a rollout reads its words alone" in caplog.text
    caplog.clear()
    sample(negative=[[negative[0][0], prompt[0][1]]], cfg=3.0)
    assert f"setting of a prompt {key} (negative)" in caplog.text


def test_hooks_on_a_prompt_are_named_in_sampler_custom_too(call, tiny, caplog):
    from comfy.hooks import HookGroup
    from comfy.samplers import CFGGuider

    guider = CFGGuider(tiny.model)
    guider.set_conds([[tiny.prompt[0][0], {**tiny.prompt[0][1], "hooks": HookGroup()}]], tiny.prompt)
    sampler, empty = call("SamplerSelect", chunk=0, window=0, sink=-1), torch.zeros(1, 16, 3, 4, 4)
    guider.sample(empty, empty, sampler, call("Sigmas", model=tiny.model, preset="auto", steps=0), seed=0)
    assert "hooks (positive)" in caplog.text


def test_prompts_combined_with_the_first_are_named(tiny, sample, negative, caplog):
    import nodes

    both = nodes.ConditioningCombine().combine(tiny.prompt, negative)[0]
    assert torch.equal(sample(positive=both), sample())
    assert "no effect here: prompt combined with another 1 (positive)" in caplog.text


def test_prompts_that_are_followed_are_not_named(call, tiny, sample, negative, custom, caplog):
    later = call("NextPrompt", tiny.prompt, call("Prompt", tiny.clip, "a blue square"), "0.5s", "recache", 1.0)
    sample(positive=later)
    sample(negative=negative, cfg=3.0)
    custom(tiny.model)
    assert "no effect here" not in caplog.text


def unknown(*args, **kwargs):
    raise AssertionError("a rollout does not call this")


@pytest.mark.parametrize(
    ("put", "names"),
    [
        (lambda m: m.add_wrapper_with_key("apply_model", "pack", unknown), ["wrapper", "apply_model", "unknown"]),
        (lambda m: m.add_object_patch("diffusion_model.rope_embedder", unknown), ["object", "rope_embedder"]),
        (lambda m: m.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", unknown), ["blocks.*.cross_attn"]),
        (lambda m: m.set_model_unet_function_wrapper(unknown), ["model function wrapper", "unknown"]),
        (lambda m: m.set_model_patch(unknown, "attn2_patch"), ["attn2_patch", "unknown"]),
        (lambda m: m.set_model_patch_replace(unknown, "dit", "double_block", 1), ["replacement", "dit", "unknown"]),
        (lambda m: m.add_callback_with_key("on_prepare_state", "pack", unknown), ["on_prepare_state", "unknown"]),
        (lambda m: m.model_options.update(teacache=1), ["option", "teacache"]),
        (lambda m: m.model_options["transformer_options"].update(skip=1), ["option", "skip"]),
    ],
)  # fmt: skip
def test_unknown_patch_is_named(tiny, sample, ignored, caplog, put, names):
    patched = tiny.model.clone()
    put(patched)
    (line,) = ignored(patched)
    assert line.startswith("no effect here: ") and all(name in line for name in names)
    if "object" not in line:  # those would have to be modules to be put in place
        assert torch.equal(sample(model=patched), sample())
        assert line in caplog.text


def test_object_patch_of_a_layer_acts_and_is_not_named(tiny, sample, ignored):
    patched = tiny.model.clone()
    layer = tiny.model.model.diffusion_model.blocks[0].self_attn.o
    other = type(layer)(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
    other.load_state_dict({key: value * 0.5 for key, value in layer.state_dict().items()})
    patched.add_object_patch("diffusion_model.blocks.0.self_attn.o", other)
    assert ignored(patched) == []
    assert not torch.equal(sample(model=patched), sample())


def test_compute_dtype_acts(tiny, sample, stock, ignored):
    patched = apply(stock["ModelComputeDtype"], tiny.model, dtype="bf16")
    assert ignored(patched) == []
    assert not torch.equal(sample(model=patched), sample())
    assert torch.isfinite(sample(model=patched)).all()


def test_attention_override_is_told_block_and_noise_level(tiny, guided):
    told = []

    def override(function, *args, **options):
        told.append({**options["transformer_options"]})
        return function(*args, **options)

    patched = tiny.model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    guided(patched)
    blocks = len(tiny.model.model.diffusion_model.blocks)
    assert {options["block_index"] for options in told} == set(range(blocks))
    assert {options["total_blocks"] for options in told} == {blocks}
    assert {options["sigmas"].item() for options in told} > {1.0, 0.0}
    assert told[0]["cond_or_uncond"] == [0, 1] and told[0]["sample_sigmas"][-1] == 0
    assert patched.model_options["transformer_options"].keys() == {"optimized_attention_override"}


@pytest.mark.parametrize("node", [None, "RescaleCFG", "CFGZeroStar", "TCFG"])
def test_guidance_gives_what_stock_samplers_give_for_the_same_latents(call, tiny, guided, stock, negative, node):
    from comfy.samplers import KSAMPLER, CFGGuider

    calls = []
    patched = tiny.model.clone() if node is None else apply(stock[node], tiny.model)
    patched.set_model_sampler_post_cfg_function(lambda args: calls.append(args) or args["denoised"])
    guided(patched, latent=call("Latent", width=32, height=32, frames=9, seconds=0.0, fps=16.0, batch_size=1))
    ours = calls[1]  # one chunk, that has no other before it, in its second step
    guider = CFGGuider(patched)
    guider.set_conds(tiny.prompt, negative)
    guider.set_cfg(3.0)
    once = KSAMPLER(lambda model, x, sigmas, extra_args, **_: model(ours["input"], ours["sigma"], **extra_args))
    empty = torch.zeros_like(ours["input"])
    guider.sample(empty, empty, once, torch.tensor([1.0, 0.0]))
    theirs = calls[-1]
    for key in ("cond_denoised", "uncond_denoised", "denoised", "input", "sigma"):
        torch.testing.assert_close(ours[key], theirs[key], atol=2e-3, rtol=1e-3)
