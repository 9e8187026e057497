"""From results to sentences, tables and figures; no model is needed."""
