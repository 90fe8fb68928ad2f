"""Small tools of the model files: JSON files read with checks, memory limits, folders that appear whole."""
