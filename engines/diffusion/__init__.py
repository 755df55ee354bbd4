"""Latent diffusion over the diffusers ONNX layout: the library that the image and video engines share.

layout.py      the folder and its small JSON files (standard library and msgspec)
schedulers.py  noise schedules and steps (numpy)
tokens.py      prompt to token ids, never truncated (tokenizers)
options.py     load options and the checks that need the model (no heavy import)
pipeline.py    text encoder, denoising loop, VAE (onnxruntime through engines.runtime.ort)
pictures.py    pixels to files and untrusted files to pixels (Pillow)
checks.py      judges of a fixture's answer
"""
