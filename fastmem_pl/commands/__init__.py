"""Commands on single memories: memorize a text, ask it, export it."""
