"""Worker groups: processes that hold a sharded model, and the client that ComfyUI and the command line talk to."""
