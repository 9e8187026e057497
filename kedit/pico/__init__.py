"""pico: a family of tiny GPT-NeoX models, trained here on a seeded synthetic world (see world.py, train.py)."""
