"""A live model: its parts, the journal of its edits, and reading it."""
