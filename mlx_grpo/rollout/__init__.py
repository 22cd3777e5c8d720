"""Completions of prompts: KV caches, and what decodes them position by position."""
