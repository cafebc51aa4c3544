"""What a run is: options, presets and DeepSpeed JSON, read from a command line, checked and resolved."""
