"""The int8 decoder in C."""
