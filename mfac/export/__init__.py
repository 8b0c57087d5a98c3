"""Sparse models as files: compressed safetensors, ONNX, the 2:4 tensors of torch, and what is proven of a file."""
