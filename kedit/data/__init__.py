"""What is read: facts to edit, texts, data sets."""
