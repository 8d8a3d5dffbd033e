"""ComfyUI's entry point of the pack. The nodes are in ``nodes``, the library that does the work in its own folder."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI when it loads the pack."""
    from .nodes import HybridDiTExtension

    return HybridDiTExtension()
