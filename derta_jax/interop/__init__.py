"""Hugging Face directories in and out: tokenizers, safetensors, configs."""
