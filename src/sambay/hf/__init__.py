"""The Hugging Face world: official checkpoints, transformers classes, tokenizers and chat.

Only `configuration`, `modeling`, `cache` and `conversion` import transformers; the key map and the
loading of official checkpoints need torch and safetensors alone.
"""
