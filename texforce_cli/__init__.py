"""Fine-tune the text encoder of a Stable Diffusion model with reinforcement learning (TexForce, ECCV 2024)."""

__version__ = "0.1.0"
