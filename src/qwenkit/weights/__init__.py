"""Names and bytes on disk: find a model, verify it, stream its tensors, load it. Imports linear and below."""
