"""The model code that travels to the Hub with an export: flat, and nothing but torch, transformers and siblings."""
