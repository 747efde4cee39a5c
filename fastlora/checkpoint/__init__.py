"""State dicts in any library's names, and adapter folders in PEFT's format."""

from fastlora.checkpoint.folder import load_adapter, save_adapter
from fastlora.checkpoint.state import load_lora_state_dict, lora_state_dict

__all__ = ["load_adapter", "load_lora_state_dict", "lora_state_dict", "save_adapter"]
