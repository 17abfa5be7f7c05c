"""Cuts the full golden tensors of the engine and of the Wan VAE down to what the repository carries.

    python tests/golden/derive.py DIRECTORY_OF_THE_FULL_SET

A rollout's first frames do not depend on its length, so rollouts are kept up to the frame where they have shown what
they are there to show. With SELF_FORCING_GOLDENS=DIRECTORY the tests read the full set instead.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
FORWARDS = ("kv.", "bidir.", "train.context", "train_nfb3.", "train_indep_local5.", "train_tf_aug.")
ROLLOUTS = {  # case -> latent frames kept, the prefix included
    "chunk21": 6,
    "chunk21_b2": 6,
    "ctxnoise": 6,
    "nowarp": 3,
    "frame21": 4,
    "extend_chunk": 9,
    "i2v_frame": 4,
    "i2v_chunk_indep": 7,
    "indep19": 7,
}
WINDOWS = {"local6_sink1": 12, "local7_sink0": 12, "local9_sink3": 15, "frame_local6_sink2": 10}
LONGLIVE = {"infinity_local9_sink3": 18, "switch_early": 9, "switch_globalsink": 15, "switch_noglobalsink": 15}
VAE = ("decode.z", "decode2", "encode", "mean", "pixels", "std")
VAE_FRAMES = 4  # of the long decode, every fourth frame is kept
TRAINED = ("dmd_exit1", "critic")  # the rollouts that are kept, with their draws
EVERY = 29  # of gradients, every 29th entry is kept; a prime, so that it meets all rows and columns
FACTS = (
    "dmd_exit0", "dmd_exit1", "dmd_exit3", "dmd_exit1_detachedkv", "dmd_pure", "sid_pure", "critic_loss",
    "gan_critic(non-rel, r1=r2=1)", "gan_critic(relativistic, r1=r2=1)",
)  # fmt: skip
CALL = ("first_frame", "rope_offset", "slots")  # what is kept of a forward of LongLive 2.0
LEFT_OUT = ("nvfp4.matmul", "nvfp4.x", "lora.blocks.0", "lora.blocks.1.cross_attn", "lora.blocks.1.ffn.2.lora")
FACT = (
    "batch", "chunk", "frames", "guidance_scale", "inference_overrides", "initial_frames", "multi_shot_rope_offset",
    "multi_shot_sink", "prompt_texts", "prompts", "sampling_steps", "sink", "window", "config", "quirk",
)  # fmt: skip
CHANNELS = 4  # of the newer families' latents, every fourth channel is kept
FAMILY_FACTS = (
    "case", "chunk", "steps", "window_frames", "sink_frames", "decay", "position_mode", "train_frames", "bank_frames",
    "record_interval", "pipeline", "SMA", "do_not_reproduce", "source",
)  # fmt: skip
NUMBERS = ("loss", "grad_norm", "D", "r1", "r2")


def batch_first(tensors: dict, prefixes: tuple[str, ...]) -> dict:
    """The tensors under `prefixes`; cached keys and values of the first video only."""
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    return {name: t[:1].clone() if ".cache_" in name or ".cross_" in name else t for name, t in kept.items()}


def rollout_cases(tensors: dict, frames: dict[str, int]) -> dict:
    kept = {}
    for case, count in frames.items():
        one = {name[len(case) + 1 :]: t for name, t in tensors.items() if name.split(".")[0] == case}
        given = one["initial_latent"].shape[1] if "initial_latent" in one else 0
        one["latents"] = one["latents"][:, :count].clone()
        one["noise"] = one["noise"][:, : count - given].clone()
        draws = draws_for(one, count - given)
        one = {key: t for key, t in one.items() if not key.startswith(("renoise", "call"))}
        one |= {f"renoise.{i}": draw for i, draw in enumerate(draws)}
        kept |= {f"{case}.{key}": tensor for key, tensor in one.items()}
    return kept


def draws_for(case: dict, frames: int) -> list:
    """The re-noise draws [B*n, C, H, W] of the chunks that make up `frames` frames, three to a chunk."""
    if "renoise" in case:
        every = [draw.clone() for draw in case["renoise"]]
    else:
        every = [case[f"renoise.{i}"] for i in range(sum(key.startswith("renoise.") for key in case))]
    draws = []
    while frames > 0:
        draws += every[len(draws) : len(draws) + 3]
        frames -= len(draws[-1]) // len(case["latents"])
    return draws


def vae_cases(tensors: dict) -> dict:
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE)}
    return kept | {"decode.pixels_clamped": tensors["decode.pixels_clamped"][:, ::VAE_FRAMES].clone()}


def training_cases(tensors: dict) -> dict:
    """Draws of two rollouts, the clip that scores are tested on, and some entries of each gradient.

    Not kept: the context noise of a rollout's last chunk, which nothing reads, and the recorded clips.
    """
    kept = {name: tensors[name] for name in ("cond", "uncond", "dmd_pure.x", "dmd_pure.noise")}
    kept |= {name: tensor for name, tensor in tensors.items() if name.endswith(("timestep", "_logit"))}
    for case in TRAINED:
        draws = [name for name in tensors if name.startswith(f"{case}.draw") and "randn" in name]
        draws.sort(key=lambda name: int(name.split(".")[1].removeprefix("draw")))
        kept |= {name: tensors[name] for name in (*draws[:-2], draws[-1])}
    for case in ("dmd_pure", "sid_pure"):
        kept[f"{case}.grad_x.kept"] = tensors[f"{case}.grad_x"].flatten()[::EVERY].clone()
    prefix = "dmd_exit1_detachedkv.grad.model."
    for name in (name for name in tensors if name.startswith(prefix)):
        kept[f"dmd_exit1_detachedkv.kept.{name.removeprefix(prefix)}"] = tensors[name].flatten()[::EVERY].clone()
    return kept


def training_facts(source: Path, tensors: dict) -> dict:
    recorded = json.loads((source / "manifest.json").read_text())["g7_training"]["meta"]["results"]
    facts = {case: {k: v for k, v in recorded[case].items() if k in NUMBERS} for case in FACTS}
    return facts | {"every": EVERY, "critic": {"exit": int(tensors["critic.draw2.randint"][0])}}


def longlive2_rollouts(source: Path) -> tuple[dict, dict]:
    """Of each rollout of LongLive 2.0 the last two frames, which depend on all before, and what was recorded of it.

    Noise, prompts and given latents are drawn by name: see tests/core/longlive2.py.
    """
    kept, facts = {}, {}
    for name, entry in json.loads((source / "manifest.json").read_text()).items():
        for case, fact in entry.get("meta", {}).get("cases", {}).items():
            tensors = load_file(source / f"{name}.safetensors")
            kept[f"{case}.latents"] = tensors[f"{case}.latents"][:, -2:].clone()
            if f"{case}.negative_embeds" in tensors:
                kept[f"{case}.negative_embeds"] = tensors[f"{case}.negative_embeds"]
            positive = [call for call in fact.pop("calls") if call["cond"] == "pos"]
            ends = {(call["chunk"], call["t"] == 0): call for call in reversed(positive)}
            seen = [{key: ends[at][key] for key in CALL} for at in sorted(ends)]
            facts[case] = {"file": name, "calls": seen} | {key: fact[key] for key in FACT if key in fact}
    return kept, facts


def longlive2_parts(source: Path) -> dict:
    """UniPC alone, cached forwards of one video, the Wan 2.2 VAE, a LoRA and NVFP4."""
    schedule, vae, other = (
        load_file(source / f"{name}.safetensors") for name in ("h0_sched_forward", "h7_vae", "h8_names_lora_nvfp4")
    )
    unipc = {name: t for name, t in schedule.items() if name.startswith("unipc.") and not name.endswith(".x")}
    forwards = {
        name: t[:1].clone() for name, t in schedule.items() if name.startswith("fwd.") and ".cache_v" not in name
    }
    kept = {name: vae[name] for name in ("decode.z", "decode2.z", "encode.latent", "encode1.latent", "mean", "std")}
    kept |= {"encode.pixels": vae["encode.pixels"], "decode2.pixels_fresh": vae["decode2.pixels_fresh"]}
    kept["decode.pixels"] = vae["decode.pixels"][:, ::VAE_FRAMES].clone()
    other = {name: t for name, t in other.items() if not name.startswith(LEFT_OUT)}
    other |= {name: t[::2].clone() for name, t in other.items() if name.endswith(".dequantized_f32")}
    return unipc | forwards | {f"vae.{name}": t for name, t in kept.items()} | other


def family_part(name: str, tensor: Tensor) -> Tensor:
    """What is kept of an output of the newer families: every fourth channel of latents, every 29th entry of caches."""
    return (tensor[:, :, ::CHANNELS] if name == "latents" else tensor.flatten()[::EVERY]).clone()


def family_facts(manifest: dict) -> dict:
    """What the manifest tells of each case, without its calls; of a rolling draw its frames and those that are used."""
    facts = {}
    for case, entry in manifest.items():
        facts[case] = {name: value for name, value in entry["meta"].items() if name in FAMILY_FACTS}
        if "draws" in entry["meta"]:
            batch = entry["meta"]["case"].get("B", 1)
            drawn = entry["meta"]["draws"]
            facts[case]["draws"] = [[draw["shape"][0] // batch, *draw["used_frames"]] for draw in drawn]
    return facts


def family_cases(source: Path, facts: dict) -> dict:
    kept = {}
    for case in facts:
        outputs = load_file(source / f"{case}.safetensors")
        names = [name for name in outputs if name == "latents" or name.startswith("final_")]
        kept |= {f"{case}.{name}": family_part(name, outputs[name]) for name in names}
    return kept


def main(source: Path) -> None:
    def read(name: str) -> dict:
        return load_file(source / f"{name}.safetensors")

    save_file(batch_first(read("g1_forwards"), FORWARDS), HERE / "g1_forwards.safetensors")
    save_file(rollout_cases(read("g2_rollouts"), ROLLOUTS), HERE / "g2_rollouts.safetensors")
    save_file(rollout_cases(read("g3_window"), WINDOWS), HERE / "g3_window.safetensors")
    save_file(vae_cases(read("g4_vae")), HERE / "g4_vae.safetensors")
    save_file(read("g6_scheduler"), HERE / "g6_scheduler.safetensors")
    save_file(rollout_cases(read("g8_longlive"), LONGLIVE), HERE / "g8_longlive.safetensors")
    rollouts, facts = longlive2_rollouts(source / "longlive2")
    save_file(rollouts | longlive2_parts(source / "longlive2"), HERE / "longlive2.safetensors")
    (HERE / "longlive2.json").write_text(json.dumps(facts) + "\n")
    training = read("g7_training")
    save_file(training_cases(training), HERE / "g7_training.safetensors")
    facts = json.dumps(training_facts(source, training), indent=1)
    (HERE / "g7_training.json").write_text(facts + "\n")
    facts = family_facts(json.loads((source / "families" / "manifest.json").read_text()))
    save_file(family_cases(source / "families", facts), HERE / "families.safetensors")
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(about)}" for case, about in facts.items())
    (HERE / "families.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
