"""What a model folder has besides weights: configuration, tokenizer, templates."""

# Suffixes of files beside ``config.json``; as for models of the hub, no code.
COMPANIONS = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab"})
