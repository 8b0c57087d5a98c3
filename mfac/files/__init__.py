"""Files of tensors: the safetensors format, and what torch.save writes."""
