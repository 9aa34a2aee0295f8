"""The parts of the Qwen2 model: attention, linear layers, LM head, LoRA, configuration, weight files, chat template."""
