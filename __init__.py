"""ComfyUI's entry point of the pack. The nodes are in ``nodes``, the library that does the work in its own folder."""

import logging

from .stand_ins import stand_ins, what_is_wrong

if _wrong := what_is_wrong():
    logging.getLogger(__name__).warning("Hybrid DiT cannot run: %s", _wrong)
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = stand_ins(_wrong)
else:
    WEB_DIRECTORY = "./web"

    async def comfy_entrypoint():
        """Called by ComfyUI when it loads the pack."""
        from .nodes import HybridDiTExtension

        return HybridDiTExtension()
