"""The engine of Self Forcing for ComfyUI: causal Wan rollout, streaming decoders, training. It imports no ComfyUI."""

__version__ = "0.1.0"
