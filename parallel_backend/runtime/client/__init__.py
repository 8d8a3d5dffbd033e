"""What runs in the process that uses a worker group: ComfyUI's, or a script's."""
