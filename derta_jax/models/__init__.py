"""Decoder-only language models as pure functions of their parameters, by Hugging Face `model_type`."""
