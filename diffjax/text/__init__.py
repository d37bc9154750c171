"""From prompts to what a network reads: tokenizers, an encoder that is trained with its network, and frozen ones."""
