"""Tokenizers: trained, loaded, checked, and written in the form that Hugging Face loads."""
